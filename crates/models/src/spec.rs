//! What a decoder is made of. Families translate their `config.json` to a [`ModelSpec`] and back; the decoder is
//! built from it and knows no family.

use senmon_kernels::activation::Activation;
use senmon_moe::config::RouterConfig;
use serde::{Deserialize, Serialize};

/// A decoder-only transformer: token embedding, layers of (norm, attention, norm, feed-forward), norm, head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// V, rows of the embedding.
    pub vocab: usize,
    /// H, the width of the residual stream.
    pub hidden: usize,
    /// Longest sequence the positions were made for.
    pub max_positions: usize,
    /// ε of every norm.
    pub norm_eps: f64,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// Standard deviation of freshly drawn weights.
    pub init_std: f64,
    /// The attention of every layer.
    pub attention: AttentionSpec,
    /// The feed-forward of each layer, L of them.
    pub layers: Vec<FfnSpec>,
    /// The tokens that mean something to programs.
    pub tokens: SpecialTokens,
}

/// Causal attention with grouped key-value heads and rotary positions (rotate-half convention).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// D, the width of a head (even); not always `hidden / heads`.
    pub head_dim: usize,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// RMSNorm of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// A token sees itself and this many minus one before it; `None` sees all.
    pub window: Option<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

/// Where queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Nowhere.
    None,
    /// Each head over its D values, one weight \[D\] for all heads (Qwen3, dots1).
    Head,
    /// All heads together, weights \[heads · D\] and \[kv_heads · D\] (OLMoE).
    Full,
}

/// The feed-forward of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FfnSpec {
    /// One MLP for every token.
    Dense(MlpSpec),
    /// Experts behind a router.
    Moe(MoeSpec),
}

/// An MLP: down(act(gate(x)) · up(x)), or down(act(up(x))) when not gated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpSpec {
    /// I, the inner width.
    pub intermediate: usize,
    /// The non-linearity.
    pub activation: Activation,
    /// Has a gate projection.
    pub gated: bool,
}

/// A layer of experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeSpec {
    /// E.
    pub experts: usize,
    /// K, experts per token.
    pub top_k: usize,
    /// What one expert is.
    pub expert: MlpSpec,
    /// Inner width of the shared experts together (every token passes them); 0 for none.
    pub shared_intermediate: usize,
    /// How tokens choose.
    pub router: RouterConfig,
}

/// Token ids that generation and training look at.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Any of these ends a text.
    pub eos: Vec<u32>,
    /// Fills.
    pub pad: Option<u32>,
}
