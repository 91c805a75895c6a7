//! Causal attention with grouped key-value heads, by tiles: the S×S scores never exist at once.
//!
//! Forward is the online softmax of FlashAttention (2205.14135): for a block of queries, tile after tile of keys, a running
//! maximum, a running sum and a rescaled output. Backward recomputes the probabilities of a tile from the saved log-sum-exp.
//!
//! Tiles of keys begin at multiples of [`TILE`] whatever the queries are, and each row's arithmetic is its own: a token
//! gets the same bits alone, with a cache before it, or in the midst of a whole sequence. In forward a tile of keys is packed for its products
//! once a block of queries, so blocks are as large as the number of tasks allows, and of a block only the queries that see
//! something of a tile are computed. Backward packs the queries: see `backward.rs`.
//!
//! With [`Precision::Bf16`](crate::gemm::Precision) the sides of all products are rounded as they are packed: queries, keys, values, unnormalised
//! probabilities, gradients. The softmax and all sums are f32.

use crate::buffers::Buffer;
use crate::by_level;
use crate::gemm::{Arithmetic, View, serial_at};
use crate::lanes;
use crate::layout::extent;
use crate::math::exp;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;
use backward::Gradients;

mod backward;

/// Keys of a tile.
pub const TILE: usize = 64;
/// Queries of a block, at most.
const BLOCK: usize = 256;

/// The sizes of an attention. Query i of a sequence is token `keys - queries + i` and sees the keys up to itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// B, sequences.
    pub batch: usize,
    /// Queries of each sequence.
    pub queries: usize,
    /// Keys of each sequence, at least as many.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; query head h uses head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// A query sees itself and this many minus one keys before it.
    pub window: Option<usize>,
    /// Factor on the scores.
    pub scale: f32,
}

impl Heads {
    /// Keys that query `i` sees: from, to (exclusive).
    fn seen(&self, i: usize) -> (usize, usize) {
        let end = self.keys - self.queries + i + 1;
        (self.window.map_or(0, |window| end.saturating_sub(window)), end)
    }

    /// Of the queries from `first` on, those that see something of keys `from..to`: numbers from 0 to `count`.
    fn seeing(&self, first: usize, count: usize, from: usize, to: usize) -> std::ops::Range<usize> {
        let before_keys = self.keys - self.queries;
        let begin = from.saturating_sub(before_keys + first).min(count);
        // The last query whose window reaches back to the last key of the tile.
        let last = self
            .window
            .map_or(usize::MAX, |window| to.saturating_add(window - 1).saturating_sub(before_keys + first));
        begin..last.min(count).max(begin)
    }

    /// Queries of a block, such that there are some tasks for each thread.
    fn block(&self, heads: usize) -> usize {
        let tasks = |block: usize| self.batch * heads * self.queries.div_ceil(block);
        let enough = 4 * rayon::current_num_threads();
        let mut block = BLOCK;
        while block > TILE && tasks(block) < enough {
            block /= 2;
        }
        block
    }

    fn check(&self) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "heads are a multiple of kv_heads"
        );
        assert!(self.keys >= self.queries, "there are fewer keys than queries");
        assert!(self.window != Some(0), "a window holds at least the token itself");
        assert!(self.head_dim > 0, "heads have a width");
    }
}

fn check_rows(what: &str, len: usize, rows: usize, stride: usize, width: usize) {
    assert!(width <= stride, "{what}: stride {stride} below {width}");
    assert!(
        extent(rows, stride, width).is_some_and(|end| end <= len),
        "{what}: {len} elements for {rows} rows of {stride}"
    );
}

/// `out` \[B·Sq, heads·D\] and the log-sum-exp of each row's scores `lse` \[B, heads, Sq\], from queries \[B·Sq, heads·D\], keys
/// and values \[B·Sk, kv_heads·D\], each with rows at its own stride.
///
/// Panics when a slice is too short for its rows.
pub fn forward(
    h: Heads,
    q: &[f32],
    q_stride: usize,
    k: &[f32],
    k_stride: usize,
    v: &[f32],
    v_stride: usize,
    out: &mut [f32],
    out_stride: usize,
    lse: &mut [f32],
) {
    forward_at(Level::current(), h, q, q_stride, k, k_stride, v, v_stride, out, out_stride, lse);
}

