//! Matrix products with sums in f32: one blocked kernel behind dense and ragged grouped products.
//!
//! Each element of a result is one chain of multiply-adds in the order of k, starting from 0 (or from what C
//! holds). Threads and blocks cut rows and columns, never k; so the bits of an element depend on its row of A and
//! its column of B alone, not on how many rows, groups or threads there are.
//!
//! With [`Precision::Bf16`] both sides are rounded while they are packed: for dot products of bf16 into pairs of steps, which
//! then take the place of the steps, else as f32 that bf16 has too.
//!
//! A task (see `cut.rs`) computes a block of C of at most `MAX_N` columns and, where C is visited more than once or A is packed
//! across, `MAX_M` rows. It walks k in steps of `KC`: the block of B is packed into panels of as many columns as the
//! micro-kernel has lanes (they stay in the second-level cache), then each panel of a few rows of A is packed
//! (first-level cache) and met with all of them. Packing is also where rows are gathered (tokens of an expert),
//! scaled (gate weights), rounded and transposed. What needs none of that is met where it lies: rows of A along which k runs, unless
//! they share a set of the cache, and with AVX-512 rows of B, where a block has whole panels of them and they are not far apart.

pub(crate) mod columns;
mod cut;
mod micro;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pairs;

use crate::blocks::{bf16_to_f32, dequantize_at, f32_to_bf16};
use crate::by_level;
use crate::elements::{Elements, Matrix};
use crate::layout::extent;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;
use cut::{Block, cut};
use micro::{Left, Right};
use pack::Scratch;

/// Steps of k between two visits to C.
pub(crate) const KC: usize = 512;
/// Rows of C in one task whose A is packed across or that visits C more than once, at most (a multiple of every micro-kernel's rows).
pub(crate) const MAX_M: usize = 504;
/// Columns of C in one task, at most (a multiple of every micro-kernel's columns).
pub(crate) const MAX_N: usize = 512;

/// What the elements of both sides of a product are rounded to before they are multiplied. Sums are f32 in either case, and
/// so is what is in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// To bf16, the nearest, ties to even; with dot products of bf16 where the level has them (two steps of k at a time).
    Bf16,
}

/// With which instructions, and how exactly, products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// The instructions.
    pub level: Level,
    /// How exactly.
    pub precision: Precision,
}

impl From<Level> for Arithmetic {
    fn from(level: Level) -> Self {
        Self { level, precision: Precision::F32 }
    }
}

impl From<Precision> for Arithmetic {
    fn from(precision: Precision) -> Self {
        Self { level: Level::current(), precision }
    }
}

/// A matrix seen through strides: element (i, j) is `data[i * row_stride + j * col_stride]`; one of the two is 1.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `stride` elements each, one after another.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

/// One side of a [`Product`]: lines of contiguous elements, each `stride` after the one before.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// The elements of all lines; those of A are ready for use.
    pub data: Elements<'a>,
    /// From one line to the next: elements, or bytes of coded ones.
    pub stride: usize,
    /// Line i is the line `gather[i]` of `data`.
    pub gather: Option<&'a [u32]>,
    /// Line i is multiplied by `scale[i]`.
    pub scale: Option<&'a [f32]>,
    /// Along a line runs k (else the rows of A, or the columns of B).
    pub k_inner: bool,
}

impl<'a> Operand<'a> {
    /// Lines along which k runs: rows of A, or columns of B (a weight of shape \[out, in\]).
    pub fn k_inner(data: &'a [f32], stride: usize) -> Self {
        Self { data: Elements::F32(data), stride, gather: None, scale: None, k_inner: true }
    }

    /// The rows of a weight \[out, in\], along which k runs: `x · Wᵀ`.
    pub fn weight(w: Matrix<'a>) -> Self {
        Self { data: w.data, stride: w.stride, gather: None, scale: None, k_inner: true }
    }

    /// The rows of a weight \[out, in\], across k: `x · W`.
    pub fn weight_across(w: Matrix<'a>) -> Self {
        Self { k_inner: false, ..Self::weight(w) }
    }

    /// Lines across k: line p holds row p of B, or column p of A.
    pub fn k_outer(data: &'a [f32], stride: usize) -> Self {
        Self { data: Elements::F32(data), stride, gather: None, scale: None, k_inner: false }
    }

    /// The same with its lines picked by index.
    pub fn gathered(self, lines: &'a [u32]) -> Self {
        Self { gather: Some(lines), ..self }
    }

    /// The same with each line multiplied by a number of its own.
    pub fn scaled(self, factors: &'a [f32]) -> Self {
        Self { scale: Some(factors), ..self }
    }

