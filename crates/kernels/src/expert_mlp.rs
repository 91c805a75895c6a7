//! The MLPs of all experts of a layer, over the rows that a [`Dispatch`] gives each: forward and backward.
//!
//! Forward: for the rows of each expert, `pre = x·W_upᵀ` with the gate beside it, `a = act(gate) · up` while both are in
//! the cache, `down = a·W_downᵀ`, and for each token the weighted sum of its rows. Experts without rows cost nothing.
//! With [`Dispatch::whole`] these are the kernels of a dense MLP.
//!
//! Shapes: T tokens, K slots, N rows, E experts, H hidden, I intermediate; P = 2·I when gated (gate, then up), else I.
//! Source of the gated form: Shazeer 2020 (2002.05202).

use crate::activation::{self, Activation};
use crate::buffers::Buffer;
use crate::by_level;
use crate::dispatch::{Dispatch, EMPTY};
use crate::elements::Matrix;
use crate::gemm::{self, Arithmetic, Operand, Product};
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;

/// Rows that one task of an element-wise pass takes.
const ROWS: usize = 64;

/// What all experts of a layer have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// The non-linearity.
    pub activation: Activation,
    /// Has a gate beside the up projection.
    pub gated: bool,
}

impl Shape {
    /// P: outputs of the first product.
    pub fn pre(&self) -> usize {
        if self.gated { 2 * self.intermediate } else { self.intermediate }
    }
}

/// The first half: `x` \[T, H\], `w` the experts' matrices, E of \[P, H\] or, gate and up apart, 2·E of \[I, H\], `bias` \[E, P\] (none: 0) → `pre` \[N, P\], `a` \[N, I\].
pub fn up(
    arithmetic: impl Into<Arithmetic>,
    d: &Dispatch,
    s: Shape,
    x: &[f32],
    w: &[Matrix],
    bias: Option<&[f32]>,
    pre: &mut [f32],
    a: &mut [f32],
) {
    let arithmetic = arithmetic.into();
    let level = arithmetic.level;
    let (h, i, p) = (s.hidden, s.intermediate, s.pre());
    expect("x", x.len(), d.tokens * h);
    let apart = s.gated && w.len() == 2 * d.experts();
    expect("w", w.len(), if apart { 2 * d.experts() } else { d.experts() });
    assert!(w.iter().all(|w| (w.rows, w.cols) == (if apart { i } else { p }, h)), "w is [E, P, H]");
    expect("pre", pre.len(), d.rows() * p);
    expect("a", a.len(), d.rows() * i);
    if let Some(bias) = bias {
        expect("the bias", bias.len(), d.experts() * p);
    }
    let products: Vec<Product> = d
        .touched()
        .map(|e| {
            let rows = d.rows_of(e);
            let (b, twin_b) = match apart {
                true => (w[2 * e], Some(Operand::weight(w[2 * e + 1]))),
                false => (w[e], None),
            };
            Product {
                m: rows.len(),
                n: i,
                k: h,
                a: from_tokens(d, x, h, rows.clone(), true),
                b: Operand::weight(b),
                c_start: rows.start * p,
                c_stride: p,
                accumulate: false,
                twin: s.gated.then_some(i),
                twin_b,
            }
        })
        .collect();
    // First row, and the bias, of the expert of each product.
    let of: Vec<(usize, Option<&[f32]>)> =
        d.touched().map(|e| (d.rows_of(e).start, bias.map(|bias| &bias[e * p..][..p]))).collect();
    let a = Shared::new(a);
    gemm::run_all(arithmetic, &products, pre, |mut tile| {
        let cols = tile.cols.clone();
        let (first, bias) = of[tile.product];
        for row in tile.rows.clone() {
            // SAFETY: tiles do not overlap, so neither do the parts of `a` that lie under them.
            let out = unsafe { a.part((first + row) * i + cols.start, cols.len()) };
            if s.gated {
                let (gate, up) = tile.row_pair(row);
                if let Some(bias) = bias {
                    add(gate, &bias[cols.clone()]);
                    add(up, &bias[i + cols.start..i + cols.end]);
                }
                activation::gated(level, s.activation, gate, up, out);
            } else {
                let pre = tile.row(row);
                if let Some(bias) = bias {
                    add(pre, &bias[cols.clone()]);
                }
                activation::plain(level, s.activation, pre, out);
            }
        }
    });
}

