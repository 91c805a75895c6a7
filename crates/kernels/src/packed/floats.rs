//! Tiles of products with f32 and bf16 panels: a few rows of activations against one or two panels over the whole of k.

use super::activations::{Form, form};
use super::pack::halves;
use super::{CHUNK, Format, PANEL};
use crate::simd::Level;

/// Rows of a tile, at most: as many as have their sums in registers.
pub(super) fn height(level: Level, format: Format) -> usize {
    match level {
        // A line of pairs that is widened takes a mask and two more registers.
        Level::Avx512 if format == Format::Bf16 => 13,
        Level::Avx512 | Level::Avx512Bf16 => 14,
        // A line of pairs takes two more registers.
        Level::Avx2 if format == Format::Bf16 => 5,
        Level::Avx2 => 6,
        Level::Portable => 4,
    }
}

/// Most rows of any level.
pub(super) const MOST: usize = 14;

/// One tile: rows of activations and two panels, of which the second may be the first again.
pub(super) struct Tile<'a> {
    pub format: Format,
    pub k: usize,
    pub panels: [&'a [u8]; 2],
    /// Only the first panel counts.
    pub single: bool,
    /// Where the first chunks of the rows are, in the form of [`form`], and bytes from a chunk to the next.
    pub rows: &'a [*const u8],
    pub chunk_stride: usize,
    /// Cache lines to be asked for meanwhile, one with each line of a panel; none where null.
    pub ahead: *const u8,
}

impl Tile<'_> {
    /// Element `p` of a row, of those that are held as f32.
    ///
    /// # Safety
    /// The row has it.
    unsafe fn element(&self, row: usize, p: usize) -> f32 {
        let chunk = self.rows[row].wrapping_add(p / CHUNK * self.chunk_stride);
        // SAFETY: by the caller's promise.
        unsafe { *chunk.cast::<f32>().add(p % CHUNK) }
    }
}

/// Computes a tile: the sums of the first panel, \[rows, 16\] each `PANEL` after the other, and of the second.
///
/// # Safety
/// Each row has `k` elements in the form that the level and the format have.
pub(super) unsafe fn tile(level: Level, t: &Tile, sums: &mut [[[f32; PANEL]; MOST]; 2]) {
    let bytes = t.format.panel_bytes(t.k);
    assert!(t.panels.iter().all(|panel| panel.len() >= bytes), "panels of {bytes} bytes");
    assert!(t.rows.len() <= height(level, t.format));
    macro_rules! by_rows {
        ($kernel:ident, $($r:literal)*) => {
            match (t.rows.len(), t.single) {
                $(
                    // SAFETY: the level is the machine's; lengths were checked, rows are the caller's promise.
                    ($r, false) => unsafe { $kernel::<$r, 2>(t, sums) },
                    // SAFETY: as above.
                    ($r, true) => unsafe { $kernel::<$r, 1>(t, sums) },
                )*
                _ => {}
            }
        };
    }
    let half = t.format == Format::F16;
    match (level, form(level, t.format)) {
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512 | Level::Avx512Bf16, Form::F32) if half => {
            by_rows!(f16_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Form::F32) if half => by_rows!(f16_avx2, 1 2 3 4 5 6),
        #[cfg(target_arch = "x86_64")]
        (_, Form::Bf16) => by_rows!(bf16_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Form::Rounded) => by_rows!(rounded_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512 | Level::Avx512Bf16, Form::F32) => {
            by_rows!(f32_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Form::Rounded) => by_rows!(rounded_avx2, 1 2 3 4 5),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Form::F32) => by_rows!(f32_avx2, 1 2 3 4 5 6),
        (_, Form::Rounded) => by_rows!(rounded_portable, 1 2 3 4),
        _ => by_rows!(f32_portable, 1 2 3 4),
    }
}

