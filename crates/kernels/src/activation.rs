//! The non-linearities of expert MLPs, over rows, forward and backward.

use crate::by_level;
use crate::math::{erf, exp, sigmoid};

/// A non-linearity.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// x · Φ(x), by erf.
    Gelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0)².
    Relu2,
    /// x · Φ(x), Φ by tanh: 0.5·x·(1 + tanh(sqrt(2/π)·(x + 0.044715·x³))) (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// gpt-oss: gate·σ(`alpha`·gate) · (up + 1), the gate at most `limit` and up within ±`limit`.
    Clamped {
        /// Steepness of the sigmoid; gpt-oss has 1.702.
        alpha: f32,
        /// Greatest gate, and greatest magnitude of up; gpt-oss has 7.
        limit: f32,
    },
}

/// [`Activation::Clamped`] as gpt-oss has it.
pub const GPT_OSS: Activation = Activation::Clamped { alpha: 1.702, limit: 7.0 };

/// The value and the slope at x.
#[inline(always)]
fn at<const FMA: bool>(kind: Activation, x: f32) -> (f32, f32) {
    match kind {
        Activation::Silu => {
            let s = sigmoid::<FMA>(x);
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::Gelu => {
            let phi = 0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
            // The density of the normal distribution: exp(-x²/2) / sqrt(2π).
            let density = 0.398_942_3 * exp::<FMA>(-0.5 * x * x);
            (x * phi, phi + x * density)
        }
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::Relu2 => (x.max(0.0) * x.max(0.0), 2.0 * x.max(0.0)),
        Activation::GeluTanh => {
            // 0.5·(1 + tanh(u)) = σ(2u).
            let (u, du) =
                (0.797_884_6 * x * (1.0 + 0.044715 * x * x), 0.797_884_6 * (1.0 + 0.134145 * x * x));
            let s = sigmoid::<FMA>(2.0 * u);
            (x * s, s + 2.0 * x * s * (1.0 - s) * du)
        }
        Activation::Clamped { alpha, limit } => {
            let (inside, x) = (if x <= limit { 1.0 } else { 0.0 }, x.min(limit));
            let s = sigmoid::<FMA>(alpha * x);
            (x * s, inside * s * (1.0 + alpha * x * (1.0 - s)))
        }
    }
}

/// What the up projection contributes, and its slope: itself, but for [`Activation::Clamped`].
#[inline(always)]
fn up_at(kind: Activation, up: f32) -> (f32, f32) {
    match kind {
        Activation::Clamped { limit, .. } => {
            (up.max(-limit).min(limit) + 1.0, if up.abs() <= limit { 1.0 } else { 0.0 })
        }
        _ => (up, 1.0),
    }
}

/// Runs `$body` with the kind known in each arm, so that the loops inside vectorise.
macro_rules! for_kind {
    ($kind:expr, |$k:ident| $body:expr) => {
        match $kind {
            Activation::Silu => {
                let $k = Activation::Silu;
                $body
            }
            Activation::Gelu => {
                let $k = Activation::Gelu;
                $body
            }
            Activation::Relu => {
                let $k = Activation::Relu;
                $body
            }
            Activation::Relu2 => {
                let $k = Activation::Relu2;
                $body
            }
            Activation::GeluTanh => {
                let $k = Activation::GeluTanh;
                $body
            }
            $k @ Activation::Clamped { .. } => $body,
        }
    };
}

by_level! {
    /// `out = act(gate) · up`, element by element.
    pub fn gated(kind: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        for_kind!(kind, |known| for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = at::<FMA>(known, *gate).0 * up_at(known, *up).0;
        })
    }
}

by_level! {
    /// `out = act(x)`, element by element.
    pub fn plain(kind: Activation, x: &[f32], out: &mut [f32]) {
        for_kind!(kind, |known| for (out, x) in out.iter_mut().zip(x) {
            *out = at::<FMA>(known, *x).0;
        })
    }
}

