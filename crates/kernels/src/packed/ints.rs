//! Products of 8-bit activations with a coded panel, chunk by chunk of k: a chunk is unpacked once and then met by all rows.

use super::activations::View;
use super::pack::halves;
use super::unpack::{Unpacked, unpack};
use super::{CHUNK, Format, PANEL};
use crate::simd::{Dots, Level};

/// A panel and the rows that meet it.
pub(super) struct Panel<'a> {
    pub format: Format,
    pub k: usize,
    pub bytes: &'a [u8],
    pub activations: View<'a>,
    pub rows: &'a [u32],
}

/// `sums` \[rows, 16\] of a panel.
pub(super) fn panel(level: Level, p: &Panel, space: &mut Unpacked, sums: &mut [[f32; PANEL]]) {
    let a = p.activations;
    assert!(a.k() == p.k && p.rows.iter().all(|row| (*row as usize) < a.rows()), "rows of the activations");
    a.check(level, p.format);
    assert!(p.bytes.len() >= p.format.panel_bytes(p.k) && sums.len() == p.rows.len(), "a panel and its sums");
    sums.as_flattened_mut().fill(0.0);
    // SAFETY: the level is the machine's; rows, panel and the form of the activations were just checked.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if Dots::of(level).int8 => x86::panel_avx512(p, space, sums),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => x86::panel_avx2(p, space, sums),
            _ => panel_portable(p, space, sums),
        }
    }
}

/// Where a tile's rows have their part of a chunk.
struct Rows<const R: usize> {
    x: [*const i8; R],
    scales: [*const f32; R],
    starts: [*const i32; R],
}

impl<const R: usize> Rows<R> {
    #[inline(always)]
    fn at(p: &Panel, rows: &[u32], chunk: usize) -> Self {
        let of = |r: usize| rows[r] as usize;
        Self {
            x: std::array::from_fn(|r| p.activations.elements(chunk, of(r)).cast()),
            scales: std::array::from_fn(|r| p.activations.scales(chunk, of(r))),
            starts: std::array::from_fn(|r| p.activations.starts(chunk, of(r))),
        }
    }
}

/// One chunk.
struct Chunk<'a> {
    index: usize,
    /// Elements of k.
    len: usize,
    codes: &'a [u8],
    scales: &'a [[f32; PANEL]; CHUNK / 16],
    mins: &'a [[[i16; 2]; PANEL]; 4],
    min_scale: &'a [f32; PANEL],
}

/// Asks for the next chunk.
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64).take(72) {
        // SAFETY: SSE is part of x86-64, and a prefetch has no effect on what the program computes.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
    let _ = bytes;
}

/// Calls `$tile::<R, ..>(p, &chunk, rows, sums)` for each chunk of a panel and each tile of rows.
macro_rules! each_chunk {
    ($p:ident, $space:ident, $sums:ident, $half:expr, $height:literal, $tile:ident, $($r:literal)*) => {{
        let mut at = 0;
        for first in (0..$p.k).step_by(CHUNK) {
            let len = CHUNK.min($p.k - first);
            let size = $p.format.chunk_bytes(len);
            let bytes = &$p.bytes[at..][..size];
            at += size;
            // `unpack` borrows the codes from the chunk or from the space, whose other parts are read beside them.
            let codes: *const [u8] = unpack($p.format, bytes, len, $space, $half);
            prefetch(&$p.bytes[at..]);
            let chunk = Chunk {
                index: first / CHUNK,
                len,
                // SAFETY: neither is written while the chunk is used.
                codes: unsafe { &*codes },
                scales: &$space.scales,
                mins: &$space.mins,
                min_scale: &$space.min_scale,
            };
            let tiles = $p.rows.len().div_ceil($height).max(1);
            let (low, more) = ($p.rows.len() / tiles, $p.rows.len() % tiles);
            let mut row = 0;
            for tile in 0..tiles {
                let height = low + usize::from(tile < more);
                let (rows, sums) = (&$p.rows[row..][..height], &mut $sums[row..][..height]);
                row += height;
                match (height, $p.format) {
                    $(
                        // SAFETY: by the caller's promise.
                        ($r, Format::Q4K) => unsafe { $tile::<$r, 8, 4, true, true>($p, &chunk, rows, sums) },
                        // SAFETY: as above.
                        ($r, Format::Q6K) => unsafe { $tile::<$r, 4, 2, true, false>($p, &chunk, rows, sums) },
                        // SAFETY: as above.
                        ($r, Format::Q8_0) => unsafe { $tile::<$r, 8, 1, false, false>($p, &chunk, rows, sums) },
                        // SAFETY: as above.
                        ($r, _) => unsafe { $tile::<$r, 8, 4, false, false>($p, &chunk, rows, sums) },
                    )*
                    _ => {}
                }
            }
        }
    }};
}

fn panel_portable(p: &Panel, space: &mut Unpacked, sums: &mut [[f32; PANEL]]) {
    each_chunk!(p, space, sums, halves, 1, tile_portable, 1);
}

