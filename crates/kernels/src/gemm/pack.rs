//! Packing: operands copied into the order in which the micro-kernels read them.

use super::{KC, MAX_M, MAX_N, Operand};
use crate::elements::Elements;
use crate::simd::Level;
use std::cell::RefCell;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{lanes, transpose16};

/// Elements from one column of a panel of A to the next: whole cache lines, where the kernel has about as many rows.
pub(super) const fn step_of_a(mr: usize) -> usize {
    if mr == 14 { 16 } else { mr }
}

/// Elements from one panel of an A that was packed across to the next: a multiple of 4 KiB would put the same column of
/// all panels into one set of the first-level cache.
pub(super) const fn panel_of_a(mr: usize) -> usize {
    step_of_a(mr) * KC + 16
}

/// Elements for the panels of a block of A, of whatever height.
const A: usize = MAX_M / 14 * panel_of_a(14);
const _: () = assert!(MAX_M / 6 * panel_of_a(6) <= A && MAX_M / 4 * panel_of_a(4) <= A);

/// Elements from one panel of B to the next, likewise: a line of B goes to all panels.
pub(super) const fn panel_of_b(nr: usize) -> usize {
    nr * KC + 16
}

/// Elements for the panels of a block of B, of whatever width. `MAX_N` is a multiple of them, and so is its half, which each half of a
/// pair has at most.
const B: usize = {
    let (mut most, mut nr) = (0, 8);
    while nr <= 32 {
        let size = MAX_N / nr * panel_of_b(nr);
        most = if size > most { size } else { most };
        nr *= 2;
    }
    most
};

/// What one thread packs into.
pub(super) struct Scratch<'a> {
    /// A: one panel of rows `KC` apart, or all panels of a block.
    pub a: &'a mut [f32],
    /// B: all panels of a block, each at the start of a cache line.
    pub b: &'a mut [f32],
}

/// Lends the thread's scratch space.
pub(super) fn with_scratch<R>(work: impl FnOnce(Scratch) -> R) -> R {
    /// Elements in a cache line: a vector of B across two lines would take two loads.
    const LINE: usize = 16;
    thread_local! {
        static SPACE: RefCell<Vec<f32>> =
            RefCell::new(vec![0.0; A + B + LINE]);
    }
    SPACE.with_borrow_mut(|space| {
        let aligned = space.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let (b, a) = space[aligned..].split_at_mut(B);
        work(Scratch { a, b })
    })
}

/// Rows `first..first + rows` of an A along whose lines k runs: each row `KC` after the one before.
pub(super) fn a_along(a: &Operand, k0: usize, kc: usize, first: usize, rows: usize, into: &mut [f32]) {
    for (r, out) in into.chunks_exact_mut(KC).take(rows).enumerate() {
        let line = a.line(first + r, k0, kc);
        copy(line, a.scale.map(|scale| scale[first + r]), &mut out[..kc]);
    }
}

/// Rows `first..first + m` of an A whose lines lie across k: panels of `mr` rows, each a column after another.
pub(super) fn a_across(
    level: Level,
    a: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    m: usize,
    mr: usize,
    into: &mut [f32],
) {
    // Copies of a length known to the compiler are a few instructions; others are calls.
    match mr {
        14 => across::<14>(level, a, k0, kc, first, m, panel_of_a(mr), into),
        6 => across::<6>(level, a, k0, kc, first, m, panel_of_a(mr), into),
        _ => across::<4>(level, a, k0, kc, first, m, panel_of_a(mr), into),
    }
}

/// Lines across k: panels of `W` of their elements, `panel` after one another, the last filled up with zeros (of a panel of A, what is
/// between its columns means nothing). A line is read once, in order; its parts, each a cache line or two, go to all panels.
fn across<const W: usize>(
    level: Level,
    x: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    n: usize,
    panel: usize,
    into: &mut [f32],
) {
    for p in 0..kc {
        if p + 4 < kc {
            prefetch(x.line(k0 + p + 4, first, n));
        }
        let scale = x.scale.map(|scale| scale[k0 + p]);
        let line = x.line(k0 + p, first, n);
        #[cfg(target_arch = "x86_64")]
        if level >= Level::Avx512 {
            // SAFETY: the level is the machine's.
            unsafe { x86::spread::<W>(line, scale, &mut into[p * step_of_a(W)..], panel) };
            continue;
        }
        let _ = level;
        let (parts, rest) = line.as_chunks::<W>();
        let mut at = p * step_of_a(W);
        for part in parts {
            copy(part, scale, &mut into[at..][..W]);
            at += panel;
        }
        if !rest.is_empty() {
            let (some, none) = into[at..][..W].split_at_mut(rest.len());
            copy(rest, scale, some);
            none.fill(0.0);
        }
    }
}

