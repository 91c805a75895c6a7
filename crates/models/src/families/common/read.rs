//! A `config.json` read: keys with their types and what their absence means, and what several families have in common.

use super::super::rope::{self, RopeKeys};
use crate::error::{ModelError, Result};
use crate::rope::{RopeScaling, RopeSpec};
use crate::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm, SpecialTokens};
use senmon_kernels::activation::Activation;
use senmon_moe::RouterConfig;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A `config.json`.
#[derive(Debug)]
pub struct Json {
    path: PathBuf,
    value: Value,
}

impl Json {
    /// A JSON object read from `path`.
    pub fn new(path: &Path, value: Value) -> Result<Self> {
        if !value.is_object() {
            return Err(ModelError::Config { path: path.into(), what: "is not a JSON object".into() });
        }
        Ok(Self { path: path.into(), value })
    }

    /// The whole object.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// An error about a key of this file.
    pub fn error(&self, what: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.clone(), what: what.into() }
    }

    /// The value of a key, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// The value of a key by its reader; an error where it is not `kind`.
    pub fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(found) => Ok(Some(found)),
                None => Err(self.error(format!("{key} = {value} is not {kind}"))),
            },
        }
    }

    /// The value, or an error that the key is missing.
    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(format!("{key} is missing")))
    }

    /// A whole number of 0 or more, if the key is there.
    pub fn maybe_usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number from 0 to 16777216", |v| {
            v.as_u64().filter(|n| *n <= 1 << 24).map(|n| n as usize)
        })
    }

    /// A whole number that must be there.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.required(key, self.maybe_usize(key)?)
    }

    /// A number that must be there.
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.required(key, self.typed(key, "a number", Value::as_f64)?)
    }

    /// A number with a default.
    pub fn f64_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.typed(key, "a number", Value::as_f64)?.unwrap_or(default))
    }

    /// A truth value with a default.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A text, if the key is there.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.error(format!("{key} = {value} is not a text"))),
        }
    }

    /// The token ids of a key: one, several or none.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let read = |v: &Value| match v {
            Value::Array(all) => all.iter().map(one).collect(),
            // -1 is how some say "none".
            v if v.as_i64() == Some(-1) => Some(Vec::new()),
            v => one(v).map(|token| vec![token]),
        };
        Ok(self.typed(key, "a token id or a list of them", read)?.unwrap_or_default())
    }

    /// Refuses a key whose value changes what the model computes in a way that is not supported.
    pub fn refuse_unless(&self, key: &str, allowed: impl Fn(&Value) -> bool) -> Result<()> {
        match self.get(key) {
            Some(value) if !allowed(value) => {
                Err(self
                    .error(format!("{key} = {value} changes what the model computes and is not supported")))
            }
            _ => Ok(()),
        }
    }

    /// A whole number under the first of its names; an error if two of them say different numbers.
    pub fn usize_as(&self, names: [&str; 2]) -> Result<usize> {
        match (self.maybe_usize(names[0])?, self.maybe_usize(names[1])?) {
            (Some(a), Some(b)) if a != b => {
                Err(self.error(format!("{} = {a} and {} = {b} are the same thing", names[0], names[1])))
            }
            (a, b) => self.required(names[0], a.or(b)),
        }
    }

    /// Key-value heads: as many as heads when the key is null; when it is absent, what the family's class in transformers
    /// takes, or, with `None`, as many as heads.
    fn kv_heads(&self, heads: usize, absent: Option<usize>) -> Result<usize> {
        let default = match self.value.get("num_key_value_heads") {
            None => absent.unwrap_or(heads),
            Some(_) => heads,
        };
        Ok(self.maybe_usize("num_key_value_heads")?.unwrap_or(default))
    }

    /// The non-linearity.
    pub fn activation(&self) -> Result<Activation> {
        let name = self.text("hidden_act")?.unwrap_or("silu");
        activation_named(name).ok_or_else(|| {
            let known: Vec<_> = ACTIVATIONS.iter().map(|(_, names)| names[0]).collect();
            self.error(format!("hidden_act = \"{name}\" is not known; {} are", known.join(", ")))
        })
    }

    /// A gated MLP of the width that a key says.
    pub fn mlp(&self, key: &str) -> Result<MlpSpec> {
        Ok(MlpSpec { activation: self.activation()?, ..MlpSpec::gated(self.usize(key)?) })
    }

    /// The parts of a Llama-like decoder; the layers are still to come.
    pub fn decoder(&self, qk_norm: QkNorm, window: Option<usize>, defaults: Defaults) -> Result<ModelSpec> {
        let method = |v: &Value| v.get("quant_method").and_then(Value::as_str).map(str::to_owned);
        self.refuse_unless("quantization_config", |v| {
            method(v).is_some_and(|method| defaults.quantized.contains(&method.as_str()))
        })?;
        let (hidden, heads) = (self.usize("hidden_size")?, self.usize("num_attention_heads")?);
        let bias = self.bool_or("attention_bias", false)?;
        let head_dim = match self.maybe_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if defaults.head_dim.is_some() => defaults.head_dim.unwrap_or_default(),
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.error(format!("num_attention_heads = {heads} does not divide hidden_size = {hidden}, and head_dim is missing"))),
        };
        let keys = RopeKeys::new(self)?;
        let part = keys.partial(defaults.partial.unwrap_or(1.0))?;
        if defaults.partial.is_none() && part != 1.0 {
            let what = format!(
                "partial_rotary_factor = {part} changes what the model computes and is not supported"
            );
            return Err(self.error(what));
        }
        let attention = AttentionSpec {
            qkv_bias: bias,
            out_bias: bias,
            qk_norm,
            window,
            rope_theta: keys.theta(defaults.rope_theta)?,
            rope: RopeSpec {
                neighbours: false,
                dims: rope::dims(self, head_dim, part)?,
                scaling: keys.scaling()?,
            },
            ..AttentionSpec::plain(heads, self.kv_heads(heads, defaults.kv_heads)?, head_dim)
        };
        // "Dynamic" contexts grow beyond the length in the file, all others have it as their longest.
        let max_positions = match attention.rope.scaling {
            RopeScaling::Dynamic { factor, original } => (original as f64 * factor.max(1.0)) as usize,
            _ => self.usize("max_position_embeddings")?,
        };
        Ok(ModelSpec {
            max_positions,
            norm_eps: self.f64(defaults.norm_eps)?,
            tie_embeddings: self.bool_or("tie_word_embeddings", false)?,
            init_std: self.f64_or("initializer_range", 0.02)?,
            tokens: SpecialTokens {
                bos: self.tokens("bos_token_id")?.first().copied(),
                eos: self.tokens("eos_token_id")?,
                pad: self.tokens("pad_token_id")?.first().copied(),
            },
            ..ModelSpec::plain(self.usize("vocab_size")?, hidden, attention, Vec::new())
        })
    }

    /// Puts the layers in and checks the whole.
    pub fn finish(&self, mut spec: ModelSpec, layer: impl Fn(usize) -> FfnSpec) -> Result<ModelSpec> {
        let count = self.layer_count()?;
        spec.layers = (0..count).map(layer).collect();
        spec.validate().map_err(|e| match e {
            ModelError::Spec { field, value, expected } => {
                let key =
                    KEYS.iter().find(|(of_spec, _)| *of_spec == field).map_or(field.as_str(), |(_, key)| key);
                self.error(format!("{key} = {value}: {expected}"))
            }
            other => self.error(other.to_string()),
        })?;
        Ok(spec)
    }

    /// The window, and which layers have it (`None`: all). Where the file has no `layer_types`, layers from
    /// `max_window_layers` on have the window; `window` and `first` are what the two keys are when absent.
    pub fn windows(&self, window: Option<usize>, first: usize) -> Result<(Option<usize>, Option<Vec<bool>>)> {
        let absent = |key: &str| !self.value.as_object().is_some_and(|map| map.contains_key(key));
        let width = match self.maybe_usize("sliding_window")? {
            None if absent("sliding_window") => window,
            width => width,
        };
        let layers = self.layer_count()?;
        let sliding: Vec<bool> = match self.get("layer_types") {
            None => {
                let first = self.maybe_usize("max_window_layers")?.unwrap_or(first);
                (0..layers).map(|l| width.is_some() && l >= first).collect()
            }
            Some(kinds) => {
                let kinds = kinds.as_array().filter(|kinds| kinds.len() == layers);
                let wrong = || self.error(format!("layer_types is not a list of {layers} kinds of layers"));
                let one = |kind: &Value| match kind.as_str() {
                    Some("full_attention") => Ok(false),
                    Some("sliding_attention") => Ok(true),
                    _ => Err(self.error(format!("layer_types has {kind}, which is not supported"))),
                };
                kinds.ok_or_else(wrong)?.iter().map(one).collect::<Result<_>>()?
            }
        };
        match (sliding.iter().any(|s| *s), sliding.iter().all(|s| *s)) {
            (false, _) => Ok((None, None)),
            (true, _) if width.is_none() => {
                Err(self.error("layer_types has sliding_attention, and sliding_window is null"))
            }
            (true, true) => Ok((width, None)),
            (true, false) => Ok((width, Some(sliding))),
        }
    }

    /// Refuses a key that names a method, unless it is one of these.
    pub fn expect_text(&self, key: &str, known: &[&str]) -> Result<()> {
        self.refuse_unless(key, |value| value.as_str().is_some_and(|text| known.contains(&text)))
    }

    /// The number of layers.
    pub fn layer_count(&self) -> Result<usize> {
        let count = self.usize("num_hidden_layers")?;
        if count == 0 || count > 10_000 {
            return Err(self.error(format!("num_hidden_layers = {count} is not from 1 to 10000")));
        }
        Ok(count)
    }

    /// Layers that are MoE where every `decoder_sparse_step`-th one is, but not those of `mlp_only_layers`.
    pub fn sparse_steps(&self) -> Result<Vec<bool>> {
        let step = self.maybe_usize("decoder_sparse_step")?.unwrap_or(1);
        if step == 0 {
            return Err(self.error("decoder_sparse_step = 0 must be 1 or more"));
        }
        let only: BTreeSet<u64> = match self.get("mlp_only_layers") {
            None => BTreeSet::new(),
            Some(layers) => {
                let numbers = layers.as_array().and_then(|all| all.iter().map(Value::as_u64).collect());
                let wrong = || self.error(format!("mlp_only_layers = {layers} is not a list of layers"));
                numbers.ok_or_else(wrong)?
            }
        };
        let is_moe = |l: usize| !only.contains(&(l as u64)) && (l + 1).is_multiple_of(step);
        Ok((0..self.layer_count()?).map(is_moe).collect())
    }

    /// An MoE layer of the DeepSeek kind, with `n_routed_experts`, `n_shared_experts` of the same width and groups, behind `router`;
    /// `router` and `shared` are what absent keys mean.
    pub fn deepseek_moe(&self, router: RouterConfig, shared: usize) -> Result<MoeSpec> {
        let expert = self.mlp("moe_intermediate_size")?;
        let shared = self.maybe_usize("n_shared_experts")?.unwrap_or(shared);
        let experts = self.usize_as(["n_routed_experts", "num_local_experts"])?;
        Ok(MoeSpec {
            shared_intermediate: shared.saturating_mul(expert.intermediate),
            router: RouterConfig { scale: self.f64_or("routed_scaling_factor", router.scale)?, ..router },
            ..MoeSpec::plain(experts, self.usize("num_experts_per_tok")?, expert)
        })
    }

    /// An MoE layer of the Qwen and OLMoE kind: `num_experts` of the width that `width` names, softmax over all, weights normalised
    /// where `norm_topk_prob` says so.
    pub fn softmax_moe(&self, width: &str) -> Result<MoeSpec> {
        let normalize = self.bool_or("norm_topk_prob", false)?;
        let experts = self.usize_as(["num_experts", "num_local_experts"])?;
        Ok(MoeSpec {
            router: RouterConfig { normalize, ..RouterConfig::default() },
            ..MoeSpec::plain(experts, self.usize("num_experts_per_tok")?, self.mlp(width)?)
        })
    }

    /// `sigmoid_bias` with groups; the arguments are what `norm_topk_prob`, `n_group` and `topk_group` are when absent.
    pub fn sigmoid_router(&self, normalize: bool, groups: usize, top_groups: usize) -> Result<RouterConfig> {
        Ok(RouterConfig {
            kind: "sigmoid_bias".into(),
            normalize: self.bool_or("norm_topk_prob", normalize)?,
            groups: self.maybe_usize("n_group")?.unwrap_or(groups),
            top_groups: self.maybe_usize("topk_group")?.unwrap_or(top_groups),
            ..RouterConfig::default()
        })
    }

    /// Puts in layers that are `moe` where `is_moe` says so, else dense MLPs of width `intermediate_size`.
    pub fn finish_mixed(
        &self,
        spec: ModelSpec,
        moe: &MoeSpec,
        is_moe: impl Fn(usize) -> bool,
    ) -> Result<ModelSpec> {
        self.finish_biased(spec, moe, false, is_moe)
    }

    /// As [`finish_mixed`](Self::finish_mixed), the dense MLPs with biases or without.
    pub fn finish_biased(
        &self,
        spec: ModelSpec,
        moe: &MoeSpec,
        bias: bool,
        is_moe: impl Fn(usize) -> bool,
    ) -> Result<ModelSpec> {
        let all = (0..self.layer_count()?).all(&is_moe);
        let dense = if all { None } else { Some(MlpSpec { bias, ..self.mlp("intermediate_size")? }) };
        self.finish(spec, |l| match &dense {
            Some(dense) if !is_moe(l) => FfnSpec::Dense(dense.clone()),
            _ => FfnSpec::Moe(moe.clone()),
        })
    }
}

