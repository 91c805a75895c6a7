//! What a decoder is made of. Families translate their `config.json` to a [`ModelSpec`] and back; the decoder is
//! built from it and knows no family.

use crate::error::{ModelError, Result};
use crate::rope::RopeSpec;
use senmon_kernels::activation::Activation;
use senmon_moe::MoeConfig;
use senmon_moe::config::{Extras, RouterConfig};
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
    /// The kind of the norms of the residual stream.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm: NormKind,
    /// Where they are.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm_place: NormPlace,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// The head has a bias \[V\].
    #[serde(default, skip_serializing_if = "is_default")]
    pub head_bias: bool,
    /// Factors on what flows between the parts.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scales: Scales,
    /// Standard deviation of freshly drawn weights.
    pub init_std: f64,
    /// The attention of every layer.
    pub attention: AttentionSpec,
    /// The feed-forward of each layer, L of them.
    pub layers: Vec<FfnSpec>,
    /// The tokens that mean something to programs.
    pub tokens: SpecialTokens,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A kind of norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// x / rms(x) · weight.
    #[default]
    Rms,
    /// (x - mean) / deviation · weight + bias.
    Layer,
}

/// Where the norms of a layer are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlace {
    /// x + block(norm(x)).
    #[default]
    Before,
    /// x + norm(block(x)) (OLMo 2).
    After,
}

/// Factors on what flows between the parts (Granite).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scales {
    /// On the embeddings.
    pub embedding: f64,
    /// On what a block adds to the residual stream.
    pub residual: f64,
    /// On the logits.
    pub logits: f64,
}

impl Default for Scales {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

/// Causal attention with grouped key-value heads and rotary positions.
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
    /// Which layers have the window; `None`: all.
    #[serde(default, skip_serializing_if = "is_default")]
    pub window_layers: Option<Vec<bool>>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// What of a head turns, and how speeds are bent.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rope: RopeSpec,
    /// Factor on the scores; `None`: 1 / sqrt(head_dim).
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale: Option<f64>,
    /// Each head has a logit that joins the softmax and has no value (gpt-oss).
    #[serde(default, skip_serializing_if = "is_default")]
    pub sinks: bool,
    /// Keys and values come from a narrow vector that all heads share (DeepSeek); `head_dim` is then `nope + rope`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub latent: Option<LatentSpec>,
}

/// Latent attention (MLA, 2405.04434): each token keeps C = `kv_rank` values, of which every head makes its keys and values, and
/// R = `rope` values that turn and are part of every head's key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSpec {
    /// Width of the vector that queries are made of; `None`: they are made of the residual stream.
    pub q_rank: Option<usize>,
    /// C.
    pub kv_rank: usize,
    /// Elements of a head's query and key that do not turn.
    pub nope: usize,
    /// R, elements that turn (even).
    pub rope: usize,
    /// Width of a head's value.
    pub value: usize,
    /// ε of the norms of the narrow vectors.
    pub norm_eps: f64,
}

impl AttentionSpec {
    /// Attention without norms, biases and windows, θ = 10,000.
    pub fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::None,
            window: None,
            window_layers: None,
            rope_theta: 10_000.0,
            rope: RopeSpec::default(),
            scale: None,
            sinks: false,
            latent: None,
        }
    }

    /// The window of layer `layer`.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let has =
            self.window_layers.as_ref().is_none_or(|layers| layers.get(layer).copied().unwrap_or(false));
        self.window.filter(|_| has)
    }

    /// Factor on the scores.
    pub fn score_scale(&self) -> f32 {
        self.scale.map_or_else(|| 1.0 / (self.head_dim as f32).sqrt(), |scale| scale as f32)
    }

    /// Widths of the queries of a token and of its keys; values are as wide as keys but for latent attention.
    pub fn widths(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    /// f32 values that a token leaves in the cache of a layer.
    pub fn cached(&self) -> usize {
        match &self.latent {
            Some(latent) => latent.kv_rank + latent.rope,
            None => 2 * self.kv_heads * self.head_dim,
        }
    }
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
    /// As `Head`, but after the rotation (Hunyuan).
    HeadAfter,
}

