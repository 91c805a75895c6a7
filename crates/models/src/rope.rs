//! Rotary positions: which elements turn, how fast, and how the speeds are bent for contexts longer than a model was first
//! trained for. Formulas are those of transformers' `modeling_rope_utils`.

use crate::error::{ModelError, Result};
use senmon_kernels::rotary::{Rope, inverse_frequencies};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;
use std::sync::{Arc, Mutex, PoisonError};

/// What turns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RopeSpec {
    /// Neighbours 2i and 2i + 1 turn together (DeepSeek, Ernie), rather than i and i + half (Llama).
    pub neighbours: bool,
    /// Elements of a head that turn, an even number; `None`: all.
    pub dims: Option<usize>,
    /// How the speeds are bent.
    pub scaling: RopeScaling,
}

/// How speeds are bent for long contexts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All speeds divided by a number.
    Linear {
        /// The number.
        factor: f64,
    },
    /// θ grows with the length of the context beyond `original` ("NTK-aware").
    Dynamic {
        /// How much longer contexts may be.
        factor: f64,
        /// Longest context of the unbent model.
        original: usize,
    },
    /// Slow elements are divided, fast ones are not, a ramp between (YaRN, 2309.00071).
    Yarn {
        /// How much longer contexts are.
        factor: f64,
        /// Longest context of the unbent model.
        original: usize,
        /// Turns over `original` from which on an element is fast.
        beta_fast: f64,
        /// Turns over `original` below which an element is slow.
        beta_slow: f64,
        /// The ramp's ends are whole numbers.
        truncate: bool,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
    /// As YaRN, with a ramp over wavelengths (Llama 3.1).
    Llama3 {
        /// How much slow elements are divided by.
        factor: f64,
        /// Longest context of the unbent model.
        original: usize,
        /// Turns over `original` below which an element is slow.
        low: f64,
        /// Turns over `original` from which on an element is fast.
        high: f64,
    },
    /// A divisor for each speed, one list for contexts up to `original`, one for longer ones (LongRoPE, 2402.13753).
    Longrope {
        /// Up to `original`: \[dims / 2\].
        short: Vec<f64>,
        /// Beyond: \[dims / 2\].
        long: Vec<f64>,
        /// Longest context of the unbent model.
        original: usize,
        /// Factor on cosines and sines up to `original`.
        short_factor: f64,
        /// The same beyond.
        long_factor: f64,
    },
}

/// The factor on the scores of attention that YaRN's papers derive: 0.1·m·ln(scale) + 1.
pub fn yarn_mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

impl RopeSpec {
    /// Elements that turn in a head of `head_dim`.
    pub fn rotated(&self, head_dim: usize) -> usize {
        self.dims.unwrap_or(head_dim)
    }

