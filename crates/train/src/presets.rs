//! The presets, and what a model costs.
//!
//! A preset is a whole configuration to start from. Its dense form (`model.ffn = "dense"`) has layers that cost the
//! same operations per token as its MoE layers, the router counted.

use senmon_models::spec::ModelSpec;

use crate::config::{Count, ExpertsConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig};
use crate::error::{Result, TrainError};

/// The presets, smallest first: about 1, 5 and 30 million active parameters.
pub const NAMES: &[&str] = &["nano", "tiny", "small"];

/// A preset by its name.
pub fn preset(name: &str) -> Result<RunConfig> {
    let nano = RunConfig::default();
    Ok(match name {
        "nano" => nano,
        "tiny" => RunConfig {
            model: ModelConfig {
                preset: "tiny".into(),
                layers: 6,
                hidden: 256,
                heads: 8,
                kv_heads: 4,
                vocab: Some(8192),
                ..nano.model
            },
            experts: ExpertsConfig { intermediate: 192, ..nano.experts },
            optimizer: OptimizerConfig { lr: 2e-3, ..nano.optimizer },
            train: TrainConfig { batch: 8, sequence: 512, tokens: Some(100_000_000), ..nano.train },
            data: senmon_data::DataConfig { vocab: 8192, ..nano.data },
            ..nano
        },
        "small" => RunConfig {
            model: ModelConfig {
                preset: "small".into(),
                layers: 8,
                hidden: 512,
                heads: 8,
                kv_heads: 4,
                head_dim: 64,
                vocab: Some(16384),
                ..nano.model
            },
            experts: ExpertsConfig { count: Count::Same(8), intermediate: 640, ..nano.experts },
            optimizer: OptimizerConfig { lr: 1e-3, ..nano.optimizer },
            train: TrainConfig {
                batch: 8,
                sequence: 1024,
                accumulate: 4,
                tokens: Some(600_000_000),
                ..nano.train
            },
            data: senmon_data::DataConfig { vocab: 16384, ..nano.data },
            ..nano
        },
        _ => {
            return Err(TrainError::NoSuchPreset { name: name.to_owned(), known: NAMES.join(", ") });
        }
    })
}

/// The width of a dense feed-forward whose operations per token are those of an MoE layer of plain experts, router counted ([`width_near`]).
///
/// An MoE layer has H·(m·(K·I + shared) + E) multiplications per token, a dense one H·m·width, with m = 3 matrices for a
/// gated MLP and 2 for a plain one.
pub fn dense_twin_width(
    experts: f64,
    top_k: usize,
    intermediate: usize,
    shared: usize,
    gated: bool,
) -> usize {
    let matrices = if gated { 3.0 } else { 2.0 };
    width_near((top_k as f64) * (intermediate as f64) + shared as f64 + experts / matrices)
}

/// A width within 1 % of `exact`: a multiple of 16 if one is near enough, else of 8, 4, 2 or 1.
pub fn width_near(exact: f64) -> usize {
    for step in [16.0, 8.0, 4.0, 2.0] {
        let width = (exact / step).round() * step;
        if (width / exact - 1.0).abs() < 0.01 {
            return width as usize;
        }
    }
    (exact.round() as usize).max(1)
}

/// What a model has and costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Parameters, each counted once (a tied head is the embedding).
    pub total: u64,
    /// Parameters that one token meets: K of E experts, router, shared experts, attention, norms and head. The
    /// embedding table is not counted, since a token reads one row of it; a head tied to it is.
    pub active: u64,
    /// Floating-point operations of a forward pass per token (a multiplication and an addition are two), with the
    /// attention's products averaged over a sequence; training takes three times as many.
    pub flops_per_token: u64,
}

/// Counts a model at sequences of `sequence` tokens.
pub fn footprint(spec: &ModelSpec, sequence: usize) -> Footprint {
    let counts = spec.counts();
    Footprint { total: counts.total, active: counts.active, flops_per_token: spec.flops_per_token(sequence) }
}