    /// Line `i` from element `start` on, `len` of them. Panics where they are coded.
    #[inline(always)]
    fn line(&self, i: usize, start: usize, len: usize) -> &'a [f32] {
        let line = self.gather.map_or(i, |lines| lines[i] as usize);
        match self.data {
            Elements::F32(data) => &data[line * self.stride + start..][..len],
            Elements::Coded(..) => panic!("coded elements are decoded first"),
        }
    }

    /// From element `start` of line `i` on, where lines are multiplied as they lie; else they must be packed.
    fn plain(&self, how: How, i: usize, start: usize) -> Option<&'a [f32]> {
        match self.data {
            Elements::F32(data)
                if !how.pairs && !how.rounded && self.gather.is_none() && self.scale.is_none() =>
            {
                data.get(i * self.stride + start..)
            }
            _ => None,
        }
    }

    /// Decodes elements `start..start + out.len()` of line `i`.
    fn decode(&self, i: usize, start: usize, out: &mut [f32]) {
        let line = self.gather.map_or(i, |lines| lines[i] as usize);
        match self.data {
            Elements::F32(data) => out.copy_from_slice(&data[line * self.stride + start..][..out.len()]),
            Elements::Coded(ty, bytes) => {
                let block = ty.block_len();
                let line = &bytes[line * self.stride..];
                if start.is_multiple_of(block) && out.len().is_multiple_of(block) {
                    dequantize_at(ty, line, start, out);
                } else {
                    // The blocks that the part lies in.
                    let first = start / block * block;
                    let mut whole = vec![0.0; (start + out.len()).next_multiple_of(block) - first];
                    dequantize_at(ty, line, first, &mut whole);
                    out.copy_from_slice(&whole[start - first..][..out.len()]);
                }
            }
        }
    }

    fn of_a(view: View<'a>) -> Self {
        if view.col_stride == 1 {
            Self::k_inner(view.data, view.row_stride)
        } else {
            assert_eq!(view.row_stride, 1, "one stride of a view is 1");
            Self::k_outer(view.data, view.col_stride)
        }
    }

    fn of_b(view: View<'a>) -> Self {
        if view.col_stride == 1 {
            Self::k_outer(view.data, view.row_stride)
        } else {
            assert_eq!(view.row_stride, 1, "one stride of a view is 1");
            Self::k_inner(view.data, view.col_stride)
        }
    }
}

/// `C [m, n] = A [m, k] · B [k, n]`, or `C += A · B`, with C at `c_start` in a slice shared by several products.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// Rows of C.
    pub m: usize,
    /// Columns of C; with `twin`, of each half.
    pub n: usize,
    /// Length of each sum.
    pub k: usize,
    /// The left side.
    pub a: Operand<'a>,
    /// The right side.
    pub b: Operand<'a>,
    /// Where C begins.
    pub c_start: usize,
    /// Elements from one row of C to the next.
    pub c_stride: usize,
    /// Add to C.
    pub accumulate: bool,
    /// Columns j and `j + twin` are computed by the same task, for an epilogue that joins them (gate and up).
    pub twin: Option<usize>,
    /// The B of the second half, where it is another than columns `twin..` of the first's.
    pub twin_b: Option<Operand<'a>>,
}

/// A few finished rows of a block of C, for an epilogue while they are still in the cache.
pub struct Tile<'a> {
    /// Which product.
    pub product: usize,
    /// Rows of C.
    pub rows: std::ops::Range<usize>,
    /// Columns of C (of the first half, with a twin).
    pub cols: std::ops::Range<usize>,
    c: Shared<'a, f32>,
    c_start: usize,
    c_stride: usize,
    twin: usize,
}

impl Tile<'_> {
    /// The part of row `row` (of the product) that lies in this tile.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row));
        // SAFETY: tiles do not overlap, and `&mut self` keeps this the only part taken from this one.
        unsafe { self.c.part(self.c_start + row * self.c_stride + self.cols.start, self.cols.len()) }
    }

    /// The part of row `row` in this tile, and its twin.
    pub fn row_pair(&mut self, row: usize) -> (&mut [f32], &mut [f32]) {
        assert!(self.rows.contains(&row) && self.twin >= self.cols.len());
        let start = self.c_start + row * self.c_stride + self.cols.start;
        // SAFETY: as in `row`; the halves are `twin` apart, so they do not overlap each other.
        unsafe { (self.c.part(start, self.cols.len()), self.c.part(start + self.twin, self.cols.len())) }
    }
}

/// `C [m, n] = A [m, k] · B [k, n]` on the calling thread alone, or `C += A · B` when `accumulate`; the rows of C
/// are `c_stride` apart. Each element is one chain of multiply-adds in the order of k, starting from 0 or from C.
pub fn serial(
    m: usize,
    n: usize,
    k: usize,
    a: View,
    b: View,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    serial_at(Level::current(), m, n, k, a, b, c, c_stride, accumulate);
}

