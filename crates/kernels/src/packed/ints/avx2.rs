//! Coded panels with AVX2: products of bytes joined in 16 bits.

use super::*;
use std::arch::x86_64::*;

/// # Safety
/// The features; rows within the activations, whole panels.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn panels(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
    let half = |bytes: &[u8; 32], to: &mut [f32; PANEL]| {
        // SAFETY: 32 bytes are read, 16 floats written.
        unsafe {
            for i in 0..2 {
                let wide = _mm256_cvtph_ps(_mm_loadu_si128(bytes[16 * i..].as_ptr().cast()));
                _mm256_storeu_ps(to[8 * i..].as_mut_ptr(), wide);
            }
        }
    };
    let unpack = |format, bytes: &[u8], len, space: &mut Unpacked| {
        scales(format, bytes, len, space, half);
        codes(format, bytes, len, &mut space.codes);
    };
    if p.single {
        each_chunk!(p, space, sums, unpack, 1, 4, tile, 1 2 3 4);
    } else {
        each_chunk!(p, space, sums, unpack, 2, 4, tile, 1 2 3 4);
    }
}

/// As `portable::tile`, eight columns at a time: products of bytes are joined in 16 bits, `SPAN` quads of them before the sum
/// goes to 32. Codes of 8 bits would not fit there without a sign: they and the elements change it together.
///
/// # Safety
/// As [`panels`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
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
    ask: Ask,
    rows: &[u32],
    first: usize,
    sums: Sums,
) {
    let at = rows_at::<R>(p, rows, chunk.index);
    // SAFETY: as in `avx512::tile`.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let signed = SPAN == 1;
        let groups = chunk.len / (QUADS * 4);
        let mut ask = ask.in_steps(2 * V * groups);
        for part in 0..2 * V {
            let (v, half) = (part / 2, part % 2);
            let (space, sums) = (&chunk.space[v], &mut sums[v][first..][..R]);
            let codes = chunk.codes[v].as_ptr().add(half * 32);
            let mut sum = [_mm256_setzero_ps(); R];
            if !SUPER {
                for r in 0..R {
                    sum[r] = _mm256_loadu_ps(sums[r][half * 8..].as_ptr());
                }
            }
            for g in 0..groups {
                ask.step();
                let mut acc = [_mm256_setzero_si256(); R];
                if !MINS && !signed {
                    for r in 0..R {
                        acc[r] = _mm256_set1_epi32(start(at[r], g));
                    }
                }
                for first in (0..QUADS).step_by(SPAN) {
                    let mut short = [_mm256_setzero_si256(); R];
                    for j in first..first + SPAN {
                        let mut w = _mm256_loadu_si256(codes.add((g * QUADS + j) * 64).cast());
                        let mut sign = w;
                        if signed {
                            sign = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                            w = _mm256_abs_epi8(sign);
                        }
                        for r in 0..R {
                            let x = at[r].add((g * QUADS + j) * 4).cast::<i32>().read_unaligned();
                            let mut x = _mm256_set1_epi32(x);
                            if signed {
                                x = _mm256_sign_epi8(x, sign);
                            }
                            short[r] = _mm256_add_epi16(short[r], _mm256_maddubs_epi16(w, x));
                        }
                    }
                    for r in 0..R {
                        acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(short[r], ones));
                    }
                }
                let own = _mm256_loadu_ps(space.scales[g][half * 8..].as_ptr());
                for r in 0..R {
                    let by = if SUPER { own } else { _mm256_mul_ps(own, _mm256_set1_ps(scale(at[r], g))) };
                    sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r]), by, sum[r]);
                }
            }
            if MINS {
                let by = _mm256_loadu_ps(space.min_scale[half * 8..].as_ptr());
                for r in 0..R {
                    let mut acc = _mm256_setzero_si256();
                    for pair in 0..4 {
                        let mins = _mm256_loadu_si256(space.mins[pair][half * 8..].as_ptr().cast());
                        let two = _mm256_set1_epi32(start(at[r], pair));
                        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(mins, two));
                    }
                    sum[r] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(acc), by, sum[r]);
                }
            }
            for r in 0..R {
                let to = sums[r][half * 8..].as_mut_ptr();
                if SUPER {
                    let by = _mm256_set1_ps(scale(at[r], 0));
                    sum[r] = _mm256_fmadd_ps(sum[r], by, _mm256_loadu_ps(to));
                }
                _mm256_storeu_ps(to, sum[r]);
            }
        }
    }
}
