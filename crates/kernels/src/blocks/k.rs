//! The types of 256 elements whose scales are themselves coded: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, decoded.
//!
//! Runs of 32 elements lie one above another in the bits of the same bytes. They are first taken apart, byte
//! by byte with constant shifts, then scaled: two plain loops are vectorised where one is not.

use super::floats::half_at;
use super::pairs;
use crate::by_level;

by_level! {
    /// 16 bytes of a scale and a minimum each, 64 of elements from 0 to 3, scale of scales, scale of minima.
    pub(super) fn q2_k(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<84, 256>(bytes, out) {
            let (d, dmin) = (half_at(block, 80), half_at(block, 82));
            let (scales, q) = (&block[..16], &block[16..80]);
            let mut levels = [0u8; 256];
            for (q, levels) in q.as_chunks::<32>().0.iter().zip(levels.as_chunks_mut::<128>().0) {
                for i in 0..32 {
                    levels[i] = q[i] & 3;
                    levels[i + 32] = q[i] >> 2 & 3;
                    levels[i + 64] = q[i] >> 4 & 3;
                    levels[i + 96] = q[i] >> 6;
                }
            }
            for (g, (levels, out)) in pairs::<16, 16>(&levels, out).enumerate() {
                let scale = d * f32::from(scales[g] & 15);
                let min = dmin * f32::from(scales[g] >> 4);
                for i in 0..16 {
                    out[i] = scale * f32::from(levels[i]) - min;
                }
            }
        }
    }
}

by_level! {
    /// 32 bytes of third bits, 64 of the other two, 12 of scales around zero, their scale; elements stand for
    /// -4 to 3.
    pub(super) fn q3_k(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<110, 256>(bytes, out) {
            let d = half_at(block, 108);
            let (high, low, packed) = (&block[..32], &block[32..96], &block[96..108]);
            let mut levels = [0u8; 256];
            for (half, levels) in levels.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let low = &low[half * 32..][..32];
                for i in 0..32 {
                    let high = high[i] >> (half * 4);
                    levels[i] = low[i] & 3 | (high & 1) << 2;
                    levels[i + 32] = low[i] >> 2 & 3 | (high & 2) << 1;
                    levels[i + 64] = low[i] >> 4 & 3 | high & 4;
                    levels[i + 96] = low[i] >> 6 | (high & 8) >> 1;
                }
            }
            for (g, (levels, out)) in pairs::<16, 16>(&levels, out).enumerate() {
                // Eight bytes have the low bits of scales i and i + 8, the last four the two high bits of
                // four each.
                let scale = (packed[g % 8] >> (g / 8 * 4) & 15) | (packed[8 + g % 4] >> (g / 4 * 2) & 3) << 4;
                let scale = d * f32::from(scale as i8 - 32);
                for i in 0..16 {
                    out[i] = scale * f32::from(levels[i] as i8 - 4);
                }
            }
        }
    }
}

/// Scale and minimum j of eight, six bits each: the first four have bytes of their own, whose two free bits
/// are the high bits of the last four.
#[inline(always)]
pub(super) fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (packed[j] & 63, packed[j + 4] & 63);
    }
    let (scale, min, low) = (packed[j - 4], packed[j], packed[j + 4]);
    (low & 15 | scale >> 6 << 4, low >> 4 | min >> 6 << 4)
}

by_level! {
    /// Scale of scales, scale of minima, 12 bytes of eight scales and minima, 128 of elements from 0 to 15.
    pub(super) fn q4_k(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<144, 256>(bytes, out) {
            let (d, dmin) = (half_at(block, 0), half_at(block, 2));
            let (packed, q) = (&block[4..16], &block[16..]);
            for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (scale, min) = scale_and_min(packed, g);
                let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
                // Groups 2i and 2i + 1 are the low and the high bits of the same bytes.
                let (q, shift) = (&q[g / 2 * 32..][..32], g % 2 * 4);
                for i in 0..32 {
                    out[i] = scale * f32::from(q[i] >> shift & 15) - min;
                }
            }
        }
    }
}

by_level! {
    /// As Q4_K, with 32 bytes of fifth bits before the elements, which are from 0 to 31.
    pub(super) fn q5_k(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<176, 256>(bytes, out) {
            let (d, dmin) = (half_at(block, 0), half_at(block, 2));
            let (packed, high, q) = (&block[4..16], &block[16..48], &block[48..]);
            for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (scale, min) = scale_and_min(packed, g);
                let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
                let (q, shift) = (&q[g / 2 * 32..][..32], g % 2 * 4);
                for i in 0..32 {
                    let q = (q[i] >> shift & 15) | (high[i] >> g & 1) << 4;
                    out[i] = scale * f32::from(q) - min;
                }
            }
        }
    }
}

by_level! {
    /// 128 bytes of the low four bits, 64 of the high two, 16 scales from -128 to 127, their scale; elements
    /// stand for -32 to 31.
    pub(super) fn q6_k(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<210, 256>(bytes, out) {
            let d = half_at(block, 208);
            let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
            let mut levels = [0u8; 256];
            for (half, levels) in levels.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let (low, high) = (&low[half * 64..][..64], &high[half * 32..][..32]);
                for i in 0..32 {
                    levels[i] = low[i] & 15 | (high[i] & 3) << 4;
                    levels[i + 32] = low[i + 32] & 15 | (high[i] & 12) << 2;
                    levels[i + 64] = low[i] >> 4 | high[i] & 48;
                    levels[i + 96] = low[i + 32] >> 4 | (high[i] & 192) >> 2;
                }
            }
            for (g, (levels, out)) in pairs::<16, 16>(&levels, out).enumerate() {
                let scale = d * f32::from(scales[g] as i8);
                for i in 0..16 {
                    out[i] = scale * f32::from(levels[i] as i8 - 32);
                }
            }
        }
    }
}
