//! RMSNorm (Zhang & Sennrich, 2019; the convention of Llama) and LayerNorm, forward and backward, over rows that
//! may lie inside a larger buffer (see [`Rows`]): so the norm of each query head reads a fused buffer in place.

use std::ops::Range;

use crate::buffers::Buffer;
use crate::by_level;
use crate::lanes;
use crate::layout::Rows;
use crate::math::fma;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;

/// Rows of a task, and of a partial sum of the weights' gradient: a constant, so that the bits of those sums do not
/// depend on the threads.
const BLOCK: usize = 64;

/// y = x · inv_rms · weight with inv_rms = 1 / √(mean(x²) + eps), row by row.
///
/// `x` and `y` hold `rows` at their strides, `weight` is \[width\], `inv_rms` [tokens · heads] is written for the
/// backward. Panics when a slice does not fit.
pub fn rms_forward(
    rows: Rows,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
    y_stride: usize,
    inv_rms: &mut [f32],
) {
    rms_forward_at(Level::current(), rows, x, x_stride, weight, eps, y, y_stride, inv_rms);
}

/// [`rms_forward`] at a given level.
pub fn rms_forward_at(
    level: Level,
    rows: Rows,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
    y_stride: usize,
    inv_rms: &mut [f32],
) {
    let _span = profile::span("norms");
    rows.check("x", x.len(), x_stride);
    rows.check("y", y.len(), y_stride);
    assert_eq!(weight.len(), rows.width, "weight is [width]");
    assert_eq!(inv_rms.len(), rows.count(), "inv_rms is [tokens · heads]");
    let (y, inv_rms) = (Shared::new(y), Shared::new(inv_rms));
    for_each_block(rows, |_, range| {
        // SAFETY: each block is one task's.
        let inv = unsafe { inv_rms.part(range.start, range.len()) };
        rms_forward_rows(level, rows, range, x, x_stride, weight, eps, y, y_stride, inv);
    });
}

by_level! {
    fn rms_forward_rows(
        rows: Rows,
        range: Range<usize>,
        x: &[f32],
        x_stride: usize,
        weight: &[f32],
        eps: f32,
        y: Shared<f32>,
        y_stride: usize,
        inv_rms: &mut [f32],
    ) {
        for (row, inv_rms) in range.zip(inv_rms) {
            let x = &x[rows.at(row, x_stride)..][..rows.width];
            // SAFETY: rows do not overlap (`Rows::check`), and each is in one task's range.
            let y = unsafe { y.part(rows.at(row, y_stride), rows.width) };
            let inv = inverse_rms::<FMA>(x, eps);
            *inv_rms = inv;
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = (x * inv) * w;
            }
        }
    }
}

/// [`rms_forward`] with y in the place of x and nothing saved: for inference. Same bits.
pub fn rms_in_place(rows: Rows, x: &mut [f32], x_stride: usize, weight: &[f32], eps: f32) {
    let _span = profile::span("norms");
    rows.check("x", x.len(), x_stride);
    assert_eq!(weight.len(), rows.width, "weight is [width]");
    let x = Shared::new(x);
    for_each_block(rows, |_, range| {
        rms_in_place_rows(Level::current(), rows, range, x, x_stride, weight, eps)
    });
}

