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
        if format == Format::Q4K {
            // SAFETY: a whole chunk; the features are there.
            unsafe { scales_of_q4_k(bytes, space) };
        } else {
            scales(format, bytes, len, space, half);
        }
        codes(format, bytes, len, &mut space.codes);
    };
    if p.format == Format::Q4K && p.rows.len() <= FEW {
        // SAFETY: by the caller's promise.
        return unsafe { few(p, space, sums) };
    }
    if p.single {
        each_chunk!(p, space, sums, unpack, |groups: usize| 2 * groups, 1, 4, tile, 1 2 3 4);
    } else {
        each_chunk!(p, space, sums, unpack, |groups: usize| 4 * groups, 2, 4, tile, 1 2 3 4);
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
    ask: &mut Ask,
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
                        acc[r] = _mm256_set1_epi32(start(at[r], g) - if SUPER { 0 } else { MAGIC });
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
                    let mut number = _mm256_cvtepi32_ps(acc[r]);
                    if !SUPER {
                        number = _mm256_mul_ps(number, _mm256_set1_ps(scale(at[r], g)));
                    }
                    sum[r] = _mm256_fmadd_ps(number, own, sum[r]);
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

/// Rows that are few: bound by memory, so codes of Q4_K are taken apart in registers.
const FEW: usize = 2;

/// [`scales`] of Q4_K, whose bits lie across bytes.
///
/// # Safety
/// The features; a whole chunk.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scales_of_q4_k(chunk: &[u8], to: &mut Unpacked) {
    let rest = &chunk[..256];
    // SAFETY: 256 bytes are read; what is written has the sizes that are written.
    unsafe {
        let start = rest.as_ptr();
        let (six, four, two) = (_mm_set1_epi8(63), _mm_set1_epi8(15), _mm_set1_epi8(48));
        for half in 0..2 {
            let d = _mm256_cvtph_ps(_mm_loadu_si128(start.add(192 + 16 * half).cast()));
            let d_min = _mm256_cvtph_ps(_mm_loadu_si128(start.add(224 + 16 * half).cast()));
            _mm256_storeu_ps(to.min_scale[8 * half..].as_mut_ptr(), d_min);
            for j in 0..4 {
                // As `blocks::k::scale_and_min`: groups j and j + 4 of eight columns in the low and the high half.
                let bytes = start.add(16 * j + 8 * half);
                let s = _mm_loadl_epi64(bytes.cast());
                let last = _mm_loadl_epi64(bytes.add(128).cast());
                let high = _mm_and_si128(_mm_srli_epi16::<2>(s), two);
                for (group, s) in
                    [(j, _mm_and_si128(s, six)), (j + 4, _mm_or_si128(_mm_and_si128(last, four), high))]
                {
                    let wide = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(s)), d);
                    _mm256_storeu_ps(to.scales[group][8 * half..].as_mut_ptr(), wide);
                }
            }
            for pair in 0..2 {
                let bytes = start.add(64 + 32 * pair + 8 * half);
                let (a, b) = (_mm_loadl_epi64(bytes.cast()), _mm_loadl_epi64(bytes.add(16).cast()));
                let low = _mm_unpacklo_epi8(_mm_and_si128(a, six), _mm_and_si128(b, six));
                let last = bytes.add(64);
                let (c, d) = (_mm_loadl_epi64(last.cast()), _mm_loadl_epi64(last.add(16).cast()));
                let above = |x| _mm_and_si128(_mm_srli_epi16::<4>(x), four);
                let high = |x| _mm_and_si128(_mm_srli_epi16::<2>(x), two);
                let high =
                    _mm_unpacklo_epi8(_mm_or_si128(above(c), high(a)), _mm_or_si128(above(d), high(b)));
                _mm256_storeu_si256(to.mins[pair][8 * half..].as_mut_ptr().cast(), _mm256_cvtepu8_epi16(low));
                _mm256_storeu_si256(
                    to.mins[pair + 2][8 * half..].as_mut_ptr().cast(),
                    _mm256_cvtepu8_epi16(high),
                );
            }
        }
    }
}

