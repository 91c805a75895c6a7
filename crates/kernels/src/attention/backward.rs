//! The backward of attention. Queries are a right side, packed once a block of 256 for all tiles of keys: as columns for the scores, of
//! which a tile of keys or values is the left side, and as rows for the gradients of keys and values. Scores come out in panels that,
//! as gradients, are the right side of the next product. The softmax runs down the rows of a panel, a query in each lane.

use super::{BLOCK, Heads, TILE, dot};
use crate::buffers::{Buffer, Lines};
use crate::by_level;
use crate::gemm::columns::{Columns, Panels, Place, panel_len, transpose, width};
use crate::gemm::{Arithmetic, View};
use crate::math::exp;
use crate::pool::Shared;
use std::ops::Range;

/// Rows, and the elements from one to the next.
type Rows<'a> = (&'a [f32], usize);

/// Where the gradients of queries, keys and values go: rows, from columns 0, `k` and `v` on.
pub(super) struct Gradients<'a> {
    pub data: Shared<'a, f32>,
    pub stride: usize,
    pub k: usize,
    pub v: usize,
}

/// Sizes of a block's panels.
#[derive(Clone, Copy)]
struct Sizes {
    /// Queries.
    n: usize,
    /// Queries of a panel.
    nr: usize,
    /// Panels.
    panels: usize,
    /// From a panel of scores to the next.
    scores: usize,
    /// From a panel of D rows to the next.
    wide: usize,
}

impl Sizes {
    fn of(how: Arithmetic, n: usize, d: usize) -> Self {
        let nr = width(how.level);
        Self {
            n,
            nr,
            panels: n.div_ceil(nr),
            scores: panel_len(how.level, TILE),
            wide: panel_len(how.level, d),
        }
    }

    /// The panels of these queries.
    fn of_queries(&self, some: &Range<usize>) -> Range<usize> {
        some.start / self.nr..some.end.div_ceil(self.nr)
    }

    fn in_panels(&self, panel: usize) -> Place {
        Place { stride: self.nr, panel, columns: self.panels * self.nr }
    }
}

/// What the queries of a block see of a tile: keys from, to (exclusive), counted in the tile.
struct Seen {
    from: [i32; BLOCK],
    to: [i32; BLOCK],
}

impl Seen {
    const NOTHING: Self = Self { from: [0; BLOCK], to: [0; BLOCK] };

    /// Of the keys `j0..j0 + cols`, for the queries of `panels`.
    fn fill(&mut self, h: &Heads, i0: usize, sizes: Sizes, panels: &Range<usize>, j0: usize, cols: usize) {
        for r in panels.start * sizes.nr..panels.end * sizes.nr {
            let (from, to) = if r < sizes.n { h.seen(i0 + r) } else { (0, 0) };
            let in_tile = |j: usize| j.saturating_sub(j0).min(cols) as i32;
            (self.from[r], self.to[r]) = (in_tile(from), in_tile(to));
        }
    }

    /// Whether all of these queries see all of the tile.
    fn whole(&self, queries: Range<usize>, cols: usize) -> bool {
        self.from[queries.clone()].iter().all(|from| *from == 0)
            && self.to[queries].iter().all(|to| *to == cols as i32)
    }
}