/// Asks for the cache lines of `line`.
#[inline]
pub(super) fn prefetch(line: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for chunk in line.chunks(16) {
        // SAFETY: SSE is part of x86-64, and a prefetch has no effect on what the program computes.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(chunk.as_ptr() as *const i8);
        }
    }
    let _ = line;
}

/// `x`, times `by` where there is one.
#[inline(always)]
fn copy(x: &[f32], by: Option<f32>, into: &mut [f32]) {
    match by {
        None => into.copy_from_slice(x),
        Some(by) => into.iter_mut().zip(x).for_each(|(y, x)| *y = x * by),
    }
}

/// Columns `first..first + n` of B: panels of `nr` columns, `panel` after one another, each a row after another; missing columns are 0.
pub(super) fn b(
    level: Level,
    b: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    n: usize,
    nr: usize,
    panel: usize,
    into: &mut [f32],
) {
    if let Elements::Coded(..) = b.data {
        return b_coded(level, b, k0, kc, first, n, nr, panel, into);
    }
    if !b.k_inner {
        return match nr {
            32 => across::<32>(level, b, k0, kc, first, n, panel, into),
            16 => across::<16>(level, b, k0, kc, first, n, panel, into),
            _ => across::<8>(level, b, k0, kc, first, n, panel, into),
        };
    }
    for (number, j0) in (0..n).step_by(nr).enumerate() {
        let cols = nr.min(n - j0);
        let out = &mut into[number * panel..][..kc * nr];
        if cols < nr {
            out.fill(0.0);
        }
        b_columns(level, b, k0, kc, first + j0, cols, nr, out);
    }
}

