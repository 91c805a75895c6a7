//! A few rows and coded panels, with AVX-512: bound by memory, so codes are taken apart in registers, and what comes next is asked for.

use super::avx512::scales_of_q4_k;
use super::*;
use std::arch::x86_64::*;

/// Rows that are few.
pub(super) const MOST: usize = 4;

/// One panel after the other, with at most [`MOST`] rows.
///
/// # Safety
/// As [`super::avx512::panels`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn panels(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
    for v in 0..if p.single { 1 } else { 2 } {
        let next = if v == 0 && !p.single { p.bytes[1].as_ptr() } else { p.next[0] };
        let (bytes, space, sums) = (p.bytes[v], &mut space[v], &mut *sums[v]);
        macro_rules! by_rows {
            ($($r:literal)*) => {
                match (p.rows.len(), p.format) {
                    $(
                        // SAFETY: by the caller's promise.
                        ($r, Format::Q8_0) => unsafe { panel::<$r, Q8_0>(p, bytes, next, space, sums) },
                        // SAFETY: as above.
                        ($r, Format::Q4_0) => unsafe { panel::<$r, Q4_0>(p, bytes, next, space, sums) },
                        // SAFETY: as above.
                        ($r, Format::Mxfp4) => unsafe { panel::<$r, MXFP4>(p, bytes, next, space, sums) },
                        // SAFETY: as above.
                        ($r, Format::Q4K) => unsafe { panel::<$r, Q4K>(p, bytes, next, space, sums) },
                        // SAFETY: as above.
                        ($r, Format::Q6K) => unsafe { panel::<$r, Q6K>(p, bytes, next, space, sums) },
                    )*
                    _ => {}
                }
            };
        }
        by_rows!(1 2 3 4);
    }
}

/// Formats as numbers that code can be made for.
const Q8_0: u8 = 0;
const Q4_0: u8 = 1;
const MXFP4: u8 = 2;
const Q4K: u8 = 3;
const Q6K: u8 = 4;

/// The scales of group `g` of a chunk that is not Q4_K's.
///
/// # Safety
/// The features; a whole chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")]
unsafe fn scale_of_group<const F: u8>(chunk: *const u8, g: usize) -> __m512 {
    // SAFETY: within the chunk.
    unsafe {
        let sixteen = chunk.wrapping_add(16 * g).cast::<__m128i>();
        match F {
            Q8_0 | Q4_0 => _mm512_cvtph_ps(_mm256_loadu_si256(chunk.wrapping_add(32 * g).cast())),
            Q6K => {
                let d = _mm512_cvtph_ps(_mm256_loadu_si256(chunk.wrapping_add(256).cast()));
                _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(sixteen))))
            }
            _ => {
                // 2^(bits - 128): see `blocks::mxfp4`.
                let bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(sixteen));
                let one = _mm512_set1_epi32(1);
                let power = _mm512_slli_epi32::<23>(_mm512_sub_epi32(bits, one));
                let tiny = _mm512_sllv_epi32(one, _mm512_add_epi32(bits, _mm512_set1_epi32(21)));
                let is_tiny = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(2));
                _mm512_castsi512_ps(_mm512_mask_blend_epi32(is_tiny, power, tiny))
            }
        }
    }
}