/// `x += bias`.
fn add(x: &mut [f32], bias: &[f32]) {
    x.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
}

/// Backward of [`up`] (the gradient of a bias is not made): `da` \[N, I\] is the gradient of `a`; `pre` is overwritten by its own gradient; `dx` \[T, H\] is
/// written, and `dw` \[E, P, H\] is added to where it is wanted.
pub fn up_backward(
    arithmetic: impl Into<Arithmetic>,
    d: &Dispatch,
    s: Shape,
    x: &[f32],
    w: &[f32],
    pre: &mut [f32],
    da: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let _span = profile::span("experts, around products");
    let arithmetic = arithmetic.into();
    let level = arithmetic.level;
    let (h, i, p) = (s.hidden, s.intermediate, s.pre());
    expect("x", x.len(), d.tokens * h);
    expect("w", w.len(), d.experts() * p * h);
    expect("pre", pre.len(), d.rows() * p);
    expect("da", da.len(), d.rows() * i);
    expect("dx", dx.len(), d.tokens * h);
    in_blocks(pre, p, |first, block| {
        for (r, row) in block.chunks_exact_mut(p).enumerate() {
            let d_row = &da[(first + r) * i..][..i];
            if s.gated {
                let (gate, up) = row.split_at_mut(i);
                activation::gated_backward(level, s.activation, d_row, gate, up);
            } else {
                activation::plain_backward(level, s.activation, d_row, row);
            }
        }
    });
    let d_pre = &*pre;
    let products = |c: &mut [f32]| {
        let products: Vec<Product> = d
            .touched()
            .map(|e| {
                let rows = d.rows_of(e);
                Product {
                    m: rows.len(),
                    n: h,
                    k: p,
                    a: Operand::k_inner(&d_pre[rows.start * p..][..rows.len() * p], p),
                    b: Operand::k_outer(&w[e * p * h..][..p * h], h),
                    c_start: rows.start * h,
                    c_stride: h,
                    accumulate: false,
                    twin: None,
                    twin_b: None,
                }
            })
            .collect();
        gemm::run_all(arithmetic, &products, c, |_| {});
    };
    if d.is_identity() {
        products(dx);
    } else {
        let mut rows = Buffer::stale(d.rows() * h);
        products(&mut rows);
        combine(level, d, &rows, None, dx, h);
    }
    if let Some(dw) = dw {
        expect("dw", dw.len(), d.experts() * p * h);
        let products: Vec<Product> = d
            .touched()
            .map(|e| {
                let rows = d.rows_of(e);
                Product {
                    m: p,
                    n: h,
                    k: rows.len(),
                    a: Operand::k_outer(&d_pre[rows.start * p..][..rows.len() * p], p),
                    b: from_tokens(d, x, h, rows, false),
                    c_start: e * p * h,
                    c_stride: h,
                    accumulate: true,
                    twin: None,
                    twin_b: None,
                }
            })
            .collect();
        gemm::run_all(arithmetic, &products, dw, |_| {});
    }
}

