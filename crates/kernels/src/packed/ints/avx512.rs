//! Coded panels with AVX-512 and dot products of bytes (VNNI).

use super::*;
use std::arch::x86_64::*;
use std::sync::atomic::{Ordering, compiler_fence};

/// # Safety
/// The features; rows within the activations, whole panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn panels(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
    if p.rows.len() <= few::MOST {
        // SAFETY: by the caller's promise.
        return unsafe { few::panels(p, space, sums) };
    }
    let half = |bytes: &[u8; 32], to: &mut [f32; PANEL]| {
        // SAFETY: 32 bytes are read, 16 floats written.
        unsafe {
            let wide = _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_storeu_ps(to.as_mut_ptr(), wide);
        }
    };
    let unpack = |format, bytes: &[u8], len, space: &mut Unpacked| {
        if format == Format::Q4K {
            // SAFETY: a whole chunk; the features are there.
            unsafe { scales_of_q4_k(bytes, space) };
        } else {
            scales(format, bytes, len, space, half);
        }
        codes(format, bytes, len, &mut space.codes);
    };
    // 12 or 14 sums in registers: with two panels a row's quad is read once for both.
    if p.single {
        each_chunk!(p, space, sums, unpack, |groups: usize| groups, 1, 12, tile, 5 6 7 8 9 10 11 12);
    } else {
        each_chunk!(p, space, sums, unpack, |groups: usize| groups, 2, 7, tile, 4 5 6 7);
    }
}

/// [`scales`] of Q4_K, whose bits lie across bytes.
///
/// # Safety
/// The features; a whole chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")]
pub(super) unsafe fn scales_of_q4_k(chunk: &[u8], to: &mut Unpacked) {
    let rest = &chunk[..256];
    // SAFETY: 256 bytes are read; what is written has the sizes that are written.
    unsafe {
        // No closures: they would be calls, with vectors in memory.
        let start = rest.as_ptr();
        // Lines of four times 16 columns: see `blocks::k::scale_and_min`.
        let a = _mm512_loadu_si512(start.cast());
        let b = _mm512_loadu_si512(start.add(64).cast());
        let c = _mm512_loadu_si512(start.add(128).cast());
        let (six, four, two) = (_mm512_set1_epi8(63), _mm512_set1_epi8(15), _mm512_set1_epi8(48));
        let top_a = _mm512_and_si512(_mm512_srli_epi16::<2>(a), two);
        let top_b = _mm512_and_si512(_mm512_srli_epi16::<2>(b), two);
        let low = _mm512_and_si512(c, four);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(c), four);
        let scales = [_mm512_and_si512(a, six), _mm512_or_si512(low, top_a)];
        let mins = [_mm512_and_si512(b, six), _mm512_or_si512(high, top_b)];
        let halves = start.add(192);
        let d = _mm512_cvtph_ps(_mm256_loadu_si256(halves.cast()));
        let d_min = _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(32).cast()));
        _mm512_storeu_ps(to.min_scale.as_mut_ptr(), d_min);
        for half in 0..2 {
            let (s, m) = (scales[half], mins[half]);
            let s = [
                _mm512_castsi512_si128(s),
                _mm512_extracti32x4_epi32::<1>(s),
                _mm512_extracti32x4_epi32::<2>(s),
                _mm512_extracti32x4_epi32::<3>(s),
            ];
            for (j, s) in s.into_iter().enumerate() {
                let wide = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(s));
                _mm512_storeu_ps(to.scales[half * 4 + j].as_mut_ptr(), _mm512_mul_ps(wide, d));
            }
            let m = [
                _mm512_castsi512_si128(m),
                _mm512_extracti32x4_epi32::<1>(m),
                _mm512_extracti32x4_epi32::<2>(m),
                _mm512_extracti32x4_epi32::<3>(m),
            ];
            for pair in 0..2 {
                let (x, y) = (m[2 * pair], m[2 * pair + 1]);
                let both = _mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y));
                let wide = _mm512_cvtepu8_epi16(both);
                _mm512_storeu_si512(to.mins[half * 2 + pair].as_mut_ptr().cast(), wide);
            }
        }
    }
}

/// As `portable::tile`, with dot products of quads.
///
/// # Safety
/// As [`panels`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn tile<
    const R: usize,
    const V: usize,
    const QUADS: usize,
    const SPAN: usize,
    const SUPER: bool,
    const MINS: bool,
>(
    p: &Panels,
    chunk: &Chunk,
    ask: &mut Ask,
    rows: &[u32],
    first: usize,
    sums: Sums,
) {
    let at = rows_at::<R>(p, rows, chunk.index);
    // SAFETY: the rows have `len` elements, and starts and scales for their groups; the codes are of as many.
    unsafe {
        let codes = [chunk.codes[0].as_ptr(), chunk.codes[1].as_ptr()];
        let to = [sums[0][first..].as_mut_ptr(), sums[1][first..].as_mut_ptr()];
        // A chunk's sums of a row, or the row's own.
        let mut sum = [[_mm512_setzero_ps(); V]; R];
        if !SUPER {
            for r in 0..R {
                for v in 0..V {
                    sum[r][v] = _mm512_loadu_ps(to[v].add(r).cast());
                }
            }
        }
        let groups = chunk.len / (QUADS * 4);
        for g in 0..groups {
            ask.step();
            let mut acc = [[_mm512_setzero_si512(); V]; R];
            if !MINS {
                for r in 0..R {
                    acc[r] = [_mm512_set1_epi32(start(at[r], g)); V];
                }
            }
            for j in 0..QUADS {
                let mut w = [_mm512_setzero_si512(); V];
                for v in 0..V {
                    w[v] = _mm512_loadu_si512(codes[v].add((g * QUADS + j) * 64).cast());
                }
                for r in 0..R {
                    let x = at[r].add((g * QUADS + j) * 4).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(x);
                    for v in 0..V {
                        acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], w[v], x);
                    }
                }
            }
            // Were the scales loaded with the starts, there would not be registers enough.
            compiler_fence(Ordering::SeqCst);
            for v in 0..V {
                let own = _mm512_loadu_ps(chunk.space[v].scales.as_ptr().add(g).cast());
                for r in 0..R {
                    let number = if SUPER {
                        _mm512_cvtepi32_ps(acc[r][v])
                    } else {
                        let (scale, offset) = (scale(at[r], g), offset(at[r], g));
                        let sum = _mm512_castsi512_ps(acc[r][v]);
                        _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), _mm512_set1_ps(offset))
                    };
                    sum[r][v] = _mm512_fmadd_ps(number, own, sum[r][v]);
                }
            }
        }
        if MINS {
            for v in 0..V {
                let by = _mm512_loadu_ps(chunk.space[v].min_scale.as_ptr());
                let mut acc = [_mm512_setzero_si512(); R];
                for pair in 0..4 {
                    let mins = _mm512_loadu_si512(chunk.space[v].mins[pair].as_ptr().cast());
                    for r in 0..R {
                        let two = _mm512_set1_epi32(start(at[r], pair));
                        acc[r] = _mm512_dpwssd_epi32(acc[r], mins, two);
                    }
                }
                for r in 0..R {
                    sum[r][v] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(acc[r]), by, sum[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                let to = to[v].add(r).cast::<f32>();
                if SUPER {
                    let by = _mm512_set1_ps(scale(at[r], 0));
                    sum[r][v] = _mm512_fmadd_ps(sum[r][v], by, _mm512_loadu_ps(to));
                }
                _mm512_storeu_ps(to, sum[r][v]);
            }
        }
    }
}