/// A line of codes that are not Q4_K's, a byte each: those of quad `j` of group `g` of a chunk, which is the `n`th of those whose bits
/// lie in other places of the same bytes.
///
/// # Safety
/// The features; a whole chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn line_of_codes<const F: u8>(codes: *const u8, g: usize, n: usize, j: usize) -> __m512i {
    // SAFETY: within the chunk's codes.
    unsafe {
        let line = |n: usize| codes.wrapping_add(64 * n).cast::<__m512i>();
        let four = _mm512_set1_epi8(15);
        match F {
            Q8_0 => _mm512_loadu_si512(line(g * 8 + j)),
            Q6K => {
                // 32 quads are half of the chunk; each eighth of it has its bits at another place of the same bytes.
                let (half, t) = (g / 8 * 24, n * 4 + j);
                let part = t / 8;
                let low = _mm512_loadu_si512(line(half + 8 + part % 2 * 8 + t % 8));
                let low = if part >= 2 { _mm512_srli_epi16::<4>(low) } else { low };
                let high = _mm512_loadu_si512(line(half + t % 8));
                let high = match part {
                    0 => _mm512_slli_epi16::<4>(high),
                    1 => _mm512_slli_epi16::<2>(high),
                    2 => high,
                    _ => _mm512_srli_epi16::<2>(high),
                };
                _mm512_or_si512(_mm512_and_si512(low, four), _mm512_and_si512(high, _mm512_set1_epi8(48)))
            }
            _ => {
                let both = _mm512_loadu_si512(line(g * 4 + j % 4));
                let q = _mm512_and_si512(if j >= 4 { _mm512_srli_epi16::<4>(both) } else { both }, four);
                if F == Q4_0 {
                    return q;
                }
                // Twice what four bits of MXFP4 stand for, and 12.
                let table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
                _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), q)
            }
        }
    }
}

/// Asks for a line to come to the second-level cache; it may be anywhere. As an instruction of its own place: compilers gather prefetches
/// that are intrinsics, and many in a row wait for each other.
#[inline(always)]
fn ask(from: *const u8, line: usize) {
    let line = from.wrapping_add(64 * line);
    // SAFETY: a prefetch has no effect on what the program computes.
    unsafe { std::arch::asm!("prefetcht1 [{}]", in(reg) line, options(nostack, preserves_flags)) };
}

