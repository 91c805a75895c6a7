//! Products of 8-bit activations with coded panels, chunk by chunk of k: a chunk is unpacked once and then met by all rows.

use super::activations::{SCALES, STARTS, View};
use super::pack::halves;
use super::unpack::{Unpacked, code_bytes, codes, scales, start_of_codes};
use super::{CHUNK, Format, PANEL};
use crate::simd::{Dots, Level};

/// One or two panels and the rows that meet them.
pub(super) struct Panels<'a> {
    pub format: Format,
    pub k: usize,
    /// The second may be the first again.
    pub bytes: [&'a [u8]; 2],
    /// Only the first panel counts.
    pub single: bool,
    pub activations: View<'a>,
    pub rows: &'a [u32],
    /// What is needed after them; null where that is not known.
    pub next: *const u8,
}

/// `sums` \[rows, 16\] of each panel.
pub(super) fn panels(level: Level, p: &Panels, space: &mut [Unpacked; 2], sums: &mut [Vec<[f32; PANEL]>; 2]) {
    let a = p.activations;
    assert!(a.k() == p.k && p.rows.iter().all(|row| (*row as usize) < a.rows()), "rows of the activations");
    a.check(level, p.format);
    assert!(p.bytes.iter().all(|panel| panel.len() >= p.format.panel_bytes(p.k)), "panels of k elements");
    let [first, second] = sums;
    let mut sums = [&mut first[..p.rows.len()], &mut second[..p.rows.len()]];
    sums.iter_mut().for_each(|sums| sums.as_flattened_mut().fill(0.0));
    // SAFETY: the level is the machine's; rows, panels and the form of the activations were just checked.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if Dots::of(level).int8 => x86::panels_avx512(p, space, &mut sums),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => x86::panels_avx2(p, space, &mut sums),
            _ => panels_portable(p, space, &mut sums),
        }
    }
}

/// Sums of the rows of a tile, or of all, by panel.
type Sums<'a, 'b> = &'a mut [&'b mut [[f32; PANEL]]; 2];

/// Where a tile's rows have a chunk; their scales and starts are behind it.
#[inline(always)]
fn rows_at<const R: usize>(p: &Panels, rows: &[u32], chunk: usize) -> [*const i8; R] {
    let rows = &rows[..R];
    std::array::from_fn(|r| p.activations.chunk(chunk, rows[r] as usize).cast())
}

/// The scale of a group of 32 elements, or of the chunk.
///
/// # Safety
/// `x` is the chunk of a row.
#[inline(always)]
unsafe fn scale(x: *const i8, group: usize) -> f32 {
    // SAFETY: behind the elements of a chunk.
    unsafe { *x.add(SCALES).cast::<f32>().add(group) }
}

/// What the sum of a group starts from; two sums of Q4_K.
///
/// # Safety
/// As [`scale`].
#[inline(always)]
unsafe fn start(x: *const i8, group: usize) -> i32 {
    // SAFETY: behind the scales of a chunk.
    unsafe { *x.add(STARTS).cast::<i32>().add(group) }
}

/// A chunk of each panel.
struct Chunk<'a> {
    index: usize,
    /// Elements of k.
    len: usize,
    codes: [&'a [u8]; 2],
    space: &'a [Unpacked; 2],
}

/// Asks for `len` bytes that will be read soon to come to the second-level cache; they may be anywhere, and are nowhere where null.
/// To the first there are too few ways at once: a core would wait for its own requests.
#[inline(always)]
fn prefetch(from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..if from.is_null() { 0 } else { len }).step_by(64) {
        // SAFETY: SSE is part of x86-64, and a prefetch has no effect on what the program computes.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(line).cast());
        }
    }
    let _ = (from, len);
}