/// [`forward`] with other arithmetic.
pub fn forward_at(
    arithmetic: impl Into<Arithmetic>,
    h: Heads,
    q: &[f32],
    q_stride: usize,
    k: &[f32],
    k_stride: usize,
    v: &[f32],
    v_stride: usize,
    out: &mut [f32],
    out_stride: usize,
    lse: &mut [f32],
) {
    let _span = profile::span("attention");
    let how = arithmetic.into();
    let level = how.level;
    h.check();
    let d = h.head_dim;
    check_rows("q", q.len(), h.batch * h.queries, q_stride, h.heads * d);
    check_rows("k", k.len(), h.batch * h.keys, k_stride, h.kv_heads * d);
    check_rows("v", v.len(), h.batch * h.keys, v_stride, h.kv_heads * d);
    check_rows("out", out.len(), h.batch * h.queries, out_stride, h.heads * d);
    assert_eq!(lse.len(), h.batch * h.heads * h.queries, "lse is [B, heads, Sq]");
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    // A single query: heads that share keys are the rows of a block, and a tile of keys is packed once for all of them.
    let group = h.heads / h.kv_heads;
    let joint = if h.queries == 1 && group <= TILE { group } else { 1 };
    let heads = h.heads / joint;
    let block_rows = h.block(heads);
    let blocks = h.queries.div_ceil(block_rows);
    pool::for_each(h.batch * heads * blocks, |task| {
        // Later blocks see more keys: they go first.
        let (block, rest) = (blocks - 1 - task / (h.batch * heads), task % (h.batch * heads));
        let (b, head) = (rest / heads, rest % heads * joint);
        let kv_head = head / group;
        let (i0, i1) = (block * block_rows, ((block + 1) * block_rows).min(h.queries));
        // Which query and head a row is.
        let of = |r: usize| if joint > 1 { (0, head + r) } else { (i0 + r, head) };
        let (rows, q_rows) = if joint > 1 { (joint, d) } else { (i1 - i0, q_stride) };
        let q = View::rows(&q[(b * h.queries + i0) * q_stride + head * d..], q_rows);
        let mut scores = Buffer::stale(block_rows.max(joint) * TILE);
        let mut o = Buffer::zeros(rows * d);
        let (mut greatest, mut sums) = ([f32::NEG_INFINITY; BLOCK], [0.0f32; BLOCK]);
        let (first, end) = (h.seen(i0).0 / TILE * TILE, h.seen(i1 - 1).1);
        for j0 in (first..end).step_by(TILE) {
            let cols = TILE.min(end - j0);
            let some = if joint > 1 { 0..rows } else { h.seeing(i0, rows, j0, j0 + cols) };
            if some.is_empty() {
                continue;
            }
            let q = View::rows(&q.data[some.start * q_rows..], q_rows);
            let k = View::rows(&k[(b * h.keys + j0) * k_stride + kv_head * d..], k_stride);
            let part = &mut scores[some.start * TILE..];
            serial_at(how, some.len(), cols, d, q, k.t(), part, TILE, false);
            for r in some.clone() {
                let (from, to) = h.seen(of(r).0);
                let seen = from.saturating_sub(j0).min(cols)..to.saturating_sub(j0).min(cols);
                let row = &mut scores[r * TILE..][..cols];
                let (m, s, factor) = online_softmax(level, row, seen, h.scale, greatest[r], sums[r]);
                (greatest[r], sums[r]) = (m, s);
                if factor != 1.0 {
                    multiply(level, &mut o[r * d..][..d], factor);
                }
            }
            let v = View::rows(&v[(b * h.keys + j0) * v_stride + kv_head * d..], v_stride);
            let p = View::rows(&scores[some.start * TILE..], TILE);
            serial_at(how, some.len(), d, cols, p, v, &mut o[some.start * d..], d, true);
        }
        for r in 0..rows {
            let row = &mut o[r * d..][..d];
            multiply(level, row, 1.0 / sums[r]);
            let (i, head) = of(r);
            // SAFETY: each (sequence, head, query) is one task's.
            let (to, to_lse) = unsafe {
                (
                    out.part((b * h.queries + i) * out_stride + head * d, d),
                    lse.part((b * h.heads + head) * h.queries + i, 1),
                )
            };
            to.copy_from_slice(row);
            to_lse[0] = greatest[r] + sums[r].ln();
        }
    });
}

