//! Elementary functions written so that they vectorise: branch-free arithmetic on one lane, inlined into the
//! loops of [`by_level!`](crate::by_level) bodies.

// Coefficients stand as they were published.
#![allow(clippy::excessive_precision, clippy::approx_constant)]

/// a·b + c, fused where that is one instruction.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// eˣ with a relative error below 2e-7; 0 below -87.3, e⁸⁸ above 88 (no infinity, so that sums stay finite), NaN for NaN.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few bits, so that n·LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5·2²³ rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let tiny = x < -87.3;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if tiny { -87.3 } else { clamped };
    let shifted = fma::<FMA>(clamped, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4;
    p = fma::<FMA>(p, r, 1.398_2e-3);
    p = fma::<FMA>(p, r, 8.333_452e-3);
    p = fma::<FMA>(p, r, 4.166_579_6e-2);
    p = fma::<FMA>(p, r, 1.666_666_5e-1);
    p = fma::<FMA>(p, r, 5.0e-1);
    let e = fma::<FMA>(p, r * r, r) + 1.0;
    // The integer sits in the low mantissa bits of `shifted`.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127).wrapping_shl(23));
    if tiny { 0.0 } else { e * scale }
}

/// σ(x) = 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// erf(x), absolute error below 4e-7: its series up to |x| = 1, beyond it 1 - erfc by Chebyshev fit.
#[inline(always)]
pub fn erf<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    let x2 = x * x;
    // The Taylor series of erf(x)/x, whose last coefficient is bent to close the gap at 1.
    let mut s = 7.853_861e-5;
    s = fma::<FMA>(s, x2, -8.010_193e-4);
    s = fma::<FMA>(s, x2, 5.188_327e-3);
    s = fma::<FMA>(s, x2, -2.685_381_2e-2);
    s = fma::<FMA>(s, x2, 1.128_358_5e-1);
    s = fma::<FMA>(s, x2, -3.761_262_6e-1);
    s = fma::<FMA>(s, x2, 1.128_379_2);
    let small = s * x;
    // erfc(a) = t·exp(-a² + P(t)), t = 1/(1 + a/2): Numerical Recipes' Chebyshev fit, relative error 1.2e-7.
    let t = 1.0 / fma::<FMA>(0.5, a, 1.0);
    let mut p = 0.170_872_77;
    p = fma::<FMA>(p, t, -0.822_152_23);
    p = fma::<FMA>(p, t, 1.488_515_9);
    p = fma::<FMA>(p, t, -1.135_203_98);
    p = fma::<FMA>(p, t, 0.278_868_07);
    p = fma::<FMA>(p, t, -0.186_288_06);
    p = fma::<FMA>(p, t, 0.096_784_18);
    p = fma::<FMA>(p, t, 0.374_091_96);
    p = fma::<FMA>(p, t, 1.000_023_68);
    p = fma::<FMA>(p, t, -1.265_512_23);
    let large = 1.0 - t * exp::<FMA>(fma::<FMA>(-a, a, p));
    if a <= 1.0 { small } else { large.copysign(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_range_and_defined_beyond() {
        let mut worst = 0.0f64;
        for i in -87_300..88_000 {
            let x = i as f32 * 1e-3;
            let exact = (x as f64).exp();
            for got in [exp::<true>(x), exp::<false>(x)] {
                worst = worst.max(((got as f64 - exact) / exact).abs());
            }
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(-1e4), 0.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert!(exp::<true>(1e4).is_finite());
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_close() {
        // Values of erf from tables (Abramowitz & Stegun 7.1), and its oddness.
        let table = [
            (0.1f32, 0.112_462_916_018_284_9f64),
            (0.5, 0.520_499_877_813_046_5),
            (0.9, 0.796_908_212_422_832_1),
            (1.0, 0.842_700_792_949_714_9),
            (1.1, 0.880_205_069_574_081_6),
            (1.5, 0.966_105_146_475_310_7),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
        ];
        for (x, exact) in table {
            for got in [erf::<true>(x), erf::<false>(x), -erf::<true>(-x)] {
                assert!((got as f64 - exact).abs() < 4e-7, "erf({x}) = {got}, not {exact}");
            }
        }
        assert_eq!(erf::<true>(0.0), 0.0);
        assert_eq!(erf::<true>(10.0), 1.0);
    }
}