/// Calls `$tile::<R, V, ..>(p, &chunk, rows, first, sums)` for each chunk of `$v` panels and each tile of rows, of which `first` is the
/// first; `$unpack(format, bytes, len, space)` brings codes and scales to the space.
macro_rules! each_chunk {
    ($p:ident, $space:ident, $sums:ident, $unpack:expr, $v:literal, $height:literal, $tile:ident, $($r:literal)*) => {{
        let mut at = 0;
        for first in (0..$p.k).step_by(CHUNK) {
            let len = CHUNK.min($p.k - first);
            let size = $p.format.chunk_bytes(len);
            let bytes = $p.bytes.map(|panel| &panel[at..][..size]);
            at += size;
            let more = first + CHUNK < $p.k;
            for v in 0..$v {
                $unpack($p.format, bytes[v], len, &mut $space[v]);
                match more {
                    true => prefetch($p.bytes[v][at..].as_ptr(), size),
                    false if v == 0 => prefetch($p.next, size),
                    false => {}
                }
            }
            let space: &[Unpacked; 2] = $space;
            let codes = [0, 1].map(|v| code_bytes($p.format, bytes[v], len, &space[v]));
            let chunk = Chunk { index: first / CHUNK, len, codes, space };
            let tiles = $p.rows.len().div_ceil($height).max(1);
            let (low, more) = ($p.rows.len() / tiles, $p.rows.len() % tiles);
            let mut row = 0;
            for tile in 0..tiles {
                let height = low + usize::from(tile < more);
                let rows = &$p.rows[row..][..height];
                match (height, $p.format) {
                    $(
                        // SAFETY: by the caller's promise.
                        ($r, Format::Q4K) => unsafe { $tile::<$r, $v, 8, 4, true, true>($p, &chunk, rows, row, $sums) },
                        // SAFETY: as above.
                        ($r, Format::Q6K) => unsafe { $tile::<$r, $v, 4, 2, true, false>($p, &chunk, rows, row, $sums) },
                        // SAFETY: as above.
                        ($r, Format::Q8_0) => unsafe { $tile::<$r, $v, 8, 1, false, false>($p, &chunk, rows, row, $sums) },
                        // SAFETY: as above.
                        ($r, _) => unsafe { $tile::<$r, $v, 8, 4, false, false>($p, &chunk, rows, row, $sums) },
                    )*
                    _ => {}
                }
                row += height;
            }
        }
    }};
}

fn panels_portable(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
    let unpack = |format, bytes: &[u8], len, space: &mut Unpacked| {
        scales(format, bytes, len, space, halves);
        codes(format, bytes, len, &mut space.codes);
    };
    if p.single {
        each_chunk!(p, space, sums, unpack, 1, 1, tile_portable, 1);
    } else {
        each_chunk!(p, space, sums, unpack, 2, 1, tile_portable, 1);
    }
}

/// A tile of a chunk of `V` panels whose groups have `QUADS` quads of k; `SUPER`: one scale of activations for the chunk; `MINS`: and
/// minima.
///
/// # Safety
/// Rows within the activations.
unsafe fn tile_portable<
    const R: usize,
    const V: usize,
    const QUADS: usize,
    const SPAN: usize,
    const SUPER: bool,
    const MINS: bool,
>(
    p: &Panels,
    chunk: &Chunk,
    rows: &[u32],
    first: usize,
    sums: Sums,
) {
    let at = rows_at::<R>(p, rows, chunk.index);
    for v in 0..V {
        for (r, sums) in sums[v][first..][..R].iter_mut().enumerate() {
            // SAFETY: the row has the elements of a chunk, and what is behind them.
            unsafe {
                row_portable::<QUADS, SUPER, MINS>(at[r], chunk.len, chunk.codes[v], &chunk.space[v], sums)
            };
        }
    }
}