/// Plain arithmetic; `unsafe` as its sisters.
unsafe fn f32_portable<const R: usize, const V: usize>(t: &Tile, sums: &mut [[[f32; PANEL]; MOST]; 2]) {
    for v in 0..V {
        let mut sum = [[0.0f32; PANEL]; R];
        for p in 0..t.k {
            let mut line = [0.0; PANEL];
            match t.format {
                Format::F16 => halves(&t.panels[v].as_chunks::<32>().0[p], &mut line),
                _ => {
                    let words = t.panels[v][64 * p..][..64].as_chunks::<4>().0;
                    line.iter_mut().zip(words).for_each(|(w, bytes)| *w = f32::from_le_bytes(*bytes));
                }
            }
            for (r, sum) in sum.iter_mut().enumerate() {
                // SAFETY: the row has `k` elements, by the caller's promise.
                let x = unsafe { t.element(r, p) };
                sum.iter_mut().zip(&line).for_each(|(s, w)| *s += x * w);
            }
        }
        sums[v][..R].copy_from_slice(&sum);
    }
}

/// As [`f32_portable`], with pairs of bf16 for weights.
unsafe fn rounded_portable<const R: usize, const V: usize>(t: &Tile, sums: &mut [[[f32; PANEL]; MOST]; 2]) {
    for v in 0..V {
        let mut sum = [[0.0f32; PANEL]; R];
        for p in 0..t.k {
            let line = &t.panels[v][p / 2 * 64..][..64];
            for (r, sum) in sum.iter_mut().enumerate() {
                // SAFETY: the row has `k` elements, by the caller's promise.
                let x = unsafe { t.element(r, p) };
                for (s, w) in sum.iter_mut().zip(line.as_chunks::<4>().0) {
                    let at = p % 2 * 2;
                    *s += x * f32::from_bits(u32::from(w[at]) << 16 | u32::from(w[at + 1]) << 24);
                }
            }
        }
        sums[v][..R].copy_from_slice(&sum);
    }
}