/// The feed-forward of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[expect(clippy::large_enum_variant, reason = "there is one a layer, and most are the large one")]
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
    /// Its projections have biases.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bias: bool,
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
    /// What the shared experts give is multiplied by σ(x·w) (Qwen2-MoE).
    #[serde(default, skip_serializing_if = "is_default")]
    pub shared_gate: bool,
    /// The router's product has a bias \[E\] (gpt-oss).
    #[serde(default, skip_serializing_if = "is_default")]
    pub router_bias: bool,
    /// The shared experts have biases.
    #[serde(default, skip_serializing_if = "is_default")]
    pub shared_bias: bool,
    /// How tokens choose.
    pub router: RouterConfig,
    /// What is beyond routed experts that are all alike.
    #[serde(default, skip_serializing_if = "is_default")]
    pub extras: Extras,
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
pub(crate) const LIMIT: usize = 1 << 24;
/// Greatest number of layers.
pub(crate) const MAX_LAYERS: usize = 10_000;
/// Greatest number of experts in a layer: a routing trace keeps an expert in 16 bits, and 65535 is an empty slot.
pub(crate) const MAX_EXPERTS: usize = 65_534;
/// Greatest number of experts in all layers: each is three tensors of a checkpoint, listed one by one before the first is looked
/// for.
pub(crate) const MAX_EXPERTS_IN_ALL: usize = 1 << 17;
/// Greatest number of parameters: sizes in bytes stay far from overflow.
pub(crate) const MAX_PARAMETERS: u128 = 1 << 45;

