//! The innermost loops: a few rows of A against one panel of B, with the sums in registers.

use super::KC;
use super::pack::step_of_a;
use crate::layout::extent;
use crate::pool::Shared;
use crate::simd::Level;
#[cfg(target_arch = "x86_64")]
use x86::{avx2, avx512, avx512_bf16};

/// Rows and columns of one micro-kernel. `MAX_M` and `MAX_N` are multiples of each.
pub(super) fn shape(level: Level) -> (usize, usize) {
    match level {
        Level::Avx512 | Level::Avx512Bf16 => (14, 32),
        Level::Avx2 => (6, 16),
        Level::Portable => (4, 8),
    }
}

/// The elements of C that a call computes.
pub(super) struct Target<'a> {
    pub c: Shared<'a, f32>,
    /// First element.
    pub start: usize,
    /// Elements from row to row.
    pub stride: usize,
    /// At most the micro-kernel's.
    pub rows: usize,
    /// At most the micro-kernel's.
    pub cols: usize,
    /// Start the sums from C.
    pub load: bool,
}

/// A few rows of A.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Rows along which k runs, each so many elements after the one before.
    Rows(&'a [f32], usize),
    /// Packed columns of the kernel's height ([`step_of_a`]).
    Columns(&'a [f32]),
}

/// Rows of B, of which the kernel's width is meant, each `stride` elements after the one before: of a packed panel, or where they lie.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub rows: &'a [f32],
    pub stride: usize,
}

/// Whether rows of B so many elements apart may be met where they lie, which pays with AVX-512 alone. The rows that are asked for ahead of
/// their use fall into few sets of the first-level cache where they are far apart: of 4 KiB, into one.
pub(super) fn suits_right(level: Level, stride: usize) -> bool {
    level >= Level::Avx512 && (1..=512).contains(&stride)
}

/// Whether rows of A so many elements apart may be met where they lie: at multiples of 4 KiB they all fall into one set of the first-level
/// cache.
pub(super) fn suits_left(stride: usize) -> bool {
    !stride.is_multiple_of(1024)
}

/// Adds `kc` steps. With `pairs`, which only AVX-512 with BF16 has, every element is two of bf16.
#[inline]
pub(super) fn run(level: Level, pairs: bool, kc: usize, a: Left, b: Right, to: Target) {
    let (mr, nr) = shape(level);
    debug_assert!(to.rows <= mr && to.cols <= nr);
    let within = |len: usize, end: Option<usize>| end.is_some_and(|end| end <= len);
    assert!(kc <= KC && within(b.rows.len(), extent(kc, b.stride, nr)));
    assert!(match a {
        Left::Rows(rows, stride) => within(rows.len(), extent(to.rows, stride, kc)),
        Left::Columns(columns) => columns.len() >= kc * step_of_a(mr),
    });
    if to.cols == nr {
        let c = to.c.rows(to.start, to.rows, to.stride, nr);
        // SAFETY: C has these rows, and this tile is of one task's block alone.
        unsafe { tile(level, pairs, to.rows, kc, a, b, c, to.stride, to.load) };
        return;
    }
    // The last columns go through a tile of full width.
    let mut whole = [0.0f32; 14 * 32];
    if to.load {
        for i in 0..to.rows {
            // SAFETY: as above; no other part of this task is alive.
            let row = unsafe { to.c.part(to.start + i * to.stride, to.cols) };
            whole[i * nr..][..to.cols].copy_from_slice(row);
        }
    }
    // SAFETY: there is room for as many rows as a kernel has.
    unsafe { tile(level, pairs, to.rows, kc, a, b, whole.as_mut_ptr(), nr, to.load) };
    for i in 0..to.rows {
        // SAFETY: as above.
        let row = unsafe { to.c.part(to.start + i * to.stride, to.cols) };
        row.copy_from_slice(&whole[i * nr..][..to.cols]);
    }
}