/// [`serial`] with other arithmetic.
pub fn serial_at(
    arithmetic: impl Into<Arithmetic>,
    m: usize,
    n: usize,
    k: usize,
    a: View,
    b: View,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let product = Product {
        m,
        n,
        k,
        a: Operand::of_a(a),
        b: Operand::of_b(b),
        c_start: 0,
        c_stride,
        accumulate,
        twin: None,
        twin_b: None,
    };
    check(&product, c.len());
    let shared = Shared::new(c);
    let how = How::of(arithmetic.into());
    for m0 in (0..m).step_by(MAX_M) {
        for n0 in (0..n).step_by(MAX_N) {
            let block = Block { product: 0, m0, m1: (m0 + MAX_M).min(m), n0, n1: (n0 + MAX_N).min(n) };
            run_block(how, &product, &block, shared, &|_: Tile| {});
        }
    }
}

/// As [`serial_at`], on all threads of the pool, with the same bits.
pub fn parallel(
    arithmetic: impl Into<Arithmetic>,
    m: usize,
    n: usize,
    k: usize,
    a: View,
    b: View,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let (a, b) = (Operand::of_a(a), Operand::of_b(b));
    let product = Product { m, n, k, a, b, c_start: 0, c_stride, accumulate, twin: None, twin_b: None };
    run_all(arithmetic, &[product], c, |_| {});
}

/// Runs all products on the threads of the pool as one list of tasks; `epilogue` gets each tile of C once, when its
/// elements are done. The parts of C that the products write must not overlap.
///
/// Panics when an operand or C is too short for its product.
pub fn run_all(
    arithmetic: impl Into<Arithmetic>,
    products: &[Product],
    c: &mut [f32],
    epilogue: impl Fn(Tile) + Sync,
) {
    let _span = profile::span(profile::PRODUCTS);
    let how = How::of(arithmetic.into());
    let blocks = cut(how, products, rayon::current_num_threads());
    for product in products {
        check(product, c.len());
    }
    let shared = Shared::new(c);
    pool::for_each(blocks.len(), |index| {
        let block = &blocks[index];
        run_block(how, &products[block.product], block, shared, &epilogue);
    });
}

/// How elements are packed and multiplied.
#[derive(Clone, Copy)]
struct How {
    level: Level,
    /// Pairs of bf16, for dot products of them.
    pairs: bool,
    /// Elements are rounded to bf16 after packing, and multiplied as f32.
    rounded: bool,
}

impl How {
    fn of(arithmetic: Arithmetic) -> Self {
        let level = arithmetic.level.min(Level::detected());
        let bf16 = arithmetic.precision == Precision::Bf16;
        let pairs = bf16 && level.has_bf16_dots();
        Self { level, pairs, rounded: bf16 && !pairs }
    }

    /// For one product: coded elements have no packing in pairs.
    fn for_product(self, p: &Product) -> Self {
        let coded = [Some(p.b), p.twin_b].iter().flatten().any(|b| matches!(b.data, Elements::Coded(..)));
        if coded { Self { pairs: false, rounded: self.rounded || self.pairs, ..self } } else { self }
    }

    /// Steps of k between two visits to C.
    fn steps(self) -> usize {
        if self.pairs { 2 * KC } else { KC }
    }
}

/// Panics when a slice is too short: the packing relies on it only for its messages, the stores to C for soundness.
fn check(p: &Product, c_len: usize) {
    if p.m == 0 || p.n == 0 {
        return;
    }
    let width = p.n + p.twin.unwrap_or(0);
    assert!(p.twin.is_none_or(|twin| twin >= p.n), "the halves of a product with twins overlap");
    assert!(p.c_stride >= width || p.m == 1, "rows of C overlap: stride {} for {width} columns", p.c_stride);
    let end = extent(p.m, p.c_stride, width).and_then(|rows| rows.checked_add(p.c_start));
    assert!(end.is_some_and(|end| end <= c_len), "C has {c_len} elements, the product needs {end:?}");
}