/// The gradients of the keys and values of a key-value head of a sequence, and of the queries that see them.
pub(super) fn of_keys(
    how: Arithmetic,
    h: Heads,
    b: usize,
    kv_head: usize,
    (q, q_stride): Rows,
    (k, k_stride): Rows,
    (v, v_stride): Rows,
    (out, out_stride): Rows,
    lse: &[f32],
    (d_out, d_out_stride): Rows,
    to: &Gradients,
) {
    let (s, d, level, group) = (h.keys, h.head_dim, how.level, h.heads / h.kv_heads);
    // SAFETY: queries, keys and values of a key-value head of a sequence are one task's, and the parts do not overlap.
    let part = |row: usize, first: usize| unsafe { to.data.part((b * s + row) * to.stride + first, d) };
    let (mut dk, mut dv) = (Buffer::zeros(s * d), Buffer::zeros(s * d));
    let most = Sizes::of(how, BLOCK.min(s), d);
    let scores_len = most.panels * most.scores;
    let (mut p, mut ds, mut space) =
        (Lines::stale(scores_len), Lines::stale(scores_len), Lines::stale(scores_len));
    // The same by rows of keys, a cache line more than a block of queries apart.
    let row = most.panels * most.nr + 16;
    let (mut p_rows, mut ds_rows) = (Lines::stale(TILE * row), Lines::stale(TILE * row));
    let mut dq = Lines::stale(most.panels * most.wide);
    let mut rows = Buffer::stale(most.nr * d);
    let mut seen = Seen::NOTHING;
    for head in kv_head * group..(kv_head + 1) * group {
        for i0 in (0..s).step_by(BLOCK) {
            let i1 = (i0 + BLOCK).min(s);
            let sizes = Sizes::of(how, i1 - i0, d);
            let Sizes { n, nr, .. } = sizes;
            let at = |stride: usize| (b * s + i0) * stride + head * d;
            let (mut delta, mut of_lse) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
            for (r, delta) in delta[..n].iter_mut().enumerate() {
                let o = &out[at(out_stride) + r * out_stride..][..d];
                *delta = dot(level, o, &d_out[at(d_out_stride) + r * d_out_stride..][..d]);
            }
            of_lse[..n].copy_from_slice(&lse[(b * h.heads + head) * s + i0..][..n]);
            let q_view = View::rows(&q[at(q_stride)..], q_stride);
            let do_view = View::rows(&d_out[at(d_out_stride)..], d_out_stride);
            let (q_columns, do_columns) =
                (Columns::pack(how, d, n, q_view.t()), Columns::pack(how, d, n, do_view.t()));
            let (q_across, do_across) = (Columns::pack(how, n, d, q_view), Columns::pack(how, n, d, do_view));
            dq.fill(0.0);
            let (first, end) = (h.seen(i0).0 / TILE * TILE, h.seen(i1 - 1).1);
            for j0 in (first..end).step_by(TILE) {
                let cols = TILE.min(end - j0);
                let some = h.seeing(i0, n, j0, j0 + cols);
                if some.is_empty() {
                    continue;
                }
                let panels = sizes.of_queries(&some);
                let keys = View::rows(&k[(b * s + j0) * k_stride + kv_head * d..], k_stride);
                let values = View::rows(&v[(b * s + j0) * v_stride + kv_head * d..], v_stride);
                let place = sizes.in_panels(sizes.scores);
                q_columns.panels().times(cols, keys, panels.clone(), &mut p, place, false);
                do_columns.panels().times(cols, values, panels.clone(), &mut ds, place, false);
                seen.fill(&h, i0, sizes, &panels, j0, cols);
                for j in panels.clone() {
                    let of = j * nr..(j + 1) * nr;
                    softmax_backward(
                        level,
                        &p[j * sizes.scores..][..cols * nr],
                        &mut ds[j * sizes.scores..][..cols * nr],
                        &mut p_rows[of.start..],
                        &mut ds_rows[of.start..],
                        row,
                        &seen.from[of.clone()],
                        &seen.to[of.clone()],
                        seen.whole(of.clone(), cols),
                        h.scale,
                        &of_lse[of.clone()],
                        &delta[of],
                    );
                }
                // Keys and values from all queries of the panels; columns beyond the last query are none of them.
                let skip = panels.start * nr;
                let by_rows = Place { stride: d, panel: nr, columns: d };
                let all = 0..d.div_ceil(nr);
                let (p_left, ds_left) = (View::rows(&p_rows[skip..], row), View::rows(&ds_rows[skip..], row));
                do_across.panels().after(skip).until(panels.end * nr - skip).times(
                    cols,
                    p_left,
                    all.clone(),
                    &mut dv[j0 * d..],
                    by_rows,
                    true,
                );
                q_across.panels().after(skip).until(panels.end * nr - skip).times(
                    cols,
                    ds_left,
                    all,
                    &mut dk[j0 * d..],
                    by_rows,
                    true,
                );
                let ds = Panels::of_tile(how, cols, &mut ds, sizes.scores, panels.clone(), &mut space);
                ds.times(d, keys.t(), panels, &mut dq, sizes.in_panels(sizes.wide), true);
            }
            for j in 0..sizes.panels {
                let queries = nr.min(n - j * nr);
                transpose(level, &dq[j * sizes.wide..], d, queries, &mut rows, d);
                for (r, row) in rows.chunks_exact(d).take(queries).enumerate() {
                    part(i0 + j * nr + r, head * d).copy_from_slice(row);
                }
            }
        }
    }
    for j in 0..s {
        part(j, to.k + kv_head * d).copy_from_slice(&dk[j * d..][..d]);
        part(j, to.v + kv_head * d).copy_from_slice(&dv[j * d..][..d]);
    }
}

