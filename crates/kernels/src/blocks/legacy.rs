//! The types of 32 elements with one scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.
//!
//! Of a byte of two elements, the low bits are element i and the high bits element i + 16.

use super::floats::{f32_to_f16, half_at};
use super::{pairs, pairs_mut};
use crate::by_level;

by_level! {
    /// Scale, 16 bytes of elements that stand for -8 to 7.
    pub(super) fn q4_0(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<18, 32>(bytes, out) {
            let d = half_at(block, 0);
            let q = four_bits(&block[2..]);
            for i in 0..32 {
                out[i] = d * f32::from(q[i] as i8 - 8);
            }
        }
    }
}

by_level! {
    /// Scale, minimum, 16 bytes of elements from 0 to 15.
    pub(super) fn q4_1(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<20, 32>(bytes, out) {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            let q = four_bits(&block[4..]);
            for i in 0..32 {
                out[i] = d * f32::from(q[i]) + m;
            }
        }
    }
}

by_level! {
    /// Scale, 32 fifth bits, 16 bytes of the other four; elements stand for -16 to 15.
    pub(super) fn q5_0(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<22, 32>(bytes, out) {
            let d = half_at(block, 0);
            let q = five_bits(block, 2);
            for i in 0..32 {
                out[i] = d * f32::from(q[i] as i8 - 16);
            }
        }
    }
}

by_level! {
    /// Scale, minimum, 32 fifth bits, 16 bytes of the other four; elements from 0 to 31.
    pub(super) fn q5_1(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<24, 32>(bytes, out) {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            let q = five_bits(block, 4);
            for i in 0..32 {
                out[i] = d * f32::from(q[i]) + m;
            }
        }
    }
}

/// 32 elements in 16 bytes.
#[inline(always)]
pub(super) fn four_bits(bytes: &[u8]) -> [u8; 32] {
    let mut q = [0; 32];
    for i in 0..16 {
        q[i] = bytes[i] & 15;
        q[i + 16] = bytes[i] >> 4;
    }
    q
}

/// The 32 elements whose fifth bits stand at `at`, and behind them the other four.
#[inline(always)]
fn five_bits(block: &[u8], at: usize) -> [u8; 32] {
    let high = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let mut q = four_bits(&block[at + 4..]);
    for i in 0..32 {
        q[i] |= ((high >> i & 1) << 4) as u8;
    }
    q
}

by_level! {
    /// Scale, 32 elements from -128 to 127.
    pub(super) fn q8_0(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in pairs::<34, 32>(bytes, out) {
            let d = half_at(block, 0);
            for i in 0..32 {
                out[i] = f32::from(block[2 + i] as i8) * d;
            }
        }
    }
}

/// To `Q4_0`: the element furthest from zero, with its sign, becomes -8.
pub(super) fn to_q4_0(x: &[f32], out: &mut [u8]) {
    for (x, block) in pairs_mut::<32, 18>(x, out) {
        let furthest = x.iter().fold(x[0], |m, x| if x.abs() > m.abs() { *x } else { m });
        let d = furthest / -8.0;
        let by = inverse(d);
        let q = |x: f32| ((x * by + 8.5) as u8).min(15);
        block[..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        for i in 0..16 {
            block[2 + i] = q(x[i]) | q(x[i + 16]) << 4;
        }
    }
}

/// To `Q8_0`: the element furthest from zero becomes 127 or -127.
pub(super) fn to_q8_0(x: &[f32], out: &mut [u8]) {
    for (x, block) in pairs_mut::<32, 34>(x, out) {
        let d = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
        let by = inverse(d);
        block[..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        for i in 0..32 {
            block[2 + i] = (x[i] * by).round() as i8 as u8;
        }
    }
}

/// 1 / d; 0 for 0, so that a block of zeros is one.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