by_level! {
    /// From the gradient of [`gated`]'s result, those of its arguments, in their place.
    pub fn gated_backward(kind: Activation, d_out: &[f32], gate: &mut [f32], up: &mut [f32]) {
        for_kind!(kind, |known| for ((d, gate), up) in d_out.iter().zip(gate).zip(up) {
            let (value, slope) = at::<FMA>(known, *gate);
            let (up_value, up_slope) = up_at(known, *up);
            *gate = d * up_value * slope;
            *up = d * value * up_slope;
        })
    }
}

by_level! {
    /// From the gradient of [`plain`]'s result, that of its argument, in its place.
    pub fn plain_backward(kind: Activation, d_out: &[f32], x: &mut [f32]) {
        for_kind!(kind, |known| for (d, x) in d_out.iter().zip(x) {
            *x = d * at::<FMA>(known, *x).1;
        })
    }
}

/// The value at x in f64, by other formulas than the kernels': the reference in tests.
pub fn reference(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => {
            // Φ by Simpson's rule on the density from 0 to x.
            let (n, h) = (2000, x / 2000.0);
            let f = |i: usize| (-0.5 * (i as f64 * h).powi(2)).exp();
            let inner: f64 = (1..n).map(|i| f(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
            let integral = (f(0) + inner + f(n)) * h / 3.0;
            x * (0.5 + integral / (2.0 * std::f64::consts::PI).sqrt())
        }
        Activation::Relu => x.max(0.0),
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
        Activation::Clamped { alpha, limit } => {
            let x = x.min(limit as f64);
            x / (1.0 + (-(alpha as f64) * x).exp())
        }
    }
}

/// What the up projection contributes, in f64.
pub fn up_reference(kind: Activation, up: f64) -> f64 {
    match kind {
        Activation::Clamped { limit, .. } => up.max(-limit as f64).min(limit as f64) + 1.0,
        _ => up,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    const KINDS: [Activation; 7] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::Relu,
        Activation::Relu2,
        Activation::GeluTanh,
        GPT_OSS,
        Activation::Clamped { alpha: 1.1, limit: 0.7 },
    ];

    #[test]
    fn values_and_slopes_agree_with_the_definitions() {
        let xs: Vec<f32> = (-80..=80).map(|i| i as f32 * 0.1 + 0.013).collect();
        let ups: Vec<f32> = xs.iter().map(|x| 1.5 - 1.3 * x).collect();
        for level in Level::available() {
            for kind in KINDS {
                let mut out = vec![0.0; xs.len()];
                gated(level, kind, &xs, &ups, &mut out);
                let (mut d_gate, mut d_up) = (xs.clone(), ups.clone());
                gated_backward(level, kind, &vec![1.0; xs.len()], &mut d_gate, &mut d_up);
                let (mut alone, mut d_alone) = (vec![0.0; xs.len()], xs.clone());
                plain(level, kind, &xs, &mut alone);
                plain_backward(level, kind, &vec![1.0; xs.len()], &mut d_alone);
                for i in 0..xs.len() {
                    let (x, up, h) = (xs[i] as f64, ups[i] as f64, 1e-5);
                    let up_slope = (up_reference(kind, up + h) - up_reference(kind, up - h)) / (2.0 * h);
                    let (value, up) = (reference(kind, x), up_reference(kind, up));
                    let slope = (reference(kind, x + h) - reference(kind, x - h)) / (2.0 * h);
                    let near = |got: f32, want: f64| (got as f64 - want).abs() <= 4e-6 * (1.0 + want.abs());
                    assert!(near(alone[i], value), "{kind:?}({x}) = {}, not {value}", alone[i]);
                    assert!(near(out[i], value * up), "{kind:?}({x})·{up}");
                    assert!(near(d_up[i], value * up_slope) && near(d_gate[i], slope * up), "{kind:?}'({x})");
                    assert!(near(d_alone[i], slope), "{kind:?}'({x}) = {}, not {slope}", d_alone[i]);
                }
            }
        }
    }
}