/// Computes one block, calling `epilogue` for each panel of rows.
fn run_block(how: How, p: &Product, block: &Block, c: Shared<f32>, epilogue: &(impl Fn(Tile) + Sync)) {
    let how = how.for_product(p);
    let level = how.level;
    let (mr, nr) = micro::shape(level);
    let (m, n) = (block.m1 - block.m0, block.n1 - block.n0);
    let halves = 1 + usize::from(p.twin.is_some());
    let panels = n.div_ceil(nr);
    pack::with_scratch(|scratch: Scratch| {
        let mut k0 = 0;
        loop {
            let kc = how.steps().min(p.k - k0);
            // What the micro-kernel takes for a step.
            let steps = if how.pairs { kc.div_ceil(2) } else { kc };
            let suits = halves == 1 && n.is_multiple_of(nr) && micro::suits_right(level, p.b.stride);
            let plain_b = if suits && !p.b.k_inner { p.b.plain(how, k0, block.n0) } else { None };
            for half in 0..halves {
                if plain_b.is_some() {
                    break;
                }
                let (b, first) = match &p.twin_b {
                    Some(twin) if half == 1 => (twin, block.n0),
                    _ => (&p.b, block.n0 + half * p.twin.unwrap_or(0)),
                };
                let into = &mut scratch.b[half * panels * pack::panel_of_b(nr)..];
                pack_b(how, b, k0, kc, first, n, nr, pack::panel_of_b(nr), into);
            }
            if !p.a.k_inner {
                pack_a_across(how, &p.a, k0, kc, block.m0, m, mr, scratch.a);
            }
            let last = k0 + kc == p.k;
            let load = p.accumulate || k0 > 0;
            for (panel, i0) in (0..m).step_by(mr).enumerate() {
                let rows = mr.min(m - i0);
                let left = match p.a.k_inner {
                    true => a_along(how, &p.a, k0, kc, block.m0 + i0, rows, scratch.a),
                    false => Left::Columns(&scratch.a[panel * pack::panel_of_a(mr)..]),
                };
                for half in 0..halves {
                    let shift = half * p.twin.unwrap_or(0);
                    for (j, j0) in (0..n).step_by(nr).enumerate() {
                        if p.a.k_inner && half == 0 && j < mr && i0 + mr + j < m {
                            // The rows of the next panel come from far away: one is asked for with each tile.
                            pack::prefetch(p.a.line(block.m0 + i0 + mr + j, k0, kc));
                        }
                        let cols = nr.min(n - j0);
                        let right = match plain_b {
                            Some(rows) => {
                                Right { rows: rows.get(j0..).unwrap_or_default(), stride: p.b.stride }
                            }
                            None => {
                                let panel = (half * panels + j) * pack::panel_of_b(nr);
                                Right { rows: &scratch.b[panel..][..steps * nr], stride: nr }
                            }
                        };
                        let start = p.c_start + (block.m0 + i0) * p.c_stride + block.n0 + j0 + shift;
                        let tile = micro::Target { c, start, stride: p.c_stride, rows, cols, load };
                        micro::run(level, how.pairs, steps, left, right, tile);
                    }
                }
                if last {
                    epilogue(Tile {
                        product: block.product,
                        rows: block.m0 + i0..block.m0 + i0 + rows,
                        cols: block.n0..block.n1,
                        c,
                        c_start: p.c_start,
                        c_stride: p.c_stride,
                        twin: p.twin.unwrap_or(0),
                    });
                }
            }
            k0 += kc;
            if last {
                break;
            }
        }
    });
}

/// Columns of B into panels, `panel` after one another.
fn pack_b(
    how: How,
    b: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    n: usize,
    nr: usize,
    panel: usize,
    into: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if how.pairs {
        return pairs::b(b, k0, kc, first, n, panel, into);
    }
    pack::b(how.level, b, k0, kc, first, n, nr, panel, into);
    if how.rounded {
        into.chunks_exact_mut(panel)
            .take(n.div_ceil(nr))
            .for_each(|panel| round(how.level, &mut panel[..kc * nr]));
    }
}

/// Rows of A across whose lines k runs, into panels.
fn pack_a_across(
    how: How,
    a: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    m: usize,
    mr: usize,
    into: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if how.pairs {
        return pairs::a_across(a, k0, kc, first, m, into);
    }
    pack::a_across(how.level, a, k0, kc, first, m, mr, into);
    if how.rounded {
        let panels = into.chunks_exact_mut(pack::panel_of_a(mr)).take(m.div_ceil(mr));
        panels.for_each(|panel| round(how.level, &mut panel[..kc * pack::step_of_a(mr)]));
    }
}

/// A few rows of A along which k runs: as they lie, or else packed into `space`.
fn a_along<'a>(
    how: How,
    a: &Operand<'a>,
    k0: usize,
    kc: usize,
    first: usize,
    rows: usize,
    space: &'a mut [f32],
) -> Left<'a> {
    if micro::suits_left(a.stride)
        && let Some(lines) = a.plain(how, first, k0)
    {
        return Left::Rows(lines, a.stride);
    }
    #[cfg(target_arch = "x86_64")]
    if how.pairs {
        pairs::a_along(a, k0, kc, first, rows, space);
        return Left::Rows(space, KC);
    }
    pack::a_along(a, k0, kc, first, rows, space);
    if how.rounded {
        space.chunks_exact_mut(KC).take(rows).for_each(|row| round(how.level, &mut row[..kc]));
    }
    Left::Rows(space, KC)
}

by_level! {
    /// Each element becomes the nearest that bf16 has.
    fn round(x: &mut [f32]) {
        for x in x {
            *x = bf16_to_f32(f32_to_bf16(*x));
        }
    }
}

#[cfg(test)]
mod tests;
