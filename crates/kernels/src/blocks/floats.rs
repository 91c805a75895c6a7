//! Floating-point numbers of 16 and 8 bits, and the plain rows that are made of them.

use crate::by_level;

by_level! {
    /// A row of `F32`, little endian.
    pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
        for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *x = f32::from_le_bytes(*b);
        }
    }
}

by_level! {
    /// A row of `F16`.
    pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
        for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *x = f16_to_f32(u16::from_le_bytes(*b));
        }
    }
}

by_level! {
    /// A row of `Bf16`.
    pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
        for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *x = bf16_to_f32(u16::from_le_bytes(*b));
        }
    }
}

/// To `F32`.
pub(super) fn to_f32(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.iter().zip(out.as_chunks_mut::<4>().0) {
        *b = x.to_le_bytes();
    }
}

/// To `F16`.
pub(super) fn to_f16(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.iter().zip(out.as_chunks_mut::<2>().0) {
        *b = f32_to_f16(*x).to_le_bytes();
    }
}

/// To `Bf16`.
pub(super) fn to_bf16(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.iter().zip(out.as_chunks_mut::<2>().0) {
        *b = f32_to_bf16(*x).to_le_bytes();
    }
}

/// The half that stands at `at` in a block.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Half precision to single, exactly; without branches, so that loops of it vectorise.
#[inline(always)]
pub fn f16_to_f32(half: u16) -> f32 {
    let (sign, rest) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff));
    // The bias of the exponent is 112 less; a product with 2^112 puts it right, for subnormal numbers too.
    let finite = f32::from_bits(rest << 13) * f32::from_bits((127 + 112) << 23);
    let special = (rest << 13) | 0x7f80_0000;
    f32::from_bits(sign | if rest >= 0x7c00 { special } else { finite.to_bits() })
}

/// Single precision to half, to the nearest, ties to even; beyond 65519 it is an infinity, and NaN stays NaN.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let (sign, rest) = ((x.to_bits() >> 16) as u16 & 0x8000, x.to_bits() & 0x7fff_ffff);
    // The last bits of 0.5 are those of a subnormal half, so the sum rounds to them.
    let subnormal = (f32::from_bits(rest) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    // The bias taken away, half of what is cut off added, less one where the bit that stays is even.
    let normal = rest.wrapping_sub(112 << 23).wrapping_add(0xfff + (rest >> 13 & 1)) >> 13;
    let nan = 0x7e00 | (rest >> 13 & 0x3ff);
    let half = match rest {
        0..0x3880_0000 => subnormal,
        0x3880_0000..0x477f_f000 => normal,
        0x477f_f000..=0x7f80_0000 => 0x7c00,
        _ => nan,
    };
    sign | half as u16
}

/// The upper half of a single to the single.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Single precision to its upper half, to the nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        // Quiet, so that the bits that are left are not those of an infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Eight bits with four of exponent and three of fraction: FP8 E4M3 without infinities, `F8_E4M3` of
/// safetensors. The greatest is 448; NaN are 0x7f and 0xff.
#[inline(always)]
pub fn fp8_e4m3_to_f32(bits: u8) -> f32 {
    let (sign, rest) = (u32::from(bits & 0x80) << 24, u32::from(bits & 0x7f));
    // As for halves: the bias is 120 less.
    let finite = f32::from_bits(rest << 20) * f32::from_bits((127 + 120) << 23);
    f32::from_bits(sign | if rest == 0x7f { 0x7fc0_0000 } else { finite.to_bits() })
}

/// A scale of eight bits, E8M0: 2^(bits - 127); 255 is NaN.
#[inline(always)]
pub fn e8m0_to_f32(bits: u8) -> f32 {
    match bits {
        // 2^-127 is subnormal.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(bits) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a number with a sign, `e` bits of exponent and `f` bits of fraction, were there no
    /// special ones.
    fn value(bits: u32, e: u32, f: u32) -> f64 {
        let (exponent, fraction) = (bits >> f & ((1 << e) - 1), f64::from(bits & ((1 << f) - 1)));
        let bias = (1 << (e - 1)) - 1;
        let unit = 2f64.powi(exponent.max(1) as i32 - bias - f as i32);
        let size = unit * if exponent == 0 { fraction } else { f64::from(1 << f) + fraction };
        if bits >> (e + f) & 1 == 1 { -size } else { size }
    }

    #[test]
    fn halves_are_what_ieee_says_and_come_back() {
        for half in 0..=u16::MAX {
            let got = f16_to_f32(half);
            let special = half >> 10 & 31 == 31;
            match (special, half & 1023) {
                (true, 0) => assert!(got.is_infinite()),
                (true, _) => assert!(got.is_nan() && f16_to_f32(f32_to_f16(got)).is_nan()),
                _ => assert_eq!(f64::from(got), value(u32::from(half), 5, 10)),
            }
            assert_eq!(got.is_sign_negative(), half >> 15 == 1);
            if !got.is_nan() {
                assert_eq!(f32_to_f16(got), half);
            }
        }
    }

    #[test]
    fn singles_go_to_the_nearest_half_and_ties_to_even() {
        for half in 0..0x7bffu16 {
            let (low, high) = (f16_to_f32(half), f16_to_f32(half + 1));
            let middle = (low + high) / 2.0;
            let even = half + (half & 1);
            for (x, want) in [(middle.next_down(), half), (middle, even), (middle.next_up(), half + 1)] {
                assert_eq!((f32_to_f16(x), f32_to_f16(-x)), (want, want | 0x8000), "{x}");
            }
        }
        assert_eq!(f32_to_f16(65519.996), 0x7bff);
        assert_eq!([65520.0, 1e30, f32::INFINITY].map(f32_to_f16), [0x7c00; 3]);
        assert_eq!([1e-8, f32::MIN_POSITIVE, 1e-45, 0.0].map(f32_to_f16), [0; 4]);
    }

    #[test]
    fn singles_go_to_the_nearest_upper_half() {
        for (x, want) in [
            (0x3f80_7fffu32, 0x3f80),
            (0x3f80_8000, 0x3f80),
            (0x3f81_8000, 0x3f82),
            (0x3f80_8001, 0x3f81),
            (0x7f7f_ffff, 0x7f80),
            (0x7f80_0001, 0x7fc0),
            (0xff80_0000, 0xff80),
            (0x0000_8001, 0x0001),
        ] {
            assert_eq!(f32_to_bf16(f32::from_bits(x)), want, "{x:#x}");
        }
    }

    #[test]
    fn small_floats_are_what_they_say() {
        for bits in 0..=255u8 {
            let got = fp8_e4m3_to_f32(bits);
            if bits & 0x7f == 0x7f {
                assert!(got.is_nan());
            } else {
                assert_eq!(f64::from(got), value(u32::from(bits), 4, 3));
            }
            assert_eq!(got.is_sign_negative(), bits >> 7 == 1);
            let scale = e8m0_to_f32(bits);
            let power = 2f64.powi(i32::from(bits) - 127);
            assert!(if bits == 255 { scale.is_nan() } else { f64::from(scale) == power });
        }
        assert_eq!(fp8_e4m3_to_f32(0x7e), 448.0);
    }
}