/// Lanes that a loop takes together: a vector of AVX-512, and a divisor of every panel's width but the smallest.
const WIDE: usize = 16;
/// The smallest panel's width.
const NARROW: usize = 8;

/// What a query in each of `W` lanes sees: keys from, to (exclusive); all, where `WHOLE`.
#[derive(Clone, Copy)]
struct Sight<const W: usize, const WHOLE: bool> {
    from: [i32; W],
    to: [i32; W],
}

impl<const W: usize, const WHOLE: bool> Sight<W, WHOLE> {
    #[inline(always)]
    fn of(from: &[i32], to: &[i32], first: usize) -> Self {
        Self { from: some(from, first), to: some(to, first) }
    }

    /// `x` of the lanes that see key `r`, `other` of the others.
    #[inline(always)]
    fn pick(&self, r: usize, x: [f32; W], other: f32) -> [f32; W] {
        if WHOLE {
            return x;
        }
        let (mut picked, r) = (x, r as i32);
        for l in 0..W {
            picked[l] = if (self.from[l] <= r) & (r < self.to[l]) { x[l] } else { other };
        }
        picked
    }
}

/// `W` elements of `x` from `at` on, to be worked on in registers.
#[inline(always)]
fn some<const W: usize, T: Copy>(x: &[T], at: usize) -> [T; W] {
    x[at..at + W].as_chunks().0[0]
}

/// Puts them back. As an array: a copy between slices would be a call.
#[inline(always)]
fn put<const W: usize>(x: &mut [f32], at: usize, some: [f32; W]) {
    x[at..at + W].as_chunks_mut().0[0] = some;
}

by_level! {
    /// From scores `p` and `ds` = dO·Vᵀ, a panel each: the gradients of the scores in `ds`, and both they and the probabilities by rows,
    /// `stride` apart.
    fn softmax_backward(
        p: &[f32],
        ds: &mut [f32],
        p_rows: &mut [f32],
        ds_rows: &mut [f32],
        stride: usize,
        from: &[i32],
        to: &[i32],
        whole: bool,
        scale: f32,
        lse: &[f32],
        delta: &[f32],
    ) {
        let (nr, wide) = (lse.len(), lse.len().is_multiple_of(WIDE));
        for first in (0..nr).step_by(if wide { WIDE } else { NARROW }) {
            match (wide, whole) {
                (true, true) => lanes::<WIDE, true, FMA>(first, p, ds, p_rows, ds_rows, stride, from, to, scale, lse, delta),
                (true, false) => lanes::<WIDE, false, FMA>(first, p, ds, p_rows, ds_rows, stride, from, to, scale, lse, delta),
                (false, true) => lanes::<NARROW, true, FMA>(first, p, ds, p_rows, ds_rows, stride, from, to, scale, lse, delta),
                (false, false) => lanes::<NARROW, false, FMA>(first, p, ds, p_rows, ds_rows, stride, from, to, scale, lse, delta),
            }
        }
    }
}

#[inline(always)]
fn lanes<const W: usize, const WHOLE: bool, const FMA: bool>(
    first: usize,
    p: &[f32],
    ds: &mut [f32],
    p_rows: &mut [f32],
    ds_rows: &mut [f32],
    stride: usize,
    from: &[i32],
    to: &[i32],
    scale: f32,
    lse: &[f32],
    delta: &[f32],
) {
    let (nr, sight) = (lse.len(), Sight::<W, WHOLE>::of(from, to, first));
    let (lse, delta): ([f32; W], [f32; W]) = (some(lse, first), some(delta, first));
    for r in 0..p.len() / nr {
        let at = r * nr + first;
        let (mut e, mut d): ([f32; W], [f32; W]) = (some(p, at), some(ds, at));
        for l in 0..W {
            e[l] = exp::<FMA>(e[l] * scale - lse[l]);
            d[l] = e[l] * (d[l] - delta[l]) * scale;
        }
        let (e, d) = (sight.pick(r, e, 0.0), sight.pick(r, d, 0.0));
        put(ds, at, d);
        put(p_rows, r * stride + first, e);
        put(ds_rows, r * stride + first, d);
    }
}