/// The second half: `a` \[N, I\], `w` the experts' matrices \[H, I\], `bias` \[E, H\] (none: 0), `weights` \[T, K\] (none: all 1) → `y` \[T, H\], the
/// weighted sum of each token's rows, in the order of its slots.
pub fn down(
    arithmetic: impl Into<Arithmetic>,
    d: &Dispatch,
    s: Shape,
    a: &[f32],
    w: &[Matrix],
    bias: Option<&[f32]>,
    weights: Option<&[f32]>,
    y: &mut [f32],
) {
    let arithmetic = arithmetic.into();
    let level = arithmetic.level;
    let (h, i) = (s.hidden, s.intermediate);
    expect("a", a.len(), d.rows() * i);
    expect("w", w.len(), d.experts());
    assert!(w.iter().all(|w| (w.rows, w.cols) == (h, i)), "w is [E, H, I]");
    expect("y", y.len(), d.tokens * h);
    if let Some(bias) = bias {
        expect("the bias", bias.len(), d.experts() * h);
    }
    let of: Vec<usize> = d.touched().collect();
    let products = |c: &mut [f32]| {
        let products: Vec<Product> = d
            .touched()
            .map(|e| {
                let rows = d.rows_of(e);
                Product {
                    m: rows.len(),
                    n: h,
                    k: i,
                    a: Operand::k_inner(&a[rows.start * i..][..rows.len() * i], i),
                    b: Operand::weight(w[e]),
                    c_start: rows.start * h,
                    c_stride: h,
                    accumulate: false,
                    twin: None,
                    twin_b: None,
                }
            })
            .collect();
        gemm::run_all(arithmetic, &products, c, |mut tile| {
            let Some(bias) = bias else { return };
            let (cols, at) = (tile.cols.clone(), of[tile.product] * h);
            for row in tile.rows.clone() {
                add(tile.row(row), &bias[at + cols.start..at + cols.end]);
            }
        });
    };
    if d.is_identity() && weights.is_none() {
        products(y);
    } else {
        let mut rows = Buffer::stale(d.rows() * h);
        products(&mut rows);
        combine(level, d, &rows, weights, y, h);
    }
}

/// Backward of [`down`] (the gradient of a bias is not made): `dy` \[T, H\] → `da` \[N, I\] written, `d_weights` \[T, K\] written (0 in empty slots) where there
/// are weights, `dw` \[E, H, I\] added to where it is wanted.
pub fn down_backward(
    arithmetic: impl Into<Arithmetic>,
    d: &Dispatch,
    s: Shape,
    a: &[f32],
    w: &[f32],
    weights: Option<&[f32]>,
    dy: &[f32],
    da: &mut [f32],
    d_weights: Option<&mut [f32]>,
    dw: Option<&mut [f32]>,
) {
    let _span = profile::span("experts, around products");
    let arithmetic = arithmetic.into();
    let level = arithmetic.level;
    let (h, i) = (s.hidden, s.intermediate);
    expect("a", a.len(), d.rows() * i);
    expect("w", w.len(), d.experts() * h * i);
    expect("dy", dy.len(), d.tokens * h);
    expect("da", da.len(), d.rows() * i);
    let row_weights: Option<Vec<f32>> = weights.map(|weights| {
        expect("weights", weights.len(), d.tokens * d.slots);
        d.slot_of_row.iter().map(|&slot| weights[slot as usize]).collect()
    });
    if let Some(dw) = dw {
        expect("dw", dw.len(), d.experts() * h * i);
        let products: Vec<Product> = d
            .touched()
            .map(|e| {
                let rows = d.rows_of(e);
                let dy = from_tokens(d, dy, h, rows.clone(), false);
                Product {
                    m: h,
                    n: i,
                    k: rows.len(),
                    a: row_weights.as_ref().map_or(dy, |weights| dy.scaled(&weights[rows.clone()])),
                    b: Operand::k_outer(&a[rows.start * i..][..rows.len() * i], i),
                    c_start: e * h * i,
                    c_stride: i,
                    accumulate: true,
                    twin: None,
                    twin_b: None,
                }
            })
            .collect();
        gemm::run_all(arithmetic, &products, dw, |_| {});
    }
    let products: Vec<Product> = d
        .touched()
        .map(|e| {
            let rows = d.rows_of(e);
            Product {
                m: rows.len(),
                n: i,
                k: h,
                a: from_tokens(d, dy, h, rows.clone(), true),
                b: Operand::k_outer(&w[e * h * i..][..h * i], i),
                c_start: rows.start * i,
                c_stride: i,
                accumulate: false,
                twin: None,
                twin_b: None,
            }
        })
        .collect();
    gemm::run_all(arithmetic, &products, da, |_| {});
    let Some(row_weights) = row_weights else { return };
    // Here `da` is still the gradient of an unweighted row: its product with `a` is the weight's gradient.
    let mut dots = vec![0.0; d.rows()];
    let shared = Shared::new(&mut dots);
    in_blocks(da, i, |first, block| {
        for (r, row) in block.chunks_exact_mut(i).enumerate() {
            // SAFETY: one element a row, and each row is one task's.
            let dot = unsafe { shared.part(first + r, 1) };
            dot[0] = dot_and_scale(level, row, &a[(first + r) * i..][..i], row_weights[first + r]);
        }
    });
    if let Some(d_weights) = d_weights {
        expect("d_weights", d_weights.len(), d.tokens * d.slots);
        for (out, &row) in d_weights.iter_mut().zip(&d.row_of_slot) {
            *out = if row == EMPTY { 0.0 } else { dots[row as usize] };
        }
    }
}