/// Backward of [`forward`] with as many queries as keys: from `d_out` \[B·S, heads·D\] the gradients of queries, keys and
/// values, written into the rows of `d` (`d_stride` apart) from the columns 0, `d_k` and `d_v` on.
///
/// Panics when a slice is too short for its rows, or the three parts of `d` overlap.
pub fn backward(
    h: Heads,
    q: &[f32],
    q_stride: usize,
    k: &[f32],
    k_stride: usize,
    v: &[f32],
    v_stride: usize,
    out: &[f32],
    out_stride: usize,
    lse: &[f32],
    d_out: &[f32],
    d_out_stride: usize,
    d: &mut [f32],
    d_stride: usize,
    d_k: usize,
    d_v: usize,
) {
    backward_at(
        Level::current(),
        h,
        q,
        q_stride,
        k,
        k_stride,
        v,
        v_stride,
        out,
        out_stride,
        lse,
        d_out,
        d_out_stride,
        d,
        d_stride,
        d_k,
        d_v,
    );
}

/// [`backward`] with other arithmetic.
pub fn backward_at(
    arithmetic: impl Into<Arithmetic>,
    h: Heads,
    q: &[f32],
    q_stride: usize,
    k: &[f32],
    k_stride: usize,
    v: &[f32],
    v_stride: usize,
    out: &[f32],
    out_stride: usize,
    lse: &[f32],
    d_out: &[f32],
    d_out_stride: usize,
    d: &mut [f32],
    d_stride: usize,
    d_k: usize,
    d_v: usize,
) {
    let _span = profile::span("attention");
    let how = arithmetic.into();
    h.check();
    assert_eq!(h.queries, h.keys, "backward takes whole sequences");
    let (s, dim) = (h.queries, h.head_dim);
    let (a, c) = (h.heads * dim, h.kv_heads * dim);
    check_rows("q", q.len(), h.batch * s, q_stride, a);
    check_rows("k", k.len(), h.batch * s, k_stride, c);
    check_rows("v", v.len(), h.batch * s, v_stride, c);
    check_rows("out", out.len(), h.batch * s, out_stride, a);
    check_rows("d_out", d_out.len(), h.batch * s, d_out_stride, a);
    check_rows("d", d.len(), h.batch * s, d_stride, d_v.max(d_k) + c);
    assert!(a <= d_k && (d_k + c <= d_v || d_v + c <= d_k) && a <= d_v, "the parts of d overlap");
    assert_eq!(lse.len(), h.batch * h.heads * s, "lse is [B, heads, S]");
    let (q, k, v, d_out) = ((q, q_stride), (k, k_stride), (v, v_stride), (d_out, d_out_stride));
    let d = Gradients { data: Shared::new(d), stride: d_stride, k: d_k, v: d_v };
    pool::for_each(h.batch * h.kv_heads, |task| {
        let (b, kv_head) = (task / h.kv_heads, task % h.kv_heads);
        backward::of_keys(how, h, b, kv_head, q, k, v, (out, out_stride), lse, d_out, &d);
    });
}

by_level! {
    /// One row's scores of a tile to unnormalised probabilities, 0 where nothing is `seen`, under the running maximum;
    /// returns the new maximum and sum, and the factor by which all before shrinks.
    fn online_softmax(
        row: &mut [f32],
        seen: std::ops::Range<usize>,
        scale: f32,
        greatest: f32,
        sum: f32,
    ) -> (f32, f32, f32) {
        let new = lanes::larger(greatest, lanes::max(&row[seen.clone()]) * scale);
        for x in row.iter_mut() {
            *x = exp::<FMA>(*x * scale - new);
        }
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        let factor = if greatest == new { 1.0 } else { exp::<FMA>(greatest - new) };
        (new, sum * factor + lanes::sum(row), factor)
    }
}

by_level! {
    fn multiply(row: &mut [f32], by: f32) {
        for x in row {
            *x *= by;
        }
    }
}

by_level! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        lanes::dot::<FMA>(a, b)
    }
}

#[cfg(test)]
mod tests;