impl ModelSpec {
    /// RMSNorm with ε = 1e-6 before each block, a head of its own, no factors, 2048 positions, no special tokens.
    pub fn plain(vocab: usize, hidden: usize, attention: AttentionSpec, layers: Vec<FfnSpec>) -> Self {
        Self {
            vocab,
            hidden,
            max_positions: 2048,
            norm_eps: 1e-6,
            norm: NormKind::Rms,
            norm_place: NormPlace::Before,
            tie_embeddings: false,
            head_bias: false,
            scales: Scales::default(),
            init_std: 0.02,
            attention,
            layers,
            tokens: SpecialTokens::default(),
        }
    }

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
        ];
        for (field, value) in sizes {
            if value == 0 || value > LIMIT {
                return refuse(field, &value, "must be from 1 to 16777216");
            }
        }
        if self.layers.is_empty() || self.layers.len() > MAX_LAYERS {
            return refuse("layers", &self.layers.len(), &format!("must be from 1 to {MAX_LAYERS}"));
        }
        if !a.heads.is_multiple_of(a.kv_heads) {
            return refuse("kv_heads", &a.kv_heads, &format!("must divide heads = {}", a.heads));
        }
        if let Some(latent) = &a.latent {
            let parts = [
                ("latent.q_rank", latent.q_rank.unwrap_or(1)),
                ("latent.kv_rank", latent.kv_rank),
                ("latent.nope", latent.nope),
                ("latent.rope", latent.rope),
                ("latent.value", latent.value),
            ];
            for (field, value) in parts {
                if value == 0 || value > LIMIT {
                    return refuse(field, &value, "must be from 1 to 16777216");
                }
            }
            if a.head_dim != latent.nope + latent.rope {
                return refuse("head_dim", &a.head_dim, "must be latent.nope + latent.rope");
            }
            if a.kv_heads != a.heads || a.qk_norm != QkNorm::None || a.sinks || a.window.is_some() {
                let expected =
                    "goes with as many key-value heads as heads, and no norms of heads, sinks or window";
                return refuse("latent", &"latent attention", expected);
            }
        }
        a.rope.validate(a.latent.as_ref().map_or(a.head_dim, |latent| latent.rope))?;
        if a.window_layers.as_ref().is_some_and(|layers| layers.len() != self.layers.len()) {
            return refuse("window_layers", &"a list", &format!("must have {} entries", self.layers.len()));
        }
        let factors = [
            ("scale", a.scale.unwrap_or(1.0)),
            ("scales.embedding", self.scales.embedding),
            ("scales.residual", self.scales.residual),
            ("scales.logits", self.scales.logits),
        ];
        for (field, value) in factors {
            if !value.is_finite() {
                return refuse(field, &value, "must be a finite number");
            }
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
        let mut experts = 0;
        for (l, layer) in self.layers.iter().enumerate() {
            let width = |field: &str, value: usize| match value {
                0 => refuse(&format!("layer {l}: {field}"), &value, "must be 1 or more"),
                v if v > LIMIT => refuse(&format!("layer {l}: {field}"), &value, "must be at most 16777216"),
                _ => Ok(()),
            };
            match layer {
                FfnSpec::Dense(mlp) => width("intermediate", mlp.intermediate)?,
                FfnSpec::Moe(moe) => {
                    if moe.experts == 0 || moe.experts > MAX_EXPERTS {
                        let expected = format!("must be from 1 to {MAX_EXPERTS}");
                        return refuse(&format!("layer {l}: experts"), &moe.experts, &expected);
                    }
                    experts += moe.experts;
                    if experts > MAX_EXPERTS_IN_ALL {
                        let expected = format!("must be at most {MAX_EXPERTS_IN_ALL} in all layers");
                        return refuse("experts", &experts, &expected);
                    }
                    width("the experts' intermediate", moe.expert.intermediate)?;
                    if moe.shared_intermediate > LIMIT {
                        width("shared_intermediate", moe.shared_intermediate)?;
                    }
                    if !(moe.router.init_scale.is_finite() && moe.router.init_scale >= 0.0) {
                        let field = format!("layer {l}: router.init_scale");
                        return refuse(&field, &moe.router.init_scale, "must be 0 or more");
                    }
                    let x = &moe.extras;
                    for (field, value) in [
                        ("extras.zero", x.zero),
                        ("extras.identity", x.identity),
                        ("extras.constant", x.constant),
                        ("extras.members", x.members),
                    ] {
                        if value > MAX_EXPERTS - moe.experts.min(MAX_EXPERTS) {
                            let expected = format!("must leave at most {MAX_EXPERTS} experts in all");
                            return refuse(&format!("layer {l}: {field}"), &value, &expected);
                        }
                    }
                    if x.latent > LIMIT || moe.router.slots > LIMIT || moe.router.groups > LIMIT {
                        let expected = "must be at most 16777216";
                        return refuse(
                            &format!("layer {l}: extras.latent, router.slots or groups"),
                            &"a size",
                            expected,
                        );
                    }
                    let layer = moe.layer(self.hidden);
                    senmon_moe::router::build(&moe.router, layer.choices(), moe.top_k)?;
                    senmon_moe::layer::check_together(&layer)?;
                }
            }
        }
        let members = |layer: &FfnSpec| match layer {
            FfnSpec::Moe(moe) => Some(moe.extras.members.max(1)),
            FfnSpec::Dense(_) => None,
        };
        if self.layers.iter().filter_map(members).any(|n| n != self.members()) {
            return refuse("extras.members", &self.members(), "must be the same in all MoE layers");
        }
        let total = self.parameters_and_active().0;
        if total > MAX_PARAMETERS {
            return refuse("parameters", &total, &format!("must be at most {MAX_PARAMETERS}"));
        }
        Ok(())
    }

    /// The same model in the plainest words: what its routers are in training alone is left out.
    pub fn at_inference(&self) -> Self {
        let mut spec = self.clone();
        for layer in &mut spec.layers {
            if let FfnSpec::Moe(moe) = layer {
                moe.router = moe.router.at_inference(moe.top_k);
            }
        }
        spec
    }

    /// Members of an efficient ensemble; 1 for a model that is none.
    pub fn members(&self) -> usize {
        self.first_moe().map_or(1, |moe| moe.extras.members.max(1))
    }

    /// The first MoE layer, if there is one.
    pub fn first_moe(&self) -> Option<&MoeSpec> {
        self.layers.iter().find_map(|layer| match layer {
            FfnSpec::Moe(moe) => Some(moe),
            FfnSpec::Dense(_) => None,
        })
    }
}

impl MlpSpec {
    /// A gated MLP with SiLU and without biases.
    pub fn gated(intermediate: usize) -> Self {
        Self { intermediate, activation: Activation::Silu, gated: true, bias: false }
    }

    /// P, rows of the first matrix.
    pub fn pre(&self) -> usize {
        if self.gated { 2 * self.intermediate } else { self.intermediate }
    }
}

impl MoeSpec {
    /// Experts without biases and without shared ones beside them, behind the router that is the default.
    pub fn plain(experts: usize, top_k: usize, expert: MlpSpec) -> Self {
        Self {
            experts,
            top_k,
            expert,
            shared_intermediate: 0,
            shared_gate: false,
            router_bias: false,
            shared_bias: false,
            router: RouterConfig::default(),
            extras: Extras::default(),
        }
    }

