//! `[balance]`.

use serde::{Deserialize, Serialize};

/// How the load is kept even (`[balance]`). A coefficient of 0 turns a term off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalanceConfig {
    /// Coefficient of the auxiliary loss (Switch Transformer, 2101.03961).
    pub aux: f64,
    /// What `aux` means.
    pub convention: Convention,
    /// What the auxiliary loss counts.
    pub aux_counts: AuxCounts,
    /// The tokens over which the auxiliary loss counts.
    pub scope: Scope,
    /// Coefficient of the auxiliary loss of each sequence (DeepSeek-V3, 2412.19437): E/(K·S)·Σ_i count_i · mean of the scores, mean
    /// over sequences and layers.
    pub sequence: f64,
    /// Coefficient of CV² of the sums of the weights by expert (Shazeer 2017).
    pub importance: f64,
    /// Coefficient of CV² of the smooth load of `noisy_topk` (Shazeer 2017; V-MoE).
    pub load: f64,
    /// Coefficient of the z-loss, mean over tokens of logsumexp(z)², mean over layers (ST-MoE, 2202.08906).
    pub z: f64,
    /// Coefficient of the mean entropy of the scores, in nats (`top_p`: 1e-4).
    pub entropy: f64,
    /// Coefficient of the mutual distillation of a token's experts: the mean over its pairs of the squared distance of what they
    /// give, by element (2402.00893); with `random`, of THOR's consistency of two passes (2110.04260).
    pub distill: f64,
    /// Step of the selection bias: b_i += u·sign(mean(c) - c_i) once per optimiser step (2408.15664).
    pub bias_rate: f64,
    /// Move the mean of the bias back to 0 after each step.
    pub recentre: bool,
    /// The selection bias is set to the dual of an even assignment once per optimiser step.
    pub quantile: bool,
    /// Where the router's gradient comes from beyond the picked experts.
    pub dense_gradient: DenseGradient,
    /// Decay of the running means of the experts' outputs, by optimiser step, for `dense_gradient = "ema"`.
    pub ema_decay: f64,
}

/// What a coefficient of the auxiliary loss means: the systems in use differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// α·E·Σ f_i·P_i, mean over the MoE layers: an even router gives α for any k.
    #[default]
    Senmon,
    /// The same, summed over layers (Megatron-Core).
    Megatron,
    /// Summed over layers; `gshard` counts first choices only (DeepSpeed).
    Deepspeed,
    /// The tokens of all layers joined into one f and one P, times k (transformers).
    Huggingface,
    /// Mean over experts of f_i·P_i, f of first choices, without E², summed over layers (fairscale).
    Fairscale,
}

/// Which picks the auxiliary loss counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxCounts {
    /// What was picked, bias included, before any drop.
    #[default]
    Picked,
    /// The top-k of the scores without bias (DeepSeek-V3, eq. 18).
    Unbiased,
}

/// The tokens over which the auxiliary loss counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Those of a micro-batch.
    #[default]
    Micro,
    /// Those of all micro-batches of an optimiser step, whose routing is computed beforehand (2501.11873).
    Global,
}

/// Where the router's gradient comes from beyond the picked experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenseGradient {
    /// Nowhere.
    #[default]
    None,
    /// All experts are computed; those not picked give the router its gradient and nothing else (DenseMixer).
    StraightThrough,
    /// Running means of their outputs stand for the experts that were not picked (2504.12463).
    Ema,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self {
            aux: 0.01,
            convention: Convention::Senmon,
            aux_counts: AuxCounts::Picked,
            scope: Scope::Micro,
            sequence: 0.0,
            importance: 0.0,
            load: 0.0,
            z: 0.001,
            entropy: 0.0,
            distill: 0.0,
            bias_rate: 0.0,
            recentre: false,
            quantile: false,
            dense_gradient: DenseGradient::None,
            ema_decay: 0.9,
        }
    }
}