#[cfg(target_arch = "x86_64")]
use x86::{bf16_avx512, f16_avx2, f16_avx512, f32_avx2, f32_avx512, rounded_avx2, rounded_avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHUNK, MOST, PANEL, Tile};
    use std::arch::x86_64::*;

    type Sums = [[[f32; PANEL]; MOST]; 2];

    /// How far ahead of its use a line of a panel is asked for, in bytes: where there are few rows it comes from memory.
    const AHEAD: usize = 1024;

    /// Dot products of pairs.
    ///
    /// # Safety
    /// The features; panels and rows of `k` elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn bf16_avx512<const R: usize, const V: usize>(t: &Tile, sums: &mut Sums) {
        // SAFETY: every address is within panels and rows by the caller's promise; prefetches may go anywhere.
        unsafe {
            // Loops rather than closures, which would be calls.
            let (mut rows, mut sum) = ([std::ptr::null::<i32>(); R], [[_mm512_setzero_ps(); V]; R]);
            for chunk in 0..t.k.div_ceil(CHUNK) {
                for r in 0..R {
                    rows[r] = t.rows[r].wrapping_add(chunk * t.chunk_stride).cast();
                }
                let first = chunk * CHUNK / 2;
                let [a, b] = t.panels;
                let panels = [a.as_ptr().wrapping_add(64 * first), b.as_ptr().wrapping_add(64 * first)];
                let ahead = t.ahead.wrapping_add(64 * first);
                for p in 0..(t.k.div_ceil(2) - first).min(CHUNK / 2) {
                    let mut w = [_mm512_setzero_si512(); V];
                    for v in 0..V {
                        let at = panels[v].add(64 * p);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        w[v] = _mm512_loadu_si512(at.cast());
                    }
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64 * p).cast());
                    for r in 0..R {
                        let x = _mm512_set1_epi32(rows[r].add(p).read_unaligned());
                        for v in 0..V {
                            sum[r][v] = _mm512_dpbf16_ps(
                                sum[r][v],
                                std::mem::transmute::<__m512i, __m512bh>(w[v]),
                                std::mem::transmute::<__m512i, __m512bh>(x),
                            );
                        }
                    }
                }
            }
            store(&sum, sums);
        }
    }

    /// # Safety
    /// AVX-512 F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store<const R: usize, const V: usize>(sum: &[[__m512; V]; R], sums: &mut Sums) {
        for (r, sum) in sum.iter().enumerate() {
            for (v, sum) in sum.iter().enumerate() {
                // SAFETY: `sums` has 16 floats there.
                unsafe { _mm512_storeu_ps(sums[v][r].as_mut_ptr(), *sum) };
            }
        }
    }

    /// How a line of a panel lies in memory: single precision, half, or one of each pair of bf16.
    const F32: u8 = 0;
    const F16: u8 = 1;
    const PAIRS: u8 = 2;

    /// Bytes of a panel up to element `p` of k.
    #[inline(always)]
    const fn place<const LINE: u8>(p: usize) -> usize {
        match LINE {
            F32 => 64 * p,
            F16 => 32 * p,
            _ => 64 * (p / 2),
        }
    }

    /// The 16 weights of a line, or of a pair's first or second.
    ///
    /// # Safety
    /// AVX-512 F; a line there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn line_avx512<const LINE: u8, const SECOND: bool>(at: *const u8) -> __m512 {
        // SAFETY: by the caller's promise.
        unsafe {
            match LINE {
                F32 => _mm512_loadu_ps(at.cast()),
                F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
                _ => {
                    let pairs = _mm512_loadu_si512(at.cast());
                    _mm512_castsi512_ps(if SECOND {
                        _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32))
                    } else {
                        _mm512_slli_epi32::<16>(pairs)
                    })
                }
            }
        }
    }

    macro_rules! by_line {
        ($feature:literal, $body:ident, $($name:ident $line:ident)*) => { $(
            /// # Safety
            /// As [`bf16_avx512`].
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name<const R: usize, const V: usize>(t: &Tile, sums: &mut Sums) {
                // SAFETY: by the caller's promise.
                unsafe { $body::<R, V, $line>(t, sums) }
            }
        )* };
    }
    by_line!("avx512f,avx512bw,avx512vl,avx512dq", wide_avx512, f32_avx512 F32 f16_avx512 F16 rounded_avx512 PAIRS);
    by_line!("avx2,fma,f16c", wide_avx2, f32_avx2 F32 f16_avx2 F16 rounded_avx2 PAIRS);

    /// A step of k for a tile: `w` of each panel.
    ///
    /// # Safety
    /// AVX-512 F; rows with element `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn step_avx512<const R: usize, const V: usize>(
        w: [__m512; V],
        rows: &[*const f32; R],
        p: usize,
        sum: &mut [[__m512; V]; R],
    ) {
        for r in 0..R {
            // SAFETY: by the caller's promise.
            let x = unsafe { _mm512_set1_ps(*rows[r].add(p)) };
            for v in 0..V {
                sum[r][v] = _mm512_fmadd_ps(x, w[v], sum[r][v]);
            }
        }
    }

    /// Multiply-adds in f32. Its loops are over whole lines, as those of [`wide_avx2`].
    ///
    /// # Safety
    /// As [`bf16_avx512`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn wide_avx512<const R: usize, const V: usize, const LINE: u8>(t: &Tile, sums: &mut Sums) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            let (mut rows, mut sum) = ([std::ptr::null::<f32>(); R], [[_mm512_setzero_ps(); V]; R]);
            for first in (0..t.k).step_by(CHUNK) {
                let stride = first / CHUNK * t.chunk_stride;
                for r in 0..R {
                    rows[r] = t.rows[r].wrapping_add(stride).cast();
                }
                let count = CHUNK.min(t.k - first);
                let start = place::<LINE>(first);
                let panels =
                    [t.panels[0].as_ptr().wrapping_add(start), t.panels[1].as_ptr().wrapping_add(start)];
                let ahead = t.ahead.wrapping_add(start);
                let lines = if LINE == PAIRS { count / 2 } else { count };
                for line in 0..lines {
                    let offset = line * if LINE == F16 { 32 } else { 64 };
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(offset).cast());
                    let mut w = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        let at = panels[v].add(offset);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        w[v] = line_avx512::<LINE, false>(at);
                    }
                    if LINE != PAIRS {
                        step_avx512(w, &rows, line, &mut sum);
                        continue;
                    }
                    step_avx512(w, &rows, 2 * line, &mut sum);
                    for v in 0..V {
                        w[v] = line_avx512::<LINE, true>(panels[v].add(offset));
                    }
                    step_avx512(w, &rows, 2 * line + 1, &mut sum);
                }
                if LINE == PAIRS && count % 2 == 1 {
                    let mut w = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        w[v] = line_avx512::<LINE, false>(panels[v].add(64 * lines));
                    }
                    step_avx512(w, &rows, count - 1, &mut sum);
                }
            }
            store(&sum, sums);
        }
    }

    /// A step of k for a tile: eight columns in `w[0]`, eight in `w[1]`.
    ///
    /// # Safety
    /// AVX2 and FMA; rows with element `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn step_avx2<const R: usize>(
        w: [__m256; 2],
        rows: &[*const f32; R],
        p: usize,
        sum: &mut [[__m256; 2]; R],
    ) {
        for r in 0..R {
            // SAFETY: by the caller's promise.
            let x = unsafe { _mm256_set1_ps(*rows[r].add(p)) };
            sum[r][0] = _mm256_fmadd_ps(x, w[0], sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(x, w[1], sum[r][1]);
        }
    }

    /// As [`wide_avx512`], one panel after the other, or both together where there are so few rows that one panel's sums would wait for
    /// each other. Its loops are over whole lines: with a choice in the innermost one the sums would not stay in registers.
    ///
    /// # Safety
    /// As [`bf16_avx512`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn wide_avx2<const R: usize, const V: usize, const LINE: u8>(t: &Tile, sums: &mut Sums) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            if R <= 2 && V == 2 {
                return panels_avx2::<R, 2, LINE>(t, t.panels, sums);
            }
            for v in 0..V {
                panels_avx2::<R, 1, LINE>(t, [t.panels[v]; 2], std::slice::from_mut(&mut sums[v]));
            }
        }
    }

    /// The sums of `V` panels.
    ///
    /// # Safety
    /// As [`bf16_avx512`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn panels_avx2<const R: usize, const V: usize, const LINE: u8>(
        t: &Tile,
        panels: [&[u8]; 2],
        sums: &mut [[[f32; PANEL]; MOST]],
    ) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            let mut rows = [std::ptr::null::<f32>(); R];
            let mut sum = [[[_mm256_setzero_ps(); 2]; R]; V];
            for first in (0..t.k).step_by(CHUNK) {
                let stride = first / CHUNK * t.chunk_stride;
                for r in 0..R {
                    rows[r] = t.rows[r].wrapping_add(stride).cast();
                }
                let count = CHUNK.min(t.k - first);
                let start = place::<LINE>(first);
                let at = [panels[0].as_ptr().wrapping_add(start), panels[1].as_ptr().wrapping_add(start)];
                let ahead = t.ahead.wrapping_add(start);
                let lines = if LINE == PAIRS { count / 2 } else { count };
                for line in 0..lines {
                    let offset = line * if LINE == F16 { 32 } else { 64 };
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(offset).cast());
                    for v in 0..V {
                        let at = at[v].add(offset);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        match LINE {
                            F32 => {
                                let w = [_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())];
                                step_avx2(w, &rows, line, &mut sum[v]);
                            }
                            F16 => {
                                let (a, b) = (_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast()));
                                step_avx2([_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)], &rows, line, &mut sum[v]);
                            }
                            _ => {
                                step_avx2(halves_avx2::<false>(at), &rows, 2 * line, &mut sum[v]);
                                step_avx2(halves_avx2::<true>(at), &rows, 2 * line + 1, &mut sum[v]);
                            }
                        }
                    }
                }
                if LINE == PAIRS && count % 2 == 1 {
                    for v in 0..V {
                        step_avx2(halves_avx2::<false>(at[v].add(64 * lines)), &rows, count - 1, &mut sum[v]);
                    }
                }
            }
            for v in 0..V {
                for r in 0..R {
                    _mm256_storeu_ps(sums[v][r].as_mut_ptr(), sum[v][r][0]);
                    _mm256_storeu_ps(sums[v][r][8..].as_mut_ptr(), sum[v][r][1]);
                }
            }
        }
    }

    /// The first or the second of each pair of a line, as f32.
    ///
    /// # Safety
    /// AVX2; a line there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn halves_avx2<const SECOND: bool>(at: *const u8) -> [__m256; 2] {
        // SAFETY: by the caller's promise.
        unsafe {
            let (a, b) = (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast()));
            if SECOND {
                let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let (a, b) = (_mm256_and_si256(a, upper), _mm256_and_si256(b, upper));
                return [_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)];
            }
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b))]
        }
    }
}