    /// Checks that it fits heads of `head_dim`.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        let refuse = |field: &str, value: String, expected: &str| {
            Err(ModelError::Spec { field: field.into(), value, expected: expected.into() })
        };
        let dims = self.rotated(head_dim);
        if dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
            let field = if self.dims.is_some() { "rope.dims" } else { "head_dim" };
            return refuse(
                field,
                dims.to_string(),
                "must be even and at most head_dim: rotary positions turn pairs",
            );
        }
        let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => refuse(&format!("rope_scaling.{name}"), value.to_string(), "must be above 0"),
        };
        let whole = |original: usize| positive("original_max_position_embeddings", original as f64);
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic { factor, original } => {
                if dims == 2 {
                    return refuse(
                        "rope_scaling.type",
                        "dynamic".into(),
                        "needs more than two elements that turn",
                    );
                }
                positive("factor", *factor).and(whole(*original))
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => {
                positive("factor", *factor)
                    .and(positive("beta_fast", *beta_fast))
                    .and(positive("beta_slow", *beta_slow))
                    .and(positive("attention_factor", *attention_factor))
                    .and(whole(*original))
            }
            RopeScaling::Llama3 { factor, original, low, high } => {
                if low >= high {
                    return refuse(
                        "rope_scaling.low_freq_factor",
                        low.to_string(),
                        "must be below high_freq_factor",
                    );
                }
                positive("factor", *factor).and(positive("low_freq_factor", *low)).and(whole(*original))
            }
            RopeScaling::Longrope { short, long, original, short_factor, long_factor } => {
                for (name, list) in [("short_factor", short), ("long_factor", long)] {
                    if list.len() != dims / 2 || !list.iter().all(|x| x.is_finite() && *x > 0.0) {
                        let expected = format!("must be {} numbers above 0", dims / 2);
                        let field = format!("rope_scaling.{name}");
                        return refuse(&field, format!("{} values", list.len()), &expected);
                    }
                }
                positive("attention_factor", *short_factor)
                    .and(positive("attention_factor", *long_factor))
                    .and(whole(*original))
            }
        }
    }

    /// Speeds depend on the length of the context.
    fn depends_on_context(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::Longrope { .. })
    }

    /// The speeds of heads of `head_dim` with base `theta` in a context of `context` tokens, and the factor on cosines and
    /// sines.
    pub fn frequencies(&self, theta: f64, head_dim: usize, context: usize) -> (Vec<f32>, f32) {
        let dims = self.rotated(head_dim);
        let plain = || inverse_frequencies(theta, dims);
        match &self.scaling {
            RopeScaling::None => (plain(), 1.0),
            RopeScaling::Linear { factor } => {
                (plain().into_iter().map(|f| (f as f64 / factor) as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor, original } => {
                let ratio = context.max(*original) as f64 / *original as f64;
                let power = dims as f64 / (dims as f64 - 2.0);
                (inverse_frequencies(theta * (factor * ratio - (factor - 1.0)).powf(power), dims), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor } => {
                // The element that makes `turns` turns over the original context.
                let element = |turns: f64| {
                    dims as f64 * (*original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (element(*beta_fast), element(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let bent = plain().into_iter().enumerate().map(|(i, f)| {
                    let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    (f as f64 / factor * slow + f as f64 * (1.0 - slow)) as f32
                });
                (bent.collect(), *attention_factor as f32)
            }
            RopeScaling::Llama3 { factor, original, low, high } => {
                let bent = plain().into_iter().map(|f| {
                    let turns = *original as f64 * f as f64 / (2.0 * PI);
                    let fast = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - fast) * f as f64 / factor + fast * f as f64) as f32
                });
                (bent.collect(), 1.0)
            }
            RopeScaling::Longrope { short, long, original, short_factor, long_factor } => {
                let (divisors, factor) = match context > *original {
                    true => (long, long_factor),
                    false => (short, short_factor),
                };
                let bent = plain().into_iter().zip(divisors).map(|(f, by)| (f as f64 / by) as f32);
                (bent.collect(), *factor as f32)
            }
        }
    }
}

/// The rotations of a model, in tables that grow with the contexts that are asked for.
#[derive(Debug)]
pub struct Rotations {
    spec: RopeSpec,
    theta: f64,
    /// Width of the heads that turn.
    head_dim: usize,
    positions: usize,
    table: Mutex<Option<Arc<Rope>>>,
}

impl Rotations {
    /// For heads of `head_dim`, in contexts of up to `positions` tokens.
    pub fn new(spec: &RopeSpec, theta: f64, head_dim: usize, positions: usize) -> Self {
        Self { spec: spec.clone(), theta, head_dim, positions, table: Mutex::default() }
    }

    /// Longest context.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// A table for a context of `context` tokens, which is at most [`positions`](Self::positions).
    pub fn table(&self, context: usize) -> Arc<Rope> {
        let make = |length: usize, context: usize| {
            let (frequencies, factor) = self.spec.frequencies(self.theta, self.head_dim, context);
            let rope = Rope::new(&frequencies, length, factor);
            Arc::new(if self.spec.neighbours { rope.of_neighbours() } else { rope })
        };
        if self.spec.depends_on_context() {
            return make(context, context);
        }
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        match &*table {
            Some(table) if table.positions() >= context => table.clone(),
            _ => {
                let length = context.next_power_of_two().max(1024).min(self.positions.max(context));
                table.insert(make(length, length)).clone()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speeds(scaling: RopeScaling, context: usize) -> (Vec<f32>, f32) {
        RopeSpec { scaling, ..RopeSpec::default() }.frequencies(10_000.0, 16, context)
    }

    #[test]
    fn the_ends_of_each_ramp_are_plain_and_divided() {
        let (plain, _) = speeds(RopeScaling::None, 10);
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            original: 64,
            beta_fast: 8.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.1,
        };
        let llama = RopeScaling::Llama3 { factor: 4.0, original: 64, low: 1.0, high: 4.0 };
        for scaling in [yarn, llama] {
            let (bent, _) = speeds(scaling, 10);
            assert_eq!(bent[0], plain[0]);
            assert!((bent[7] * 4.0 / plain[7] - 1.0).abs() < 1e-6);
            assert!(bent.iter().zip(&plain).all(|(b, p)| b <= p && *b >= p / 4.001));
        }
        let (bent, _) = speeds(RopeScaling::Linear { factor: 2.0 }, 10);
        assert!(bent.iter().zip(&plain).all(|(b, p)| b * 2.0 == *p));
    }

    #[test]
    fn dynamic_speeds_follow_the_context() {
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original: 64 };
        assert_eq!(speeds(dynamic.clone(), 64), speeds(RopeScaling::None, 64));
        assert_eq!(speeds(dynamic.clone(), 3), speeds(RopeScaling::None, 64));
        assert!(speeds(dynamic, 65).0[7] < speeds(RopeScaling::None, 64).0[7]);
        let long = RopeScaling::Longrope {
            short: vec![1.0; 8],
            long: vec![2.0; 8],
            original: 64,
            short_factor: 1.0,
            long_factor: 1.5,
        };
        assert_eq!(speeds(long.clone(), 64).1, 1.0);
        let (bent, factor) = speeds(long, 65);
        assert_eq!((bent[0], factor), (0.5, 1.5));
    }

    #[test]
    fn tables_grow() {
        let rotations = Rotations::new(&RopeSpec::default(), 1e4, 8, 5000);
        assert_eq!(rotations.table(1).positions(), 1024);
        assert_eq!(rotations.table(1500).positions(), 2048);
        assert_eq!(rotations.table(5000).positions(), 5000);
        assert_eq!(rotations.table(1).positions(), 5000);
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original: 64 };
        let spec = RopeSpec { scaling: dynamic, ..RopeSpec::default() };
        let rotations = Rotations::new(&spec, 1e4, 8, 128);
        assert_eq!(rotations.table(100).positions(), 100);
        assert_ne!(rotations.table(100).angles(60), rotations.table(64).angles(60));
    }
}