by_level! {
    fn rms_in_place_rows(
        rows: Rows,
        range: Range<usize>,
        x: Shared<f32>,
        x_stride: usize,
        weight: &[f32],
        eps: f32,
    ) {
        for row in range {
            // SAFETY: rows do not overlap (`Rows::check`), and each is in one task's range.
            let x = unsafe { x.part(rows.at(row, x_stride), rows.width) };
            let inv = inverse_rms::<FMA>(x, eps);
            for (x, w) in x.iter_mut().zip(weight) {
                *x = (*x * inv) * w;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    1.0 / (lanes::dot::<FMA>(x, x) / x.len() as f32 + eps).sqrt()
}

/// The backward of [`rms_forward`]: dx is written, or added to when `accumulate`; the gradient of the weight is
/// added into `dweight` \[width\] where one is given.
///
/// `dy`, `x` and `dx` hold `rows` at their strides; `inv_rms` is what the forward saved. Panics when a slice does
/// not fit.
pub fn rms_backward(
    rows: Rows,
    dy: &[f32],
    dy_stride: usize,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    inv_rms: &[f32],
    dx: &mut [f32],
    dx_stride: usize,
    accumulate: bool,
    dweight: Option<&mut [f32]>,
) {
    rms_backward_at(
        Level::current(),
        rows,
        dy,
        dy_stride,
        x,
        x_stride,
        weight,
        inv_rms,
        dx,
        dx_stride,
        accumulate,
        dweight,
    );
}

/// [`rms_backward`] at a given level.
pub fn rms_backward_at(
    level: Level,
    rows: Rows,
    dy: &[f32],
    dy_stride: usize,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    inv_rms: &[f32],
    dx: &mut [f32],
    dx_stride: usize,
    accumulate: bool,
    dweight: Option<&mut [f32]>,
) {
    let _span = profile::span("norms");
    rows.check("dy", dy.len(), dy_stride);
    rows.check("x", x.len(), x_stride);
    rows.check("dx", dx.len(), dx_stride);
    assert_eq!(weight.len(), rows.width, "weight is [width]");
    assert_eq!(inv_rms.len(), rows.count(), "inv_rms is [tokens · heads]");
    let dx = Shared::new(dx);
    with_partials(rows, dweight, None, |range, dweight, _| {
        rms_backward_rows(
            level, rows, range, dy, dy_stride, x, x_stride, weight, inv_rms, dx, dx_stride, accumulate,
            dweight,
        );
    });
}

by_level! {
    fn rms_backward_rows(
        rows: Rows,
        range: Range<usize>,
        dy: &[f32],
        dy_stride: usize,
        x: &[f32],
        x_stride: usize,
        weight: &[f32],
        inv_rms: &[f32],
        dx: Shared<f32>,
        dx_stride: usize,
        accumulate: bool,
        dweight: &mut [f32],
    ) {
        for row in range {
            let dy = &dy[rows.at(row, dy_stride)..][..rows.width];
            let x = &x[rows.at(row, x_stride)..][..rows.width];
            // SAFETY: rows do not overlap (`Rows::check`), and each is in one task's range.
            let dx = unsafe { dx.part(rows.at(row, dx_stride), rows.width) };
            let inv = inv_rms[row];
            for ((dw, dy), x) in dweight.iter_mut().zip(dy).zip(x) {
                *dw = fma::<FMA>(*dy, x * inv, *dw);
            }
            // dx = inv·(w·dy) - x·inv³·mean(w·dy·x)
            let s = dot3::<FMA>(weight, dy, x);
            let back = -(inv * inv * inv) * (s / rows.width as f32);
            if accumulate {
                for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                    *dx += fma::<FMA>(*x, back, (w * dy) * inv);
                }
            } else {
                for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                    *dx = fma::<FMA>(*x, back, (w * dy) * inv);
                }
            }
        }
    }
}

/// y = (x - mean) · inv_std · weight + bias with inv_std = 1 / √(variance + eps), row by row.
///
/// `x` and `y` hold `rows` at their strides, `weight` and `bias` are \[width\]; `mean` and `inv_std` [tokens · heads]
/// are written for the backward. Panics when a slice does not fit.
pub fn layer_forward(
    rows: Rows,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
    y_stride: usize,
    mean: &mut [f32],
    inv_std: &mut [f32],
) {
    layer_forward_at(Level::current(), rows, x, x_stride, weight, bias, eps, y, y_stride, mean, inv_std);
}

/// [`layer_forward`] at a given level.
pub fn layer_forward_at(
    level: Level,
    rows: Rows,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
    y_stride: usize,
    mean: &mut [f32],
    inv_std: &mut [f32],
) {
    let _span = profile::span("norms");
    rows.check("x", x.len(), x_stride);
    rows.check("y", y.len(), y_stride);
    assert_eq!(weight.len(), rows.width, "weight is [width]");
    assert!(bias.is_none_or(|bias| bias.len() == rows.width), "bias is [width]");
    assert_eq!(mean.len(), rows.count(), "mean is [tokens · heads]");
    assert_eq!(inv_std.len(), rows.count(), "inv_std is [tokens · heads]");
    let (y, mean, inv_std) = (Shared::new(y), Shared::new(mean), Shared::new(inv_std));
    for_each_block(rows, |_, range| {
        // SAFETY: each block is one task's.
        let (mean, inv) =
            unsafe { (mean.part(range.start, range.len()), inv_std.part(range.start, range.len())) };
        layer_forward_rows(level, rows, range, x, x_stride, weight, bias, eps, y, y_stride, mean, inv);
    });
}

by_level! {
    fn layer_forward_rows(
        rows: Rows,
        range: Range<usize>,
        x: &[f32],
        x_stride: usize,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
        y: Shared<f32>,
        y_stride: usize,
        mean: &mut [f32],
        inv_std: &mut [f32],
    ) {
        let n = rows.width as f32;
        for ((row, mean), inv_std) in range.zip(mean).zip(inv_std) {
            let x = &x[rows.at(row, x_stride)..][..rows.width];
            // SAFETY: rows do not overlap (`Rows::check`), and each is in one task's range.
            let y = unsafe { y.part(rows.at(row, y_stride), rows.width) };
            let middle = lanes::sum(x) / n;
            for (y, x) in y.iter_mut().zip(x) {
                *y = x - middle;
            }
            let inv = 1.0 / (lanes::dot::<FMA>(y, y) / n + eps).sqrt();
            *mean = middle;
            *inv_std = inv;
            match bias {
                Some(bias) => {
                    for ((y, w), b) in y.iter_mut().zip(weight).zip(bias) {
                        *y = fma::<FMA>(*y * inv, *w, *b);
                    }
                }
                None => {
                    for (y, w) in y.iter_mut().zip(weight) {
                        *y = (*y * inv) * w;
                    }
                }
            }
        }
    }
}

/// The backward of [`layer_forward`]: dx is written, or added to when `accumulate`; the gradients of weight and
/// bias are added into `dweight` and `dbias` \[width\] where they are given.
///
/// `dy`, `x` and `dx` hold `rows` at their strides; `mean` and `inv_std` are what the forward saved. Panics when a
/// slice does not fit.
pub fn layer_backward(
    rows: Rows,
    dy: &[f32],
    dy_stride: usize,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    mean: &[f32],
    inv_std: &[f32],
    dx: &mut [f32],
    dx_stride: usize,
    accumulate: bool,
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    layer_backward_at(
        Level::current(),
        rows,
        dy,
        dy_stride,
        x,
        x_stride,
        weight,
        mean,
        inv_std,
        dx,
        dx_stride,
        accumulate,
        dweight,
        dbias,
    );
}

/// [`layer_backward`] at a given level.
pub fn layer_backward_at(
    level: Level,
    rows: Rows,
    dy: &[f32],
    dy_stride: usize,
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    mean: &[f32],
    inv_std: &[f32],
    dx: &mut [f32],
    dx_stride: usize,
    accumulate: bool,
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    let _span = profile::span("norms");
    rows.check("dy", dy.len(), dy_stride);
    rows.check("x", x.len(), x_stride);
    rows.check("dx", dx.len(), dx_stride);
    assert_eq!(weight.len(), rows.width, "weight is [width]");
    assert_eq!(mean.len(), rows.count(), "mean is [tokens · heads]");
    assert_eq!(inv_std.len(), rows.count(), "inv_std is [tokens · heads]");
    let dx = Shared::new(dx);
    with_partials(rows, dweight, dbias, |range, dweight, dbias| {
        layer_backward_rows(
            level, rows, range, dy, dy_stride, x, x_stride, weight, mean, inv_std, dx, dx_stride, accumulate,
            dweight, dbias,
        );
    });
}

by_level! {
    fn layer_backward_rows(
        rows: Rows,
        range: Range<usize>,
        dy: &[f32],
        dy_stride: usize,
        x: &[f32],
        x_stride: usize,
        weight: &[f32],
        mean: &[f32],
        inv_std: &[f32],
        dx: Shared<f32>,
        dx_stride: usize,
        accumulate: bool,
        dweight: &mut [f32],
        dbias: &mut [f32],
    ) {
        let n = rows.width as f32;
        for row in range {
            let dy = &dy[rows.at(row, dy_stride)..][..rows.width];
            let x = &x[rows.at(row, x_stride)..][..rows.width];
            // SAFETY: rows do not overlap (`Rows::check`), and each is in one task's range.
            let dx = unsafe { dx.part(rows.at(row, dx_stride), rows.width) };
            let (middle, inv) = (mean[row], inv_std[row]);
            for ((dw, dy), x) in dweight.iter_mut().zip(dy).zip(x) {
                *dw = fma::<FMA>(*dy, (x - middle) * inv, *dw);
            }
            for (db, dy) in dbias.iter_mut().zip(dy) {
                *db += dy;
            }
            // With g = w·dy and x̂ = (x - mean)·inv: dx = inv·(g - mean(g) - x̂·mean(g·x̂)).
            let g = lanes::dot::<FMA>(weight, dy) / n;
            let gx = (dot3_centred::<FMA>(weight, dy, x, middle) * inv) / n;
            let slope = -(inv * gx);
            if accumulate {
                for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                    *dx += inv * fma::<FMA>(x - middle, slope, fma::<FMA>(*w, *dy, -g));
                }
            } else {
                for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                    *dx = inv * fma::<FMA>(x - middle, slope, fma::<FMA>(*w, *dy, -g));
                }
            }
        }
    }
}