/// A tile of a chunk whose groups have `QUADS` quads of k; `SUPER`: one scale of activations for the chunk; `MINS`: and minima.
///
/// # Safety
/// Rows within the activations.
unsafe fn tile_portable<
    const R: usize,
    const QUADS: usize,
    const SPAN: usize,
    const SUPER: bool,
    const MINS: bool,
>(
    p: &Panel,
    chunk: &Chunk,
    rows: &[u32],
    sums: &mut [[f32; PANEL]],
) {
    let at = Rows::<R>::at(p, &rows[..R], chunk.index);
    for (r, sums) in sums.iter_mut().enumerate() {
        let mut whole = [0.0f32; PANEL];
        for (g, codes) in chunk.codes.chunks_exact(QUADS * 64).enumerate() {
            // SAFETY: the row has these elements, and a start and a scale for each group.
            let (x, start, scale) = unsafe {
                (
                    std::slice::from_raw_parts(at.x[r].add(g * QUADS * 4), QUADS * 4),
                    if MINS { 0 } else { *at.starts[r].add(g) },
                    if SUPER { 1.0 } else { *at.scales[r].add(g) },
                )
            };
            let mut acc = [start; PANEL];
            for (codes, x) in codes.as_chunks::<64>().0.iter().zip(x.as_chunks::<4>().0) {
                for (acc, codes) in acc.iter_mut().zip(codes.as_chunks::<4>().0) {
                    for i in 0..4 {
                        *acc += i32::from(codes[i]) * i32::from(x[i]);
                    }
                }
            }
            let into = if SUPER { &mut whole } else { &mut *sums };
            for i in 0..PANEL {
                into[i] += acc[i] as f32 * (chunk.scales[g][i] * scale);
            }
        }
        if MINS {
            for i in 0..PANEL {
                let mut acc = 0;
                for (pair, mins) in chunk.mins.iter().enumerate() {
                    // SAFETY: a chunk has four starts.
                    let two = unsafe { *at.starts[r].add(pair) };
                    acc +=
                        i32::from(mins[i][0]) * i32::from(two as i16) + i32::from(mins[i][1]) * (two >> 16);
                }
                whole[i] -= acc as f32 * chunk.min_scale[i];
            }
        }
        if SUPER {
            // SAFETY: a chunk has a scale.
            let scale = unsafe { *at.scales[r] };
            for i in 0..PANEL {
                sums[i] += whole[i] * scale;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHUNK, Chunk, Format, PANEL, Panel, Rows, Unpacked, prefetch, unpack};
    use std::arch::x86_64::*;

    /// # Safety
    /// The features; rows within the activations, a whole panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn panel_avx512(p: &Panel, space: &mut Unpacked, sums: &mut [[f32; PANEL]]) {
        let half = |bytes: &[u8; 32], to: &mut [f32; PANEL]| {
            // SAFETY: 32 bytes are read, 16 floats written.
            unsafe {
                let wide = _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast()));
                _mm512_storeu_ps(to.as_mut_ptr(), wide);
            }
        };
        each_chunk!(p, space, sums, half, 12, tile_avx512, 1 2 3 4 5 6 7 8 9 10 11 12);
    }

    /// As `tile_portable`, with dot products of quads.
    ///
    /// # Safety
    /// As [`panel_avx512`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn tile_avx512<
        const R: usize,
        const QUADS: usize,
        const SPAN: usize,
        const SUPER: bool,
        const MINS: bool,
    >(
        p: &Panel,
        chunk: &Chunk,
        rows: &[u32],
        sums: &mut [[f32; PANEL]],
    ) {
        let at = Rows::<R>::at(p, &rows[..R], chunk.index);
        // SAFETY: the rows have `len` elements, and starts and scales for their groups; prefetches may go anywhere.
        unsafe {
            let codes = chunk.codes.as_ptr();
            // A chunk's sums of a row, or the row's own.
            let mut sum = [_mm512_setzero_ps(); R];
            if !SUPER {
                for r in 0..R {
                    sum[r] = _mm512_loadu_ps(sums[r].as_ptr());
                }
            }
            for g in 0..chunk.len / (QUADS * 4) {
                let mut acc = [_mm512_setzero_si512(); R];
                if !MINS {
                    for r in 0..R {
                        acc[r] = _mm512_set1_epi32(*at.starts[r].add(g));
                    }
                }
                for j in 0..QUADS {
                    let w = _mm512_loadu_si512(codes.add((g * QUADS + j) * 64).cast());
                    for r in 0..R {
                        let x = at.x[r].add((g * QUADS + j) * 4).cast::<i32>().read_unaligned();
                        acc[r] = _mm512_dpbusd_epi32(acc[r], w, _mm512_set1_epi32(x));
                    }
                }
                let scale = _mm512_loadu_ps(chunk.scales[g].as_ptr());
                for r in 0..R {
                    let by = if SUPER {
                        scale
                    } else {
                        _mm512_mul_ps(scale, _mm512_set1_ps(*at.scales[r].add(g)))
                    };
                    sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r]), by, sum[r]);
                }
            }
            if MINS {
                let by = _mm512_loadu_ps(chunk.min_scale.as_ptr());
                let mut acc = [_mm512_setzero_si512(); R];
                for pair in 0..4 {
                    let mins = _mm512_loadu_si512(chunk.mins[pair].as_ptr().cast());
                    for r in 0..R {
                        let two = _mm512_set1_epi32(*at.starts[r].add(pair));
                        acc[r] = _mm512_dpwssd_epi32(acc[r], mins, two);
                    }
                }
                for r in 0..R {
                    sum[r] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(acc[r]), by, sum[r]);
                }
            }
            for r in 0..R {
                let to = sums[r].as_mut_ptr();
                if SUPER {
                    let scale = _mm512_set1_ps(*at.scales[r]);
                    sum[r] = _mm512_fmadd_ps(sum[r], scale, _mm512_loadu_ps(to));
                }
                _mm512_storeu_ps(to, sum[r]);
            }
        }
    }

    /// # Safety
    /// As [`panel_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn panel_avx2(p: &Panel, space: &mut Unpacked, sums: &mut [[f32; PANEL]]) {
        let half = |bytes: &[u8; 32], to: &mut [f32; PANEL]| {
            // SAFETY: 32 bytes are read, 16 floats written.
            unsafe {
                for i in 0..2 {
                    let wide = _mm256_cvtph_ps(_mm_loadu_si128(bytes[16 * i..].as_ptr().cast()));
                    _mm256_storeu_ps(to[8 * i..].as_mut_ptr(), wide);
                }
            }
        };
        each_chunk!(p, space, sums, half, 4, tile_avx2, 1 2 3 4);
    }

    /// As `tile_portable`, eight columns at a time: products of bytes are joined in 16 bits, `SPAN` quads of them before the sum
    /// goes to 32. Codes of 8 bits would not fit there without a sign: they and the elements change it together.
    ///
    /// # Safety
    /// As [`panel_avx2`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile_avx2<
        const R: usize,
        const QUADS: usize,
        const SPAN: usize,
        const SUPER: bool,
        const MINS: bool,
    >(
        p: &Panel,
        chunk: &Chunk,
        rows: &[u32],
        sums: &mut [[f32; PANEL]],
    ) {
        let at = Rows::<R>::at(p, &rows[..R], chunk.index);
        // SAFETY: as in `tile_avx512`.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let signed = SPAN == 1;
            for half in 0..2 {
                let codes = chunk.codes.as_ptr().add(half * 32);
                let mut sum = [_mm256_setzero_ps(); R];
                if !SUPER {
                    for r in 0..R {
                        sum[r] = _mm256_loadu_ps(sums[r][half * 8..].as_ptr());
                    }
                }
                for g in 0..chunk.len / (QUADS * 4) {
                    let mut acc = [_mm256_setzero_si256(); R];
                    if !MINS && !signed {
                        for r in 0..R {
                            acc[r] = _mm256_set1_epi32(*at.starts[r].add(g));
                        }
                    }
                    for span in 0..QUADS / SPAN {
                        let mut short = [_mm256_setzero_si256(); R];
                        for j in span * SPAN..(span + 1) * SPAN {
                            let mut w = _mm256_loadu_si256(codes.add((g * QUADS + j) * 64).cast());
                            let mut sign = w;
                            if signed {
                                sign = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                                w = _mm256_abs_epi8(sign);
                            }
                            for r in 0..R {
                                let x = at.x[r].add((g * QUADS + j) * 4).cast::<i32>().read_unaligned();
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
                    let scale = _mm256_loadu_ps(chunk.scales[g][half * 8..].as_ptr());
                    for r in 0..R {
                        let by = if SUPER {
                            scale
                        } else {
                            _mm256_mul_ps(scale, _mm256_set1_ps(*at.scales[r].add(g)))
                        };
                        sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r]), by, sum[r]);
                    }
                }
                if MINS {
                    let by = _mm256_loadu_ps(chunk.min_scale[half * 8..].as_ptr());
                    for r in 0..R {
                        let mut acc = _mm256_setzero_si256();
                        for pair in 0..4 {
                            let mins = _mm256_loadu_si256(chunk.mins[pair][half * 8..].as_ptr().cast());
                            let two = _mm256_set1_epi32(*at.starts[r].add(pair));
                            acc = _mm256_add_epi32(acc, _mm256_madd_epi16(mins, two));
                        }
                        sum[r] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(acc), by, sum[r]);
                    }
                }
                for r in 0..R {
                    let to = sums[r][half * 8..].as_mut_ptr();
                    if SUPER {
                        let scale = _mm256_set1_ps(*at.scales[r]);
                        sum[r] = _mm256_fmadd_ps(sum[r], scale, _mm256_loadu_ps(to));
                    }
                    _mm256_storeu_ps(to, sum[r]);
                }
            }
        }
    }
}
