//! FP4 with a power of two for each 32 elements (OCP Microscaling), in GGUF's order: MXFP4.

use super::legacy::four_bits;
use super::{pairs, pairs_mut};
use crate::by_level;

/// Twice what the four bits stand for (a sign, two bits of exponent, one of fraction). There is one zero, as
/// in ggml.
const TWICE: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

by_level! {
    /// The power of two, 16 bytes of elements.
    pub(super) fn mxfp4(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<17, 32>(bytes, out) {
            let scale = half_scale(block[0]);
            let q = four_bits(&block[1..]);
            for i in 0..32 {
                // What the table says, in instructions on many bytes at once.
                let size = q[i] & 7;
                let twice = (size + size.saturating_sub(4) + 2 * size.saturating_sub(6)) as i8;
                let twice = if q[i] > 7 { -twice } else { twice };
                out[i] = scale * f32::from(twice);
            }
        }
    }
}

/// 2^(bits - 128). There is no NaN: 255 is a power like any other, as in ggml.
#[inline(always)]
pub(crate) fn half_scale(bits: u8) -> f32 {
    let bits = u32::from(bits);
    f32::from_bits(if bits < 2 { 1 << (21 + bits) } else { (bits - 1) << 23 })
}

/// To `Mxfp4`: the power of two with which the element furthest from zero is at least 4 of at most 6.
pub(super) fn to_mxfp4(x: &[f32], out: &mut [u8]) {
    for (x, block) in pairs_mut::<32, 17>(x, out) {
        let furthest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        // The logarithm is rounded to f32, as elsewhere: a number just below a power of two may count as one.
        let power = (f64::from(furthest).log2() as f32).floor();
        block[0] = if furthest > 0.0 { (power - 2.0 + 127.0) as u8 } else { 0 };
        let table = TWICE.map(|value| half_scale(block[0]) * value);
        // Of two that are as near, the first.
        let nearest = |x: f32| {
            let mut best = (f32::INFINITY, 0);
            for (i, value) in table.iter().enumerate() {
                let off = (value - x).abs();
                if off < best.0 {
                    best = (off, i as u8);
                }
            }
            best.1
        };
        for i in 0..16 {
            block[1 + i] = nearest(x[i]) | nearest(x[i + 16]) << 4;
        }
    }
}