    /// The layer in a residual stream of width `hidden`.
    pub fn layer(&self, hidden: usize) -> MoeConfig {
        MoeConfig {
            hidden,
            experts: self.experts,
            top_k: self.top_k,
            intermediate: self.expert.intermediate,
            activation: self.expert.activation,
            gated: self.expert.gated,
            shared_intermediate: self.shared_intermediate,
            shared_gate: self.shared_gate,
            router_bias: self.router_bias,
            expert_bias: self.expert.bias,
            sequence_capacity: None,
            router: self.router.clone(),
            extras: self.extras.clone(),
        }
    }

    /// What of the layer no layout of another project can say: only `senmon` does.
    pub fn beyond_layouts(&self) -> Option<String> {
        let r = &self.router;
        let plain = RouterConfig::default();
        if self.extras != Extras::default() {
            return Some("experts beyond shared ones".into());
        }
        if r.eval_capacity != 0.0 {
            return Some(format!("router.eval_capacity = {}", r.eval_capacity));
        }
        (r.random_eval != plain.random_eval).then(|| "router.random_eval".into())
    }

    /// The shared experts together, as one MLP; of width 0 when there are none.
    pub fn shared(&self) -> MlpSpec {
        let bias = self.shared_bias;
        MlpSpec { intermediate: self.shared_intermediate, bias, ..self.expert.clone() }
    }

    /// There are shared experts, and they have a gate.
    pub fn has_shared_gate(&self) -> bool {
        self.shared_gate && self.shared_intermediate > 0
    }
}

#[cfg(test)]
mod samples;
#[cfg(test)]
pub(crate) use samples::{menu, odd_spec, plain, test_spec};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_named() {
        let check = |change: &dyn Fn(&mut ModelSpec), expected: &[&str]| {
            let mut spec = plain();
            change(&mut spec);
            let text = spec.validate().unwrap_err().to_string();
            assert!(expected.iter().all(|part| text.contains(part)), "{text}: {expected:?}");
        };
        fn moe(spec: &mut ModelSpec, change: impl FnOnce(&mut MoeSpec)) {
            if let FfnSpec::Moe(moe) = &mut spec.layers[1] {
                change(moe);
            }
        }
        plain().validate().unwrap();
        check(&|s| s.vocab = 0, &["vocab = 0"]);
        check(&|s| s.hidden = usize::MAX, &["hidden"]);
        check(&|s| s.layers.clear(), &["layers = 0"]);
        check(&|s| s.attention.kv_heads = 3, &["kv_heads = 3", "heads = 4"]);
        check(&|s| s.attention.head_dim = 7, &["head_dim = 7", "even"]);
        check(&|s| s.attention.window = Some(0), &["window = 0"]);
        check(&|s| s.attention.rope_theta = -1.0, &["rope_theta = -1"]);
        check(&|s| s.norm_eps = f64::NAN, &["norm_eps = NaN"]);
        check(&|s| moe(s, |m| m.top_k = 9), &["top_k = 9", "8 experts"]);
        check(&|s| moe(s, |m| m.experts = 70_000), &["layer 1: experts = 70000", "65534"]);
        check(&|s| moe(s, |m| m.expert.intermediate = 0), &["layer 1", "intermediate = 0"]);
        check(&|s| moe(s, |m| m.router.groups = 3), &["groups = 3", "8"]);
        check(&|s| moe(s, |m| m.router.kind = "topk".into()), &["topk", "topk_pre"]);
        check(&|s| moe(s, |m| m.router.init_scale = f64::INFINITY), &["init_scale"]);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let mut spec = plain();
        let huge = MlpSpec::gated(LIMIT);
        (spec.hidden, spec.vocab, spec.attention.heads, spec.attention.kv_heads) =
            (LIMIT, LIMIT, LIMIT, LIMIT);
        spec.attention.head_dim = LIMIT;
        let moe = MoeSpec { shared_intermediate: LIMIT, ..MoeSpec::plain(13, 13, huge) };
        spec.layers = vec![FfnSpec::Moe(moe); MAX_LAYERS];
        assert!(spec.validate().unwrap_err().to_string().contains("parameters = "));
        assert_eq!(spec.flops_per_token(usize::MAX), u64::MAX);
    }
}
