//! What a user says of a router, its balancing and its experts: the `[router]` and `[balance]` tables.

use serde::{Deserialize, Serialize};

/// How tokens choose experts (`[router]`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// The kind, by its name in `router::KINDS`.
    pub kind: String,
    /// Divide the weights of the picked experts by their sum, for the kinds where that is a choice.
    pub normalize: bool,
    /// Factor on the weights (`routed_scaling_factor` of DeepSeek).
    pub scale: f64,
    /// The experts are in this many groups of equal size, of which a token may use [`top_groups`](Self::top_groups).
    pub groups: usize,
    /// Groups that a token may use.
    pub top_groups: usize,
    /// What becomes of the scores of the other groups.
    pub group_mask: GroupMask,
    /// In training, the router's copy of its input is multiplied by U(1 - jitter, 1 + jitter).
    pub jitter: f64,
    /// Factor on the standard deviation that the router's weights start from.
    pub init_scale: f64,
    /// `softmax_bias` divides its weights by their sum, or by this where the sum is less.
    pub least_sum: f64,
    /// ε of `sparsemixer`: logits within 2ε of the greatest, in parts of it, share the softmax.
    pub sparsemixer_eps: f64,
}

/// What becomes of the scores of groups that a token may not use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupMask {
    /// They are out.
    #[default]
    Inf,
    /// They count as 0, and win where all others are below it (some families' code in transformers).
    Zero,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            kind: "topk_pre".into(),
            normalize: true,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
            group_mask: GroupMask::Inf,
            jitter: 0.0,
            init_scale: 1.0,
            least_sum: 1e-12,
            sparsemixer_eps: 0.01,
        }
    }
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
    /// The tokens of all layers joined into one f and one P, times k (transformers).
    Huggingface,
}

/// Which picks the auxiliary loss counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxCounts {
    /// What was picked, bias included.
    #[default]
    Picked,
    /// The top-k of the scores without bias (DeepSeek-V3, eq. 18).
    Unbiased,
}

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
    /// Coefficient of the z-loss, mean over tokens of logsumexp(z)², mean over layers (ST-MoE, 2202.08906).
    pub z: f64,
    /// Step of the bias of `sigmoid_bias`: b_i += u·sign(mean(c) - c_i) once per optimiser step (2408.15664).
    pub bias_rate: f64,
    /// Move the mean of the bias back to 0 after each step.
    pub recentre: bool,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self {
            aux: 0.01,
            convention: Convention::Senmon,
            aux_counts: AuxCounts::Picked,
            z: 0.001,
            bias_rate: 0.0,
            recentre: false,
        }
    }
}