/// Σ w[i]·a[i]·x[i].
#[inline(always)]
fn dot3<const FMA: bool>(w: &[f32], a: &[f32], x: &[f32]) -> f32 {
    dot3_centred::<FMA>(w, a, x, 0.0)
}

/// Σ w[i]·a[i]·(x[i] - middle).
#[inline(always)]
fn dot3_centred<const FMA: bool>(w: &[f32], a: &[f32], x: &[f32], middle: f32) -> f32 {
    let (ws, w_tail) = w.as_chunks::<{ lanes::LANES }>();
    let (xs, x_tail) = x.as_chunks::<{ lanes::LANES }>();
    let (als, a_tail) = a.as_chunks::<{ lanes::LANES }>();
    let mut sums = [0.0f32; lanes::LANES];
    for ((w, a), x) in ws.iter().zip(als).zip(xs) {
        for l in 0..lanes::LANES {
            sums[l] = fma::<FMA>(w[l] * a[l], x[l] - middle, sums[l]);
        }
    }
    if !w_tail.is_empty() {
        let (w, a, x) = (lanes::padded(w_tail, 0.0), lanes::padded(a_tail, 0.0), lanes::padded(x_tail, 0.0));
        for l in 0..lanes::LANES {
            sums[l] = fma::<FMA>(w[l] * a[l], x[l] - middle, sums[l]);
        }
    }
    lanes::join_sum(sums)
}