/// Picks the micro-kernel for the number of rows.
///
/// # Safety
/// Lengths of `a` and `b` as checked in [`run`]; `c` has `rows` rows of the kernel's width that are nobody else's.
unsafe fn tile(
    level: Level,
    pairs: bool,
    rows: usize,
    kc: usize,
    a: Left,
    b: Right,
    c: *mut f32,
    stride: usize,
    load: bool,
) {
    macro_rules! by_rows {
        ($kernel:ident, $($r:literal)*) => {
            match (rows, a) {
                $(
                    // SAFETY: the level is the machine's (`run_all` lowers it); all else by the caller's promise.
                    ($r, Left::Rows(a, apart)) => unsafe { $kernel::<$r, true>(kc, a, apart, b, c, stride, load) },
                    // SAFETY: as above.
                    ($r, Left::Columns(a)) => unsafe { $kernel::<$r, false>(kc, a, 0, b, c, stride, load) },
                )*
                _ => {}
            }
        };
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 if pairs => by_rows!(avx512_bf16, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => by_rows!(avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => by_rows!(avx2, 1 2 3 4 5 6),
        _ => by_rows!(portable, 1 2 3 4),
    }
}

/// Element (r, p) of A: of rows that are `apart`, or of packed columns.
#[inline(always)]
fn at<const A_ROWS: bool>(r: usize, p: usize, mr: usize, apart: usize) -> usize {
    if A_ROWS { r * apart + p } else { p * step_of_a(mr) + r }
}

/// 4 × 8, in plain arithmetic.
///
/// # Safety
/// `c` has `R` rows of 8.
unsafe fn portable<const R: usize, const A_ROWS: bool>(
    kc: usize,
    a: &[f32],
    apart: usize,
    b: Right,
    c: *mut f32,
    stride: usize,
    load: bool,
) {
    // SAFETY: by the caller's promise; rows do not overlap.
    let row = |r: usize| unsafe { std::slice::from_raw_parts_mut(c.add(r * stride), 8) };
    let mut sums = [[0.0f32; 8]; R];
    if load {
        for (r, sum) in sums.iter_mut().enumerate() {
            sum.copy_from_slice(row(r));
        }
    }
    for (p, y) in b.rows.chunks(b.stride.max(1)).map(|row| &row[..8]).take(kc).enumerate() {
        for (r, sum) in sums.iter_mut().enumerate() {
            let x = a[at::<A_ROWS>(r, p, 4, apart)];
            for (s, y) in sum.iter_mut().zip(y) {
                *s += x * y;
            }
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        row(r).copy_from_slice(sum);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Right, at};

    use std::arch::x86_64::*;

    /// B comes from the second-level cache: how far ahead of its use it is asked for, in rows. Where it lies as it was given, fewer of
    /// them fall into one set of the first-level cache; as much is gained.
    fn ahead(stride: usize) -> usize {
        if stride == 32 { 16 * stride } else { 8 * stride }
    }

    /// 14 × 32: 28 sums, two vectors of B, one of A; a step adds `$add(x, y, sum)`.
    macro_rules! kernel512 {
        ($(#[$meta:meta])* $name:ident, $features:literal, |$x:ident, $y:ident, $sum:ident| $add:expr) => {
            $(#[$meta])*
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<const R: usize, const A_ROWS: bool>(
                kc: usize,
                a: &[f32],
                apart: usize,
                b: Right,
                c: *mut f32,
                stride: usize,
                load: bool,
            ) {
                // SAFETY: every address is within the slices by the caller's promise.
                unsafe {
                    let (ahead, apart_b) = (ahead(b.stride), b.stride);
                    let (a, mut b) = (a.as_ptr(), b.rows.as_ptr());
                    let mut sums = [[_mm512_setzero_ps(); 2]; R];
                    for (r, sum) in sums.iter_mut().enumerate() {
                        if load {
                            sum[0] = _mm512_loadu_ps(c.add(r * stride));
                            sum[1] = _mm512_loadu_ps(c.add(r * stride + 16));
                            // The tile beside this one is next: its lines come from memory meanwhile.
                            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(r * stride + 32) as *const i8);
                            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(r * stride + 48) as *const i8);
                        } else {
                            // The stores at the end would wait for these lines.
                            _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride) as *const i8);
                            _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride + 16) as *const i8);
                        }
                    }
                    for p in 0..kc {
                        _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(ahead) as *const i8);
                        _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(ahead + 16) as *const i8);
                        let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                        for (r, sum) in sums.iter_mut().enumerate() {
                            let x = _mm512_set1_ps(*a.add(at::<A_ROWS>(r, p, 14, apart)));
                            let ($x, $y, $sum) = (x, b0, sum[0]);
                            sum[0] = $add;
                            let ($x, $y, $sum) = (x, b1, sum[1]);
                            sum[1] = $add;
                        }
                        b = b.wrapping_add(apart_b);
                    }
                    for (r, sum) in sums.iter().enumerate() {
                        _mm512_storeu_ps(c.add(r * stride), sum[0]);
                        _mm512_storeu_ps(c.add(r * stride + 16), sum[1]);
                    }
                }
            }
        };
    }

    kernel512! {
        /// Products of f32.
        ///
        /// # Safety
        /// AVX-512 F; `a`, `b` and `c` long enough for `R` rows, `kc` steps and 32 columns.
        avx512, "avx512f", |x, y, sum| _mm512_fmadd_ps(x, y, sum)
    }

    kernel512! {
        /// Products of pairs of bf16: elements of `a` and `b` are two of them.
        ///
        /// # Safety
        /// As for [`avx512`], and AVX-512 BF16.
        avx512_bf16, "avx512f,avx512bf16", |x, y, sum| {
            // The bits of vectors of f32 are those of pairs.
            let x = std::mem::transmute::<__m512, __m512bh>(x);
            let y = std::mem::transmute::<__m512, __m512bh>(y);
            _mm512_dpbf16_ps(sum, x, y)
        }
    }

    /// 6 × 16: 12 sums, two vectors of B, one of A.
    ///
    /// # Safety
    /// AVX2 and FMA; `a`, `b` and `c` long enough for `R` rows, `kc` steps and 16 columns.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<const R: usize, const A_ROWS: bool>(
        kc: usize,
        a: &[f32],
        apart: usize,
        b: Right,
        c: *mut f32,
        stride: usize,
        load: bool,
    ) {
        // SAFETY: every address is within the slices by the caller's promise.
        unsafe {
            let apart_b = b.stride;
            let (a, mut b) = (a.as_ptr(), b.rows.as_ptr());
            let mut sums = [[_mm256_setzero_ps(); 2]; R];
            for (r, sum) in sums.iter_mut().enumerate() {
                if load {
                    sum[0] = _mm256_loadu_ps(c.add(r * stride));
                    sum[1] = _mm256_loadu_ps(c.add(r * stride + 8));
                    // The tile beside this one is next: its lines come from memory meanwhile.
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(r * stride + 16) as *const i8);
                } else {
                    _mm_prefetch::<_MM_HINT_T0>(c.add(r * stride) as *const i8);
                }
            }
            for p in 0..kc {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, sum) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(at::<A_ROWS>(r, p, 6, apart)));
                    sum[0] = _mm256_fmadd_ps(x, b0, sum[0]);
                    sum[1] = _mm256_fmadd_ps(x, b1, sum[1]);
                }
                b = b.wrapping_add(apart_b);
            }
            for (r, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * stride), sum[0]);
                _mm256_storeu_ps(c.add(r * stride + 8), sum[1]);
            }
        }
    }
}
