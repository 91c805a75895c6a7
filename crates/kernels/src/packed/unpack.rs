//! A chunk of a coded panel, brought to what the kernels of 8-bit products read: a byte for each code, scales in f32.

use super::{CHUNK, Format, PANEL};
use crate::blocks::half_scale;

/// What a chunk becomes.
#[repr(C, align(64))]
pub(super) struct Unpacked {
    /// Quads of k of the 16 columns, one quad of all columns after another.
    pub codes: [u8; CHUNK * PANEL],
    /// A scale for each group (of 32 elements, or of 16) and column.
    pub scales: [[f32; PANEL]; CHUNK / 16],
    /// Minima of Q4_K of two groups beside each other: of a column those of groups 2p and 2p + 1.
    pub mins: [[[i16; 2]; PANEL]; 4],
    /// What they are multiplied by.
    pub min_scale: [f32; PANEL],
}

impl Unpacked {
    pub const fn new() -> Self {
        Self {
            codes: [0; CHUNK * PANEL],
            scales: [[0.0; PANEL]; CHUNK / 16],
            mins: [[[0; 2]; PANEL]; 4],
            min_scale: [0.0; PANEL],
        }
    }
}

/// Where the codes of a chunk of `len` elements of k begin: behind the scales, so that a chunk is read from its first line to its last, as
/// a processor foresees it.
#[inline(always)]
pub(super) fn start_of_codes(format: Format, len: usize) -> usize {
    let codes = match format {
        Format::F32 | Format::F16 | Format::Bf16 => 0,
        Format::Q8_0 => len * PANEL,
        Format::Q4_0 | Format::Mxfp4 | Format::Q4K => len * PANEL / 2,
        Format::Q6K => len * PANEL / 4 * 3,
    };
    format.chunk_bytes(len) - codes
}

/// Brings the codes of a chunk of `len` elements of k to bytes, where they are not bytes in the chunk itself: see [`code_bytes`].
///
/// Inlined into functions that are compiled for an instruction set.
#[inline(always)]
pub(super) fn codes(format: Format, chunk: &[u8], len: usize, to: &mut [u8; CHUNK * PANEL]) {
    let codes = &chunk[start_of_codes(format, len)..];
    match format {
        Format::F32 | Format::F16 | Format::Bf16 | Format::Q8_0 => {}
        Format::Q4_0 => {
            for (codes, to) in codes.as_chunks::<256>().0.iter().zip(to.as_chunks_mut::<512>().0) {
                for i in 0..256 {
                    to[i] = codes[i] & 15;
                    to[i + 256] = codes[i] >> 4;
                }
            }
        }
        Format::Mxfp4 => {
            for (codes, to) in codes.as_chunks::<256>().0.iter().zip(to.as_chunks_mut::<512>().0) {
                for i in 0..256 {
                    to[i] = twice_and_twelve(codes[i] & 15);
                    to[i + 256] = twice_and_twelve(codes[i] >> 4);
                }
            }
        }
        Format::Q4K => {
            for (codes, to) in codes.as_chunks::<512>().0.iter().zip(to.as_chunks_mut::<1024>().0) {
                for i in 0..512 {
                    to[i] = codes[i] & 15;
                    to[i + 512] = codes[i] >> 4;
                }
            }
        }
        Format::Q6K => {
            let halves = codes.as_chunks::<1536>().0.iter().map(|half| half.split_at(512));
            for ((high, low), to) in halves.zip(to.as_chunks_mut::<2048>().0) {
                for i in 0..512 {
                    to[i] = low[i] & 15 | (high[i] & 3) << 4;
                    to[i + 512] = low[i + 512] & 15 | (high[i] & 12) << 2;
                    to[i + 1024] = low[i] >> 4 | high[i] & 48;
                    to[i + 1536] = low[i + 512] >> 4 | (high[i] & 192) >> 2;
                }
            }
        }
    }
}

/// Where the bytes are that [`codes`] made of a chunk's codes, or found there.
#[inline(always)]
pub(super) fn code_bytes<'a>(format: Format, chunk: &'a [u8], len: usize, space: &'a Unpacked) -> &'a [u8] {
    if format == Format::Q8_0 { &chunk[start_of_codes(format, len)..] } else { &space.codes }
}

/// Brings the scales and minima of a chunk of `len` elements of k to `to`. `half` decodes 16 numbers in half precision.
///
/// Inlined as [`codes`].
#[inline(always)]
pub(super) fn scales(
    format: Format,
    chunk: &[u8],
    len: usize,
    to: &mut Unpacked,
    half: impl Fn(&[u8; 32], &mut [f32; PANEL]),
) {
    let (groups, rest) = (len / 32, &chunk[..start_of_codes(format, len)]);
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => {}
        Format::Q8_0 | Format::Q4_0 => {
            for (scales, to) in rest.as_chunks::<32>().0.iter().zip(&mut to.scales[..groups]) {
                half(scales, to);
            }
        }
        Format::Mxfp4 => {
            for (scales, to) in rest.as_chunks::<PANEL>().0.iter().zip(&mut to.scales[..groups]) {
                for i in 0..PANEL {
                    to[i] = half_scale(scales[i]);
                }
            }
        }
        Format::Q4K => {
            let (packed, halves) = rest.split_at(192);
            let (packed, halves) = (packed.as_chunks::<PANEL>().0, halves.as_chunks::<32>().0);
            let mut scale = [0.0; PANEL];
            half(&halves[0], &mut scale);
            half(&halves[1], &mut to.min_scale);
            for j in 0..8 {
                let low = j % 4;
                for i in 0..PANEL {
                    // As `blocks::k::scale_and_min`.
                    let (s, m) = if j < 4 {
                        (packed[low][i] & 63, packed[low + 4][i] & 63)
                    } else {
                        let last = packed[low + 8][i];
                        (last & 15 | packed[low][i] >> 6 << 4, last >> 4 | packed[low + 4][i] >> 6 << 4)
                    };
                    to.scales[j][i] = scale[i] * f32::from(s);
                    to.mins[j / 2][i][j % 2] = i16::from(m);
                }
            }
        }
        Format::Q6K => {
            let (scales, halves) = rest.split_at(256);
            let mut scale = [0.0; PANEL];
            half(&halves.as_chunks::<32>().0[0], &mut scale);
            for (coded, to) in scales.as_chunks::<PANEL>().0.iter().zip(&mut to.scales) {
                for i in 0..PANEL {
                    to[i] = scale[i] * f32::from(coded[i] as i8);
                }
            }
        }
    }
}

/// Twice what four bits of MXFP4 stand for, and 12: see `blocks::mxfp4`.
#[inline(always)]
fn twice_and_twelve(q: u8) -> u8 {
    let size = q & 7;
    let twice = size + size.saturating_sub(4) + 2 * size.saturating_sub(6);
    if q > 7 { 12 - twice } else { 12 + twice }
}