/// A panel with `R` rows; the sums stay in registers.
///
/// # Safety
/// As [`super::avx512::panels`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn panel<const R: usize, const F: u8>(
    p: &Panels,
    bytes: &[u8],
    next: *const u8,
    space: &mut Unpacked,
    sums: &mut [[f32; PANEL]],
) {
    let quads = if F == Q6K { 4 } else { 8 };
    let (in_chunks, of_256) = (F == Q4K || F == Q6K, p.format.chunk_bytes(CHUNK));
    // Chunks from use to what is asked for, some KiB, and lines that a group asks for. A chunk is read from its first line to its last,
    // which the processor foresees; but less so the longer it computes with a line, and not from one panel to another.
    let (distance, lines) = match F {
        Q8_0 => (2, 9),
        Q6K => (3, 4),
        _ => (3, 5),
    };
    let chunks = p.k.div_ceil(CHUNK);
    // SAFETY: every address is within the panel, the rows or the space by the caller's promise; prefetches may go anywhere.
    unsafe {
        let mut rows = rows_at::<R>(p, p.rows, 0);
        let stride = p.activations.chunk_stride();
        let mut sum = [_mm512_setzero_ps(); R];
        let mut at = bytes.as_ptr();
        for first in (0..p.k).step_by(CHUNK) {
            let len = CHUNK.min(p.k - first);
            let size = if len == CHUNK { of_256 } else { p.format.chunk_bytes(len) };
            let codes = start_of_codes(p.format, len);
            let ahead = match (first / CHUNK + distance).checked_sub(chunks) {
                None => at.wrapping_add(distance * of_256),
                // Within the panel: nothing new.
                Some(_) if next.is_null() => at,
                Some(beyond) => next.wrapping_add(beyond * of_256),
            };
            if F == Q4K {
                scales_of_q4_k(std::slice::from_raw_parts(at, size), space);
            }
            let mut within = [_mm512_setzero_ps(); R];
            if F == Q4K {
                // A line has a quad of two groups. The upper four bits stay where they are, so that sums are 16 times what they stand
                // for: exact in 32 bits, and the scale makes up for it.
                let (low_bits, high_bits) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-16));
                for pair in 0..4 {
                    let mut even = [_mm512_setzero_si512(); R];
                    let mut odd = [_mm512_setzero_si512(); R];
                    for j in 0..8 {
                        let both = _mm512_loadu_si512(at.add(codes + (pair * 8 + j) * 64).cast());
                        let low = _mm512_and_si512(both, low_bits);
                        let high = _mm512_and_si512(both, high_bits);
                        // One for one: several at once would wait for each other.
                        ask(ahead, pair * 9 + j);
                        for r in 0..R {
                            let x = rows[r].add((pair * 16 + j) * 4).cast::<i32>();
                            let (x, y) = (x.read_unaligned(), x.add(8).read_unaligned());
                            even[r] = _mm512_dpbusd_epi32(even[r], low, _mm512_set1_epi32(x));
                            odd[r] = _mm512_dpbusd_epi32(odd[r], high, _mm512_set1_epi32(y));
                        }
                    }
                    ask(ahead, pair * 9 + 8);
                    let own = _mm512_loadu_ps(space.scales[2 * pair].as_ptr());
                    let other = _mm512_loadu_ps(space.scales[2 * pair + 1].as_ptr());
                    let other = _mm512_mul_ps(other, _mm512_set1_ps(1.0 / 16.0));
                    for r in 0..R {
                        within[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(even[r]), own, within[r]);
                        within[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd[r]), other, within[r]);
                    }
                }
            }
            // Where the bits of groups lie in bytes repeats: so many are written out, so that nothing is decided in the loop.
            let repeat = if F == Q6K { 8 } else { 1 };
            for first in (0..if F == Q4K { 0 } else { len / (4 * quads) }).step_by(repeat) {
                for within_repeat in 0..repeat {
                    let g = first + within_repeat;
                    let mut acc = [_mm512_setzero_si512(); R];
                    for r in 0..R {
                        acc[r] = _mm512_set1_epi32(start(rows[r], g));
                    }
                    for j in 0..quads {
                        let w = line_of_codes::<F>(at.add(codes), g, within_repeat, j);
                        if j < lines {
                            ask(ahead, g * lines + j);
                        }
                        for r in 0..R {
                            let x = rows[r].add((g * quads + j) * 4).cast::<i32>().read_unaligned();
                            acc[r] = _mm512_dpbusd_epi32(acc[r], w, _mm512_set1_epi32(x));
                        }
                    }
                    if lines > quads {
                        ask(ahead, g * lines + quads);
                    }
                    let own = scale_of_group::<F>(at, g);
                    for r in 0..R {
                        if in_chunks {
                            within[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r]), own, within[r]);
                        } else {
                            let (scale, offset) = (scale(rows[r], g), offset(rows[r], g));
                            let number = _mm512_castsi512_ps(acc[r]);
                            let number =
                                _mm512_fmadd_ps(number, _mm512_set1_ps(scale), _mm512_set1_ps(offset));
                            sum[r] = _mm512_fmadd_ps(number, own, sum[r]);
                        }
                    }
                }
            }
            if F == Q4K {
                let by = _mm512_loadu_ps(space.min_scale.as_ptr());
                for r in 0..R {
                    let mut acc = _mm512_setzero_si512();
                    for pair in 0..4 {
                        let mins = _mm512_loadu_si512(space.mins[pair].as_ptr().cast());
                        acc = _mm512_dpwssd_epi32(acc, mins, _mm512_set1_epi32(start(rows[r], pair)));
                    }
                    within[r] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(acc), by, within[r]);
                }
            }
            for r in 0..R {
                if in_chunks {
                    sum[r] = _mm512_fmadd_ps(within[r], _mm512_set1_ps(scale(rows[r], 0)), sum[r]);
                }
                rows[r] = rows[r].wrapping_add(stride);
            }
            at = at.add(size);
        }
        for r in 0..R {
            _mm512_storeu_ps(sums[r].as_mut_ptr(), sum[r]);
        }
    }
}