/// A row of a chunk, `x`, and a panel.
///
/// # Safety
/// `x` is the chunk of a row of `len` elements.
unsafe fn row_portable<const QUADS: usize, const SUPER: bool, const MINS: bool>(
    x: *const i8,
    len: usize,
    codes: &[u8],
    space: &Unpacked,
    sums: &mut [f32; PANEL],
) {
    let mut whole = [0.0f32; PANEL];
    for (g, codes) in codes[..len * PANEL].chunks_exact(QUADS * 64).enumerate() {
        // SAFETY: the row has these elements, and a start and a scale for each group.
        let (x, first, by) = unsafe {
            (
                std::slice::from_raw_parts(x.add(g * QUADS * 4), QUADS * 4),
                if MINS { 0 } else { start(x, g) },
                if SUPER { 1.0 } else { scale(x, g) },
            )
        };
        let mut acc = [first; PANEL];
        for (codes, x) in codes.as_chunks::<64>().0.iter().zip(x.as_chunks::<4>().0) {
            for (acc, codes) in acc.iter_mut().zip(codes.as_chunks::<4>().0) {
                for i in 0..4 {
                    *acc += i32::from(codes[i]) * i32::from(x[i]);
                }
            }
        }
        let into = if SUPER { &mut whole } else { &mut *sums };
        for i in 0..PANEL {
            into[i] += acc[i] as f32 * (space.scales[g][i] * by);
        }
    }
    if MINS {
        for i in 0..PANEL {
            let mut acc = 0;
            for (pair, mins) in space.mins.iter().enumerate() {
                // SAFETY: a chunk has four starts.
                let two = unsafe { start(x, pair) };
                acc += i32::from(mins[i][0]) * i32::from(two as i16) + i32::from(mins[i][1]) * (two >> 16);
            }
            whole[i] -= acc as f32 * space.min_scale[i];
        }
    }
    if SUPER {
        // SAFETY: a chunk has a scale.
        let by = unsafe { scale(x, 0) };
        for i in 0..PANEL {
            sums[i] += whole[i] * by;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// # Safety
    /// The features; rows within the activations, whole panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn panels_avx512(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
        let count = if p.single { 1 } else { 2 };
        macro_rules! few {
            ($($r:literal)*) => {
                for v in 0..count {
                    let next = if v + 1 < count { p.bytes[1].as_ptr() } else { p.next };
                    let (space, sums) = (&mut space[v], &mut *sums[v]);
                    match (p.rows.len(), p.format) {
                        $(
                            // SAFETY: by the caller's promise.
                            ($r, Format::Q8_0) => unsafe { few_avx512::<$r, Q8_0>(p, p.bytes[v], next, space, sums) },
                            // SAFETY: as above.
                            ($r, Format::Q4_0) => unsafe { few_avx512::<$r, Q4_0>(p, p.bytes[v], next, space, sums) },
                            // SAFETY: as above.
                            ($r, Format::Mxfp4) => unsafe { few_avx512::<$r, MXFP4>(p, p.bytes[v], next, space, sums) },
                            // SAFETY: as above.
                            ($r, Format::Q4K) => unsafe { few_avx512::<$r, Q4K>(p, p.bytes[v], next, space, sums) },
                            // SAFETY: as above.
                            ($r, Format::Q6K) => unsafe { few_avx512::<$r, Q6K>(p, p.bytes[v], next, space, sums) },
                        )*
                        _ => {}
                    }
                }
            };
        }
        if p.rows.len() <= 4 {
            few!(1 2 3 4);
            return;
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
                unsafe { scales_avx512(bytes, space) };
            } else {
                scales(format, bytes, len, space, half);
            }
            codes(format, bytes, len, &mut space.codes);
        };
        // 12 sums in registers: with two panels a row's quad is read once for both.
        if p.single {
            each_chunk!(p, space, sums, unpack, 1, 12, tile_avx512, 5 6 7 8 9 10 11 12);
        } else {
            each_chunk!(p, space, sums, unpack, 2, 6, tile_avx512, 3 4 5 6);
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

    /// The panel with `R` rows, few enough that it is bound by memory: codes are taken apart in registers, sums stay there.
    ///
    /// # Safety
    /// As [`panels_avx512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn few_avx512<const R: usize, const F: u8>(
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
            Q8_0 => (1, 9),
            Q6K => (3, 4),
            _ => (5, 5),
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
                    scales_avx512(std::slice::from_raw_parts(at, size), space);
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
                            for r in 0..R {
                                let x = rows[r].add((pair * 16 + j) * 4).cast::<i32>();
                                let (x, y) = (x.read_unaligned(), x.add(8).read_unaligned());
                                even[r] = _mm512_dpbusd_epi32(even[r], low, _mm512_set1_epi32(x));
                                odd[r] = _mm512_dpbusd_epi32(odd[r], high, _mm512_set1_epi32(y));
                            }
                        }
                        for line in 0..9 {
                            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add((pair * 9 + line) * 64).cast());
                        }
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
                            for r in 0..R {
                                let x = rows[r].add((g * quads + j) * 4).cast::<i32>().read_unaligned();
                                acc[r] = _mm512_dpbusd_epi32(acc[r], w, _mm512_set1_epi32(x));
                            }
                        }
                        for line in 0..lines {
                            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add((g * lines + line) * 64).cast());
                        }
                        let own = scale_of_group::<F>(at, g);
                        for r in 0..R {
                            let wide = _mm512_cvtepi32_ps(acc[r]);
                            if in_chunks {
                                within[r] = _mm512_fmadd_ps(wide, own, within[r]);
                            } else {
                                let by = _mm512_mul_ps(own, _mm512_set1_ps(scale(rows[r], g)));
                                sum[r] = _mm512_fmadd_ps(wide, by, sum[r]);
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

    /// [`scales`] of Q4_K, whose bits lie across bytes.
    ///
    /// # Safety
    /// The features; a whole chunk.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")]
    unsafe fn scales_avx512(chunk: &[u8], to: &mut Unpacked) {
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

    /// As `tile_portable`, with dot products of quads.
    ///
    /// # Safety
    /// As [`panels_avx512`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn tile_avx512<
        const R: usize,
        const V: usize,
        const QUADS: usize,
        const SPAN: usize,
        const SUPER: bool,
        const MINS: bool,
    >(
        p: &Panels,
        chunk: &Chunk,
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
            for g in 0..chunk.len / (QUADS * 4) {
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
                for v in 0..V {
                    let own = _mm512_loadu_ps(chunk.space[v].scales[g].as_ptr());
                    for r in 0..R {
                        let by =
                            if SUPER { own } else { _mm512_mul_ps(own, _mm512_set1_ps(scale(at[r], g))) };
                        sum[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][v]), by, sum[r][v]);
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

    /// # Safety
    /// As [`panels_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn panels_avx2(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
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
            each_chunk!(p, space, sums, unpack, 1, 4, tile_avx2, 1 2 3 4);
        } else {
            each_chunk!(p, space, sums, unpack, 2, 4, tile_avx2, 1 2 3 4);
        }
    }

    /// As `tile_portable`, eight columns at a time: products of bytes are joined in 16 bits, `SPAN` quads of them before the sum
    /// goes to 32. Codes of 8 bits would not fit there without a sign: they and the elements change it together.
    ///
    /// # Safety
    /// As [`panels_avx2`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile_avx2<
        const R: usize,
        const V: usize,
        const QUADS: usize,
        const SPAN: usize,
        const SUPER: bool,
        const MINS: bool,
    >(
        p: &Panels,
        chunk: &Chunk,
        rows: &[u32],
        first: usize,
        sums: Sums,
    ) {
        let at = rows_at::<R>(p, rows, chunk.index);
        // SAFETY: as in `tile_avx512`.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let signed = SPAN == 1;
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
                for g in 0..chunk.len / (QUADS * 4) {
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
                        let by =
                            if SUPER { own } else { _mm256_mul_ps(own, _mm256_set1_ps(scale(at[r], g))) };
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
}