/// Panels of Q4_K, one after the other, with at most [`FEW`] rows.
///
/// # Safety
/// As [`panels`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
    for v in 0..if p.single { 1 } else { 2 } {
        let next = if v == 0 && !p.single { p.bytes[1].as_ptr() } else { p.next[0] };
        let (bytes, space, sums) = (p.bytes[v], &mut space[v], &mut *sums[v]);
        match p.rows.len() {
            // SAFETY: by the caller's promise.
            1 => unsafe { panel::<1>(p, bytes, next, space, sums) },
            // SAFETY: as above.
            2 => unsafe { panel::<2>(p, bytes, next, space, sums) },
            _ => {}
        }
    }
}

/// Chunks from use to what is asked for.
const DISTANCE: usize = 3;

/// As `few::panel` of AVX-512, eight columns at a time.
///
/// # Safety
/// As [`panels`]; a format of Q4_K.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panel<const R: usize>(
    p: &Panels,
    bytes: &[u8],
    next: *const u8,
    space: &mut Unpacked,
    sums: &mut [[f32; PANEL]],
) {
    let size = Format::Q4K.chunk_bytes(CHUNK);
    let (chunks, codes) = (p.k / CHUNK, start_of_codes(Format::Q4K, CHUNK));
    // SAFETY: every address is within the panel, the rows or the space by the caller's promise; prefetches may go anywhere.
    unsafe {
        let mut rows = rows_at::<R>(p, p.rows, 0);
        let stride = p.activations.chunk_stride();
        let (four, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        let mut sum = [[_mm256_setzero_ps(); 2]; R];
        for chunk in 0..chunks {
            let at = bytes.as_ptr().add(chunk * size);
            let ahead = match (chunk + DISTANCE).checked_sub(chunks) {
                None => at.wrapping_add(DISTANCE * size),
                // Within the panel: nothing new.
                Some(_) if next.is_null() => at,
                Some(beyond) => next.wrapping_add(beyond * size),
            };
            scales_of_q4_k(std::slice::from_raw_parts(at, size), space);
            let mut within = [[_mm256_setzero_ps(); 2]; R];
            for pair in 0..4 {
                for half in 0..2 {
                    // Eight products of 4 and 8 bits, two at a time, fit 16 bits.
                    let (mut even, mut odd) = ([_mm256_setzero_si256(); R], [_mm256_setzero_si256(); R]);
                    for j in 0..8 {
                        let both = _mm256_loadu_si256(at.add(codes + (pair * 8 + j) * 64 + half * 32).cast());
                        let low = _mm256_and_si256(both, four);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), four);
                        for r in 0..R {
                            let x = rows[r].add((pair * 16 + j) * 4).cast::<i32>();
                            let (x, y) = (x.read_unaligned(), x.add(8).read_unaligned());
                            let low = _mm256_maddubs_epi16(low, _mm256_set1_epi32(x));
                            let high = _mm256_maddubs_epi16(high, _mm256_set1_epi32(y));
                            even[r] = _mm256_add_epi16(even[r], low);
                            odd[r] = _mm256_add_epi16(odd[r], high);
                        }
                    }
                    let own = _mm256_loadu_ps(space.scales[2 * pair][half * 8..].as_ptr());
                    let other = _mm256_loadu_ps(space.scales[2 * pair + 1][half * 8..].as_ptr());
                    for r in 0..R {
                        let (even, odd) = (_mm256_madd_epi16(even[r], ones), _mm256_madd_epi16(odd[r], ones));
                        let one = _mm256_fmadd_ps(_mm256_cvtepi32_ps(even), own, within[r][half]);
                        within[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(odd), other, one);
                    }
                }
                for line in 0..9 {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add((pair * 9 + line) * 64).cast());
                }
            }
            for r in 0..R {
                for half in 0..2 {
                    let by = _mm256_loadu_ps(space.min_scale[half * 8..].as_ptr());
                    let mut acc = _mm256_setzero_si256();
                    for pair in 0..4 {
                        let mins = _mm256_loadu_si256(space.mins[pair][half * 8..].as_ptr().cast());
                        let two = _mm256_set1_epi32(start(rows[r], pair));
                        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(mins, two));
                    }
                    let all = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(acc), by, within[r][half]);
                    sum[r][half] = _mm256_fmadd_ps(all, _mm256_set1_ps(scale(rows[r], 0)), sum[r][half]);
                }
                rows[r] = rows[r].wrapping_add(stride);
            }
        }
        for r in 0..R {
            _mm256_storeu_ps(sums[r].as_mut_ptr(), sum[r][0]);
            _mm256_storeu_ps(sums[r][8..].as_mut_ptr(), sum[r][1]);
        }
    }
}