/// `y` \[T, H\] = for each token the sum of its rows, times their weights, in the order of the slots.
pub(crate) fn combine(
    level: Level,
    d: &Dispatch,
    rows: &[f32],
    weights: Option<&[f32]>,
    y: &mut [f32],
    h: usize,
) {
    let _span = profile::span("combine");
    if let Some(weights) = weights {
        expect("weights", weights.len(), d.tokens * d.slots);
    }
    in_blocks(y, h, |first, block| {
        for (t, out) in block.chunks_exact_mut(h).enumerate() {
            out.fill(0.0);
            for k in 0..d.slots {
                let slot = (first + t) * d.slots + k;
                let row = d.row_of_slot[slot];
                if row != EMPTY {
                    let weight = weights.map_or(1.0, |weights| weights[slot]);
                    add_scaled(level, &rows[row as usize * h..][..h], weight, out);
                }
            }
        }
    });
}

by_level! {
    /// `into += by · x`.
    fn add_scaled(x: &[f32], by: f32, into: &mut [f32]) {
        for (y, x) in into.iter_mut().zip(x) {
            *y = crate::math::fma::<FMA>(*x, by, *y);
        }
    }
}

by_level! {
    /// Σ row·other, and then `row *= by`. The sum runs over sixteen lanes, joined pairwise.
    fn dot_and_scale(row: &mut [f32], other: &[f32], by: f32) -> f32 {
        let mut lanes = [0.0f32; 16];
        let whole = row.len() - row.len() % 16;
        for (x, y) in row[..whole].chunks_exact_mut(16).zip(other.chunks_exact(16)) {
            for j in 0..16 {
                lanes[j] = crate::math::fma::<FMA>(x[j], y[j], lanes[j]);
                x[j] *= by;
            }
        }
        for (j, (x, y)) in row[whole..].iter_mut().zip(&other[whole..]).enumerate() {
            lanes[j] = crate::math::fma::<FMA>(*x, *y, lanes[j]);
            *x *= by;
        }
        for half in [8, 4, 2, 1] {
            for j in 0..half {
                lanes[j] += lanes[j + half];
            }
        }
        lanes[0]
    }
}

/// Rows of tokens' vectors as one side of a product: those of the given rows of the dispatch.
fn from_tokens<'a>(
    d: &'a Dispatch,
    x: &'a [f32],
    width: usize,
    rows: std::ops::Range<usize>,
    k_inner: bool,
) -> Operand<'a> {
    let operand = if k_inner { Operand::k_inner(x, width) } else { Operand::k_outer(x, width) };
    if d.is_identity() { operand } else { operand.gathered(&d.token_of_row[rows]) }
}

/// Calls `work(first row, rows)` for blocks of rows `width` wide, on all threads.
fn in_blocks(data: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 {
        return;
    }
    let rows = data.len() / width;
    let shared = Shared::new(data);
    pool::for_each(rows.div_ceil(ROWS), |block| {
        let first = block * ROWS;
        // SAFETY: blocks do not overlap.
        work(first, unsafe { shared.part(first * width, ROWS.min(rows - first) * width) });
    });
}

fn expect(name: &str, found: usize, expected: usize) {
    assert_eq!(found, expected, "{name} has {found} elements, expected {expected}");
}

#[cfg(test)]
mod tests;
