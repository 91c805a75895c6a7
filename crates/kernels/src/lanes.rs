//! Sums and maxima over slices in a fixed number of lanes, so that they vectorise and still give the same bits
//! at every vector width: element i always goes to lane i mod [`LANES`], and lanes join in one fixed tree.

use crate::math::fma;

/// Lanes of a reduction: two AVX-512 registers, which hides the latency of an addition.
pub(crate) const LANES: usize = 32;

/// `s` followed by `fill` up to a whole set of lanes.
///
/// A tail is handled as a padded chunk and not lane by lane: an accumulator that is indexed with a variable would
/// live in memory for the whole loop.
#[inline(always)]
pub(crate) fn padded(s: &[f32], fill: f32) -> [f32; LANES] {
    let mut out = [fill; LANES];
    out[..s.len()].copy_from_slice(s);
    out
}

/// The sum of the lanes, halves onto halves.
#[inline(always)]
pub(crate) fn join_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ f(a[i], b[i]), where f(0, 0) must be 0 (of any sign). Panics unless `b` is as long as `a`.
#[inline(always)]
fn sum2(a: &[f32], b: &[f32], step: impl Fn(f32, f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len());
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] = step(lanes[l], a[l], b[l]);
        }
    }
    if !a_tail.is_empty() {
        let (a, b) = (padded(a_tail, 0.0), padded(b_tail, 0.0));
        for l in 0..LANES {
            lanes[l] = step(lanes[l], a[l], b[l]);
        }
    }
    join_sum(lanes)
}

/// Σ a[i]·b[i].
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    sum2(a, b, |sum, a, b| fma::<FMA>(a, b, sum))
}

/// Σ a[i].
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    sum2(a, a, |sum, a, _| sum + a)
}

/// The largest element, -∞ of none; a NaN is passed over.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let (chunks, tail) = a.as_chunks::<LANES>();
    let mut lanes = padded(tail, f32::NEG_INFINITY);
    for l in 0..LANES {
        lanes[l] = larger(f32::NEG_INFINITY, lanes[l]);
    }
    for a in chunks {
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], a[l]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = larger(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger of two, `a` when `b` is NaN: one instruction, unlike `f32::max`.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Adds the rows of `partials` [n, width] in a fixed binary tree and the result into `out` [width]; the rows are
/// overwritten.
pub(crate) fn add_tree(partials: &mut [f32], out: &mut [f32]) {
    let width = out.len();
    if width == 0 || partials.is_empty() {
        return;
    }
    let rows = partials.len() / width;
    let mut step = 1;
    while step < rows {
        let mut row = 0;
        while row + step < rows {
            let (left, right) = partials.split_at_mut((row + step) * width);
            for (a, b) in left[row * width..][..width].iter_mut().zip(&right[..width]) {
                *a += *b;
            }
            row += 2 * step;
        }
        step *= 2;
    }
    for (o, p) in out.iter_mut().zip(&partials[..width]) {
        *o += *p;
    }
}

/// The sum of `partials` in a fixed binary tree; 0 of none. They are overwritten.
pub(crate) fn sum_tree(partials: &mut [f64]) -> f64 {
    let mut step = 1;
    while step < partials.len() {
        let mut at = 0;
        while at + step < partials.len() {
            partials[at] += partials[at + step];
            at += 2 * step;
        }
        step *= 2;
    }
    partials.first().copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_cover_every_element_at_every_length() {
        for len in 0..100 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 7.3) % 11.0 - 5.0).collect();
            let exact: f64 = a.iter().map(|&x| x as f64).sum();
            let square: f64 = a.iter().map(|&x| x as f64 * x as f64).sum();
            assert!((sum(&a) as f64 - exact).abs() < 1e-4);
            assert!((dot::<true>(&a, &a) as f64 - square).abs() < 1e-2);
            assert!((dot::<false>(&a, &a) as f64 - square).abs() < 1e-2);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        assert_eq!(max(&[f32::NAN, 1.0]), 1.0);
    }

    #[test]
    fn trees_add_everything_once() {
        for rows in 0..20 {
            let mut partials: Vec<f32> = (0..rows * 3).map(|i| i as f32).collect();
            let mut out = vec![1.0f32; 3];
            let want: Vec<f32> =
                (0..3).map(|c| 1.0 + (0..rows).map(|r| (r * 3 + c) as f32).sum::<f32>()).collect();
            add_tree(&mut partials, &mut out);
            assert_eq!(out, want);
            let mut partials: Vec<f64> = (0..rows).map(|i| i as f64).collect();
            assert_eq!(sum_tree(&mut partials), (0..rows).map(|i| i as f64).sum());
        }
    }
}
