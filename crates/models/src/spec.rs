//! What a decoder is made of. Families translate their `config.json` to a [`ModelSpec`] and back; the decoder is
//! built from it and knows no family.

use crate::error::{ModelError, Result};
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

/// Greatest size of anything in a specification: what is greater is a broken file, not a model.
const LIMIT: usize = 1 << 24;

impl ModelSpec {
    /// Checks that the parts fit together.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &str, value: &dyn std::fmt::Display, expected: &str| {
            Err(ModelError::Spec { field: field.into(), value: value.to_string(), expected: expected.into() })
        };
        let a = &self.attention;
        let sizes = [
            ("vocab", self.vocab),
            ("hidden", self.hidden),
            ("max_positions", self.max_positions),
            ("heads", a.heads),
            ("kv_heads", a.kv_heads),
            ("head_dim", a.head_dim),
            ("layers", self.layers.len()),
        ];
        for (field, value) in sizes {
            if value == 0 || value > LIMIT {
                return refuse(field, &value, "must be from 1 to 16777216");
            }
        }
        if !a.heads.is_multiple_of(a.kv_heads) {
            return refuse("kv_heads", &a.kv_heads, &format!("must divide heads = {}", a.heads));
        }
        if !a.head_dim.is_multiple_of(2) {
            return refuse("head_dim", &a.head_dim, "must be even: rotary positions turn pairs");
        }
        if a.window == Some(0) {
            return refuse("window", &0, "must be 1 or more (a token sees itself)");
        }
        if !(a.rope_theta.is_finite() && a.rope_theta > 0.0) {
            return refuse("rope_theta", &a.rope_theta, "must be above 0");
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return refuse("norm_eps", &self.norm_eps, "must be 0 or more");
        }
        if !(self.init_std.is_finite() && self.init_std >= 0.0) {
            return refuse("init_std", &self.init_std, "must be 0 or more");
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let width = |field: &str, value: usize| match value {
                0 => refuse(&format!("layer {l}: {field}"), &value, "must be 1 or more"),
                v if v > LIMIT => refuse(&format!("layer {l}: {field}"), &value, "must be at most 16777216"),
                _ => Ok(()),
            };
            match layer {
                FfnSpec::Dense(mlp) => width("intermediate", mlp.intermediate)?,
                FfnSpec::Moe(moe) => {
                    width("experts", moe.experts)?;
                    width("the experts' intermediate", moe.expert.intermediate)?;
                    if moe.shared_intermediate > LIMIT {
                        width("shared_intermediate", moe.shared_intermediate)?;
                    }
                    senmon_moe::router::build(&moe.router, moe.experts, moe.top_k)?;
                }
            }
        }
        Ok(())
    }

    /// The first MoE layer, if there is one.
    pub fn first_moe(&self) -> Option<&MoeSpec> {
        self.layers.iter().find_map(|layer| match layer {
            FfnSpec::Moe(moe) => Some(moe),
            FfnSpec::Dense(_) => None,
        })
    }
}

/// A small specification with something different in every corner, by seed.
#[cfg(test)]
pub(crate) fn test_spec(seed: u64) -> ModelSpec {
    let stream = senmon_moe::rng::Stream::new(&[seed]);
    let pick = |i: u64, n: u64| (stream.bits(i) % n) as usize;
    let mlp = |i: u64| MlpSpec {
        intermediate: 1 + pick(i, 9),
        activation: Activation::Silu,
        gated: pick(i + 1, 2) == 0,
    };
    let kv_heads = 1 + pick(0, 3);
    ModelSpec {
        vocab: 5 + pick(1, 20),
        hidden: 4 + pick(2, 12),
        max_positions: 64,
        norm_eps: 1e-6,
        tie_embeddings: pick(3, 2) == 0,
        init_std: 0.02,
        attention: AttentionSpec {
            heads: kv_heads * (1 + pick(4, 3)),
            kv_heads,
            head_dim: 2 * (1 + pick(5, 4)),
            qkv_bias: pick(6, 2) == 0,
            out_bias: pick(7, 2) == 0,
            qk_norm: [QkNorm::None, QkNorm::Head, QkNorm::Full][pick(8, 3)],
            window: None,
            rope_theta: 10_000.0,
        },
        layers: (0..3)
            .map(|l| match pick(20 + 20 * l, 2) {
                0 => FfnSpec::Dense(mlp(21 + 20 * l)),
                _ => {
                    let experts = 1 + pick(23 + 20 * l, 5);
                    FfnSpec::Moe(MoeSpec {
                        experts,
                        top_k: 1 + pick(24 + 20 * l, experts as u64),
                        expert: mlp(25 + 20 * l),
                        shared_intermediate: pick(27 + 20 * l, 4),
                        router: RouterConfig {
                            kind: ["topk_pre", "topk_post", "sigmoid_bias"][pick(28 + 20 * l, 3)].into(),
                            ..RouterConfig::default()
                        },
                    })
                }
            })
            .collect(),
        tokens: SpecialTokens::default(),
    }
}