/// Runs `task(block, rows of the block)` for every block of rows.
fn for_each_block(rows: Rows, task: impl Fn(usize, Range<usize>) + Sync) {
    let count = rows.count();
    pool::for_each(count.div_ceil(BLOCK), |block| {
        task(block, block * BLOCK..((block + 1) * BLOCK).min(count));
    });
}

/// Runs `task(rows of the block, partial dweight, partial dbias)` for every block of rows and adds the partial sums
/// into the gradients in a fixed tree. A gradient that is not wanted is an empty slice.
fn with_partials(
    rows: Rows,
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
    task: impl Fn(Range<usize>, &mut [f32], &mut [f32]) + Sync,
) {
    let blocks = rows.count().div_ceil(BLOCK);
    let width = |gradient: &Option<&mut [f32]>, what: &str| match gradient {
        Some(gradient) => {
            assert_eq!(gradient.len(), rows.width, "{what} is [width]");
            rows.width
        }
        None => 0,
    };
    let (w, b) = (width(&dweight, "dweight"), width(&dbias, "dbias"));
    let mut partials = Buffer::zeros(blocks * (w + b));
    let (w_partials, b_partials) = partials.split_at_mut(blocks * w);
    {
        let (w_shared, b_shared) = (Shared::new(w_partials), Shared::new(b_partials));
        for_each_block(rows, |block, range| {
            // SAFETY: each block has its own partial sums.
            let (dw, db) = unsafe { (w_shared.part(block * w, w), b_shared.part(block * b, b)) };
            task(range, dw, db);
        });
    }
    if let Some(dweight) = dweight {
        lanes::add_tree(w_partials, dweight);
    }
    if let Some(dbias) = dbias {
        lanes::add_tree(b_partials, dbias);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reference::norm as reference;
    use crate::testing::*;

    /// Rows spread at `stride` after `gap` elements, NaN between them.
    fn spread(rows: Rows, stride: usize, packed: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows.tokens * stride];
        for t in 0..rows.tokens {
            let width = rows.heads * rows.width;
            out[t * stride..][..width].copy_from_slice(&packed[t * width..][..width]);
        }
        out
    }

    fn pack(rows: Rows, stride: usize, spread: &[f32]) -> Vec<f32> {
        (0..rows.tokens).flat_map(|t| spread[t * stride..][..rows.heads * rows.width].to_vec()).collect()
    }

    /// Of each element of RMSNorm's dx [N, width], the sizes of the two terms whose difference it is. In a narrow row they may
    /// cancel to ε · inv² of themselves, and what f32 loses is a part of them, not of the rest.
    fn terms(width: usize, dy: &[f64], x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        let mut out = Vec::new();
        for (dy, x) in dy.chunks(width).zip(x.chunks(width)) {
            let inv = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
            let s = (0..width).map(|i| (w[i] * dy[i] * x[i]).abs()).sum::<f64>() / width as f64;
            out.extend((0..width).map(|i| inv * ((w[i] * dy[i]).abs() + x[i].abs() * inv * inv * s)));
        }
        out
    }

    fn shapes() -> impl Strategy<Value = (Rows, usize, u64)> {
        (0..150usize, 1..4usize, 1..80usize, 0..7usize, any::<u64>()).prop_map(
            |(tokens, heads, width, gap, seed)| (Rows { tokens, heads, width }, heads * width + gap, seed),
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn rms_equals_its_reference((rows, stride, seed) in shapes(), accumulate in any::<bool>()) {
            let mut random = Random(seed);
            let n = rows.count() * rows.width;
            let (x, dy, w) = (random.vec(n, 1.0), random.vec(n, 1.0), random.vec(rows.width, 1.0));
            let start = random.vec(n, 1.0);
            let eps = 1e-5;
            let (want_y, want_inv) = reference::rms_forward(rows.width, &wide(&x), &wide(&w), eps as f64);
            let (mut want_dx, mut want_dw) =
                reference::rms_backward(rows.width, &wide(&dy), &wide(&x), &wide(&w), eps as f64);
            let mut sizes = terms(rows.width, &wide(&dy), &wide(&x), &wide(&w), eps as f64);
            if accumulate {
                want_dx.iter_mut().zip(&start).for_each(|(d, s)| *d += *s as f64);
                sizes.iter_mut().zip(&start).for_each(|(d, s)| *d += s.abs() as f64);
            }
            want_dw.iter_mut().for_each(|d| *d += 1.0);
            let xs = spread(rows, stride, &x);
            for level in Level::available() {
                let mut y = vec![0.0; n];
                let mut inv = vec![0.0; rows.count()];
                rms_forward_at(level, rows, &xs, stride, &w, eps, &mut y, rows.heads * rows.width, &mut inv);
                assert_close("y", &y, &want_y, 2e-6);
                assert_close("inv_rms", &inv, &want_inv, 2e-6);
                let mut dx = spread(rows, stride, &start);
                let mut dw = vec![1.0; rows.width];
                rms_backward_at(
                    level, rows, &dy, rows.heads * rows.width, &xs, stride, &w, &inv, &mut dx, stride, accumulate,
                    Some(&mut dw),
                );
                assert_close_to_terms("dx", &pack(rows, stride, &dx), &want_dx, &sizes, 1e-6);
                assert_close("dweight", &dw, &want_dw, 1e-5);
                // What lies between the rows is not touched.
                prop_assert_eq!(dx.iter().filter(|x| x.is_nan()).count(), dx.len() - n);
            }
            let mut y = vec![0.0; n];
            let mut inv = vec![0.0; rows.count()];
            rms_forward(rows, &xs, stride, &w, eps, &mut y, rows.heads * rows.width, &mut inv);
            let mut in_place = xs.clone();
            rms_in_place(rows, &mut in_place, stride, &w, eps);
            prop_assert_eq!(bits(&pack(rows, stride, &in_place)), bits(&y));
        }

        #[test]
        fn layer_equals_its_reference(
            (rows, stride, seed) in shapes(),
            accumulate in any::<bool>(),
            with_bias in any::<bool>(),
        ) {
            let mut random = Random(seed);
            let n = rows.count() * rows.width;
            let (x, dy, w) = (random.vec(n, 1.0), random.vec(n, 1.0), random.vec(rows.width, 1.0));
            let bias = with_bias.then(|| random.vec(rows.width, 1.0));
            let start = random.vec(n, 1.0);
            // With a narrow row the variance may be near 0, where f32 and f64 part: a large eps keeps them together.
            let eps = 1e-2;
            let want_y =
                reference::layer_forward(rows.width, &wide(&x), &wide(&w), bias.as_deref().map(wide).as_deref(), eps as f64);
            let (mut want_dx, want_dw, want_db) =
                reference::layer_backward(rows.width, &wide(&dy), &wide(&x), &wide(&w), eps as f64);
            if accumulate {
                want_dx.iter_mut().zip(&start).for_each(|(d, s)| *d += *s as f64);
            }
            let xs = spread(rows, stride, &x);
            for level in Level::available() {
                let mut y = spread(rows, stride, &start);
                let (mut mean, mut inv) = (vec![0.0; rows.count()], vec![0.0; rows.count()]);
                layer_forward_at(
                    level, rows, &xs, stride, &w, bias.as_deref(), eps, &mut y, stride, &mut mean, &mut inv,
                );
                assert_close("y", &pack(rows, stride, &y), &want_y, 5e-6);
                let mut dx = spread(rows, stride, &start);
                let (mut dw, mut db) = (vec![0.0; rows.width], vec![0.0; rows.width]);
                layer_backward_at(
                    level, rows, &dy, rows.heads * rows.width, &xs, stride, &w, &mean, &inv, &mut dx, stride,
                    accumulate, Some(&mut dw), with_bias.then_some(&mut db[..]),
                );
                assert_close("dx", &pack(rows, stride, &dx), &want_dx, 1e-5);
                assert_close("dweight", &dw, &want_dw, 1e-5);
                if with_bias {
                    assert_close("dbias", &db, &want_db, 1e-5);
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let rows = Rows::plain(3, 7);
        let mut random = Random(1);
        let (x, w, b) = (random.vec(21, 1.0), random.vec(7, 1.0), random.vec(7, 1.0));
        let dy = random.vec(21, 1.0);
        let eps = 1e-3;

        let (mut y, mut inv) = (vec![0.0; 21], vec![0.0; 3]);
        rms_forward(rows, &x, 7, &w, eps, &mut y, 7, &mut inv);
        let (mut dx, mut dw) = (vec![0.0; 21], vec![0.0; 7]);
        rms_backward(rows, &dy, 7, &x, 7, &w, &inv, &mut dx, 7, false, Some(&mut dw));
        let by_x =
            finite_differences(&x, |x| weighted(&reference::rms_forward(7, x, &wide(&w), eps as f64).0, &dy));
        let by_w =
            finite_differences(&w, |w| weighted(&reference::rms_forward(7, &wide(&x), w, eps as f64).0, &dy));
        assert_close("rms dx", &dx, &by_x, 2e-6);
        assert_close("rms dweight", &dw, &by_w, 2e-6);

        let mut mean = vec![0.0; 3];
        layer_forward(rows, &x, 7, &w, Some(&b), eps, &mut y, 7, &mut mean, &mut inv);
        let mut db = vec![0.0; 7];
        dw.fill(0.0);
        layer_backward(rows, &dy, 7, &x, 7, &w, &mean, &inv, &mut dx, 7, false, Some(&mut dw), Some(&mut db));
        let forward = |x: &[f64], w: &[f64], b: &[f64]| {
            weighted(&reference::layer_forward(7, x, w, Some(b), eps as f64), &dy)
        };
        assert_close("dx", &dx, &finite_differences(&x, |x| forward(x, &wide(&w), &wide(&b))), 5e-6);
        assert_close("dweight", &dw, &finite_differences(&w, |w| forward(&wide(&x), w, &wide(&b))), 5e-6);
        assert_close("dbias", &db, &finite_differences(&b, |b| forward(&wide(&x), &wide(&w), b)), 5e-6);
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let rows = Rows { tokens: 301, heads: 2, width: 37 };
        let mut random = Random(2);
        let (x, dy, w) = (random.vec(301 * 74, 1.0), random.vec(301 * 74, 1.0), random.vec(37, 1.0));
        assert_same_on_any_threads(|| {
            let (mut y, mut inv, mut mean) = (vec![0.0; x.len()], vec![0.0; 602], vec![0.0; 602]);
            let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; 37], vec![0.0; 37]);
            rms_forward(rows, &x, 74, &w, 1e-5, &mut y, 74, &mut inv);
            rms_backward(rows, &dy, 74, &x, 74, &w, &inv, &mut dx, 74, false, Some(&mut dw));
            layer_forward(rows, &y.clone(), 74, &w, Some(&w), 1e-5, &mut y, 74, &mut mean, &mut inv);
            layer_backward(
                rows,
                &dy,
                74,
                &x,
                74,
                &w,
                &mean,
                &inv,
                &mut dx,
                74,
                true,
                Some(&mut dw),
                Some(&mut db),
            );
            [y, dx, dw, db].concat()
        });
    }
}