/// [`b`] of elements that must be decoded: a panel's lines, or a line across all panels, at a time.
fn b_coded(
    level: Level,
    b: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    n: usize,
    nr: usize,
    panel: usize,
    into: &mut [f32],
) {
    thread_local! {
        static LINES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    LINES.with_borrow_mut(|lines| {
        if !b.k_inner {
            lines.resize(n.max(lines.len()), 0.0);
            for p in 0..kc {
                b.decode(k0 + p, first, &mut lines[..n]);
                let scale = b.scale.map(|scale| scale[k0 + p]);
                for (number, part) in lines[..n].chunks(nr).enumerate() {
                    let (some, none) = into[number * panel + p * nr..][..nr].split_at_mut(part.len());
                    copy(part, scale, some);
                    none.fill(0.0);
                }
            }
            return;
        }
        lines.resize(lines.len().max(nr * KC), 0.0);
        for (number, j0) in (0..n).step_by(nr).enumerate() {
            let cols = nr.min(n - j0);
            for (j, line) in lines.chunks_exact_mut(KC).take(cols).enumerate() {
                b.decode(first + j0 + j, k0, &mut line[..kc]);
            }
            let decoded = Operand {
                data: Elements::F32(lines),
                stride: KC,
                gather: None,
                scale: b.scale.map(|scale| &scale[first + j0..]),
                k_inner: true,
            };
            let out = &mut into[number * panel..][..kc * nr];
            if cols < nr {
                out.fill(0.0);
            }
            b_columns(level, &decoded, 0, kc, 0, cols, nr, out);
        }
    });
}

/// One panel of a B along whose lines k runs: a transposition. Element p of line j goes to `out[p * nr + j]`.
pub(super) fn b_columns(
    level: Level,
    b: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    cols: usize,
    nr: usize,
    out: &mut [f32],
) {
    let side = match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => 16,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => 8,
        _ => 1,
    };
    let (whole_k, whole_n) = if b.scale.is_none() { (kc - kc % side, cols - cols % side) } else { (0, 0) };
    #[cfg(target_arch = "x86_64")]
    if side > 1 {
        for j in (0..whole_n).step_by(side) {
            let mut lines = [std::ptr::null(); 16];
            for (i, line) in lines[..side].iter_mut().enumerate() {
                *line = b.line(first + j + i, k0, kc).as_ptr();
            }
            for p in (0..whole_k).step_by(side) {
                let to = &mut out[p * nr + j..][..(side - 1) * nr + side];
                // SAFETY: each line holds `kc` elements, of which `p + side` are read; `to` holds `side` rows
                // `nr` apart; the level is the machine's.
                unsafe {
                    if side == 16 {
                        x86::lines16(&lines, p, to.as_mut_ptr(), nr);
                    } else {
                        x86::lines8(&lines, p, to.as_mut_ptr(), nr);
                    }
                }
            }
        }
    }
    let (whole_k, whole_n) = if side > 1 { (whole_k, whole_n) } else { (0, 0) };
    for j in 0..cols {
        let line = b.line(first + j, k0, kc);
        let scale = b.scale.map_or(1.0, |scale| scale[first + j]);
        let from = if j < whole_n { whole_k } else { 0 };
        for (p, x) in line.iter().enumerate().skip(from) {
            out[p * nr + j] = x * scale;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// A mask of `n` lanes of 16.
    #[inline(always)]
    pub(in super::super) fn lanes(n: usize) -> __mmask16 {
        ((1u32 << n.min(16)) - 1) as __mmask16
    }

    /// `line`, times `by` if there is one: groups of `W` elements, `panel` after one another, the last filled up with zeros. Whole vectors
    /// are written: after a group of 14, what follows it.
    ///
    /// # Safety
    /// AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn spread<const W: usize>(
        line: &[f32],
        by: Option<f32>,
        into: &mut [f32],
        panel: usize,
    ) {
        let n = line.len();
        let wide = W.next_multiple_of(16);
        assert!(n == 0 || into.len() >= (n - 1) / W * panel + wide, "groups of {W} of {n} elements");
        // SAFETY: lanes beyond the line are masked; the end of what is written was checked.
        unsafe {
            let factor = _mm512_set1_ps(by.unwrap_or(1.0));
            let (mut from, mut to, mut left) = (line.as_ptr(), into.as_mut_ptr(), n);
            while left > 0 {
                for part in (0..wide).step_by(16) {
                    let mut x = match left >= wide {
                        true => _mm512_loadu_ps(from.add(part)),
                        false => {
                            _mm512_maskz_loadu_ps(lanes(left.saturating_sub(part)), from.wrapping_add(part))
                        }
                    };
                    if by.is_some() {
                        x = _mm512_mul_ps(x, factor);
                    }
                    _mm512_storeu_ps(to.add(part), x);
                }
                from = from.wrapping_add(W);
                to = to.wrapping_add(panel);
                left = left.saturating_sub(W);
            }
        }
    }

    /// 16 × 16: element `p + i` of line j goes to row i, column j of `to`, whose rows are `stride` apart.
    ///
    /// # Safety
    /// AVX-512 F; sixteen lines readable from `p` to `p + 16`; `to` writable for 16 rows of 16.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn lines16(lines: &[*const f32; 16], p: usize, to: *mut f32, stride: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(lines[i].add(p));
            }
            transpose16(r, to, stride);
        }
    }

    /// Element j of `r[i]` goes to row j, column i of `to`, whose rows are `stride` apart.
    ///
    /// # Safety
    /// AVX-512 F; `to` writable for 16 rows of 16.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(in super::super) unsafe fn transpose16(mut r: [__m512; 16], to: *mut f32, stride: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            // Pairs of lines, interleaved by elements, then by pairs of elements: 4 × 4 in each quarter.
            let mut s = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                let a = _mm512_castps_pd(s[4 * i]);
                let b = _mm512_castps_pd(s[4 * i + 1]);
                let c = _mm512_castps_pd(s[4 * i + 2]);
                let d = _mm512_castps_pd(s[4 * i + 3]);
                r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            // r[4g + e] holds, in quarter q, element 4q + e of lines 4g..4g + 4: now the quarters change places.
            for e in 0..4 {
                let (a, b, c, d) = (r[e], r[4 + e], r[8 + e], r[12 + e]);
                let ab_even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let cd_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                let cd_odd = _mm512_shuffle_f32x4::<0xdd>(c, d);
                _mm512_storeu_ps(to.add(e * stride), _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even));
                _mm512_storeu_ps(to.add((4 + e) * stride), _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
                _mm512_storeu_ps(to.add((8 + e) * stride), _mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even));
                _mm512_storeu_ps(to.add((12 + e) * stride), _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
            }
        }
    }

    /// 8 × 8, as [`lines16`].
    ///
    /// # Safety
    /// AVX2; eight lines readable from `p` to `p + 8`; `to` writable for 8 rows of 8.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn lines8(lines: &[*const f32; 16], p: usize, to: *mut f32, stride: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for i in 0..8 {
                r[i] = _mm256_loadu_ps(lines[i].add(p));
            }
            let mut s = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                let a = _mm256_castps_pd(s[4 * i]);
                let b = _mm256_castps_pd(s[4 * i + 1]);
                let c = _mm256_castps_pd(s[4 * i + 2]);
                let d = _mm256_castps_pd(s[4 * i + 3]);
                r[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
                r[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
                r[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
                r[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
            }
            for e in 0..4 {
                _mm256_storeu_ps(to.add(e * stride), _mm256_permute2f128_ps::<0x20>(r[e], r[4 + e]));
                _mm256_storeu_ps(to.add((4 + e) * stride), _mm256_permute2f128_ps::<0x31>(r[e], r[4 + e]));
            }
        }
    }
}
