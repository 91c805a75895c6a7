//! Tiles of products with f32 and bf16 panels: a few rows of activations against one or two panels over the whole of k.

use super::activations::{Form, form};
use super::{CHUNK, Format, PANEL};
use crate::simd::Level;

/// Rows of a tile, at most.
pub(super) fn height(level: Level) -> usize {
    match level {
        Level::Avx512 => 14,
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
    assert!(t.rows.len() <= height(level));
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
    match (level, form(level, t.format)) {
        #[cfg(target_arch = "x86_64")]
        (_, Form::Bf16) => by_rows!(bf16_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Form::Rounded) => by_rows!(rounded_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx512, Form::F32) => by_rows!(f32_avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, Form::Rounded) => by_rows!(rounded_avx2, 1 2 3 4 5 6),
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
        for (p, line) in t.panels[v].as_chunks::<64>().0.iter().take(t.k).enumerate() {
            for (r, sum) in sum.iter_mut().enumerate() {
                // SAFETY: the row has `k` elements, by the caller's promise.
                let x = unsafe { t.element(r, p) };
                for (s, w) in sum.iter_mut().zip(line.as_chunks::<4>().0) {
                    *s += x * f32::from_le_bytes(*w);
                }
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
use x86::{bf16_avx512, f32_avx2, f32_avx512, rounded_avx2, rounded_avx512};

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
            let panels = t.panels.map(<[u8]>::as_ptr);
            let mut sum = [[_mm512_setzero_ps(); V]; R];
            for chunk in 0..t.k.div_ceil(CHUNK) {
                let rows: [*const i32; R] =
                    std::array::from_fn(|r| t.rows[r].wrapping_add(chunk * t.chunk_stride).cast());
                let first = chunk * CHUNK / 2;
                let panels = panels.map(|panel| panel.wrapping_add(64 * first));
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

    /// # Safety
    /// As [`bf16_avx512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn f32_avx512<const R: usize, const V: usize>(t: &Tile, sums: &mut Sums) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            let panels = t.panels.map(<[u8]>::as_ptr);
            let mut sum = [[_mm512_setzero_ps(); V]; R];
            for first in (0..t.k).step_by(CHUNK) {
                let stride = first / CHUNK * t.chunk_stride;
                let rows: [*const f32; R] =
                    std::array::from_fn(|r| t.rows[r].wrapping_add(stride).cast::<f32>());
                for p in first..t.k.min(first + CHUNK) {
                    let mut w = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        let at = panels[v].add(64 * p);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        w[v] = _mm512_loadu_ps(at.cast());
                    }
                    _mm_prefetch::<_MM_HINT_T1>(t.ahead.wrapping_add(64 * p).cast());
                    for r in 0..R {
                        let x = _mm512_set1_ps(*rows[r].add(p - first));
                        for v in 0..V {
                            sum[r][v] = _mm512_fmadd_ps(x, w[v], sum[r][v]);
                        }
                    }
                }
            }
            store(&sum, sums);
        }
    }

    /// Pairs of bf16 widened, where there are no dot products of them.
    ///
    /// # Safety
    /// As [`bf16_avx512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn rounded_avx512<const R: usize, const V: usize>(t: &Tile, sums: &mut Sums) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            let panels = t.panels.map(<[u8]>::as_ptr);
            let mut sum = [[_mm512_setzero_ps(); V]; R];
            for first in (0..t.k).step_by(CHUNK) {
                let stride = first / CHUNK * t.chunk_stride;
                let rows: [*const f32; R] =
                    std::array::from_fn(|r| t.rows[r].wrapping_add(stride).cast::<f32>());
                for p in first..t.k.min(first + CHUNK) {
                    let mut w = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        let at = panels[v].add(64 * (p / 2));
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        let pair = _mm512_loadu_si512(at.cast());
                        let wide = if p % 2 == 0 {
                            _mm512_slli_epi32::<16>(pair)
                        } else {
                            _mm512_and_si512(pair, _mm512_set1_epi32(0xffff_0000_u32 as i32))
                        };
                        w[v] = _mm512_castsi512_ps(wide);
                    }
                    for r in 0..R {
                        let x = _mm512_set1_ps(*rows[r].add(p - first));
                        for v in 0..V {
                            sum[r][v] = _mm512_fmadd_ps(x, w[v], sum[r][v]);
                        }
                    }
                }
            }
            store(&sum, sums);
        }
    }

    /// # Safety
    /// As [`bf16_avx512`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f32_avx2<const R: usize, const V: usize>(t: &Tile, sums: &mut Sums) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            for v in 0..V {
                let panel = t.panels[v].as_ptr();
                let mut sum = [[_mm256_setzero_ps(); 2]; R];
                for first in (0..t.k).step_by(CHUNK) {
                    let stride = first / CHUNK * t.chunk_stride;
                    let rows: [*const f32; R] =
                        std::array::from_fn(|r| t.rows[r].wrapping_add(stride).cast::<f32>());
                    for p in first..t.k.min(first + CHUNK) {
                        let at = panel.add(64 * p);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        _mm_prefetch::<_MM_HINT_T1>(t.ahead.wrapping_add(64 * p).cast());
                        let w = [_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())];
                        for r in 0..R {
                            let x = _mm256_set1_ps(*rows[r].add(p - first));
                            sum[r][0] = _mm256_fmadd_ps(x, w[0], sum[r][0]);
                            sum[r][1] = _mm256_fmadd_ps(x, w[1], sum[r][1]);
                        }
                    }
                }
                halves(&sum, &mut sums[v]);
            }
        }
    }

    /// # Safety
    /// AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn halves<const R: usize>(sum: &[[__m256; 2]; R], sums: &mut [[f32; PANEL]; MOST]) {
        for (sum, to) in sum.iter().zip(sums) {
            // SAFETY: `to` has 16 floats.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), sum[0]);
                _mm256_storeu_ps(to[8..].as_mut_ptr(), sum[1]);
            }
        }
    }

    /// # Safety
    /// As [`bf16_avx512`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn rounded_avx2<const R: usize, const V: usize>(t: &Tile, sums: &mut Sums) {
        // SAFETY: as in `bf16_avx512`.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            for v in 0..V {
                let panel = t.panels[v].as_ptr();
                let mut sum = [[_mm256_setzero_ps(); 2]; R];
                for first in (0..t.k).step_by(CHUNK) {
                    let stride = first / CHUNK * t.chunk_stride;
                    let rows: [*const f32; R] =
                        std::array::from_fn(|r| t.rows[r].wrapping_add(stride).cast::<f32>());
                    for p in first..t.k.min(first + CHUNK) {
                        let at = panel.add(64 * (p / 2));
                        if p % 2 == 0 {
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                            _mm_prefetch::<_MM_HINT_T1>(t.ahead.wrapping_add(32 * p).cast());
                        }
                        let pairs = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())];
                        let w = pairs.map(|pair| {
                            _mm256_castsi256_ps(if p % 2 == 0 {
                                _mm256_slli_epi32::<16>(pair)
                            } else {
                                _mm256_and_si256(pair, high)
                            })
                        });
                        for r in 0..R {
                            let x = _mm256_set1_ps(*rows[r].add(p - first));
                            sum[r][0] = _mm256_fmadd_ps(x, w[0], sum[r][0]);
                            sum[r][1] = _mm256_fmadd_ps(x, w[1], sum[r][1]);
                        }
                    }
                }
                halves(&sum, &mut sums[v]);
            }
        }
    }
}