/// What a family's class in transformers takes for keys that are absent.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// θ of the rotary positions.
    pub rope_theta: f64,
    /// `num_key_value_heads`; `None`: as many as heads.
    pub kv_heads: Option<usize>,
    /// `head_dim`; `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// `partial_rotary_factor`; `None`: the family's heads turn whole.
    pub partial: Option<f64>,
    /// The key of ε.
    pub norm_eps: &'static str,
    /// `quantization_config.quant_method`s that are read.
    pub quantized: &'static [&'static str],
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            rope_theta: 10_000.0,
            kv_heads: None,
            head_dim: None,
            partial: None,
            norm_eps: "rms_norm_eps",
            quantized: &[],
        }
    }
}

/// Fields of a specification that `config.json` names otherwise.
const KEYS: &[(&str, &str)] = &[
    ("vocab", "vocab_size"),
    ("hidden", "hidden_size"),
    ("max_positions", "max_position_embeddings"),
    ("heads", "num_attention_heads"),
    ("kv_heads", "num_key_value_heads"),
    ("layers", "num_hidden_layers"),
    ("window", "sliding_window"),
    ("norm_eps", "rms_norm_eps"),
    ("init_std", "initializer_range"),
];

/// The names that `hidden_act` has for an activation, the first of them ours.
const ACTIVATIONS: &[(Activation, &[&str])] = &[
    (Activation::Silu, &["silu", "swish"]),
    (Activation::Gelu, &["gelu"]),
    (Activation::Relu, &["relu"]),
    (Activation::Relu2, &["relu2"]),
    (Activation::GeluTanh, &["gelu_new", "gelu_pytorch_tanh", "gelu_fast"]),
];

/// The activation that transformers calls so.
pub fn activation_named(name: &str) -> Option<Activation> {
    ACTIVATIONS.iter().find(|(_, names)| names.contains(&name)).map(|(activation, _)| *activation)
}

/// The name of an activation in `hidden_act`.
pub(super) fn hidden_act(activation: Activation) -> &'static str {
    ACTIVATIONS.iter().find(|(known, _)| *known == activation).map_or("silu", |(_, names)| names[0])
}
