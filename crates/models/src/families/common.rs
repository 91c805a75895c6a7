//! What all families of `config.json` share: typed keys with errors that name them, and the keys of a Llama-like decoder.

use crate::error::{ModelError, Result};
use crate::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm, SpecialTokens};
use senmon_kernels::activation::Activation;
use serde_json::{Map, Value, json};
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

    fn typed<T>(&self, key: &str, kind: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(found) => Ok(Some(found)),
                None => Err(self.error(format!("{key} = {value} is not {kind}"))),
            },
        }
    }

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
    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
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

    /// θ of the rotary positions, wherever this version of the file has it; scalings are refused.
    fn rope_theta(&self, default: f64) -> Result<f64> {
        let plain = |scaling: &Value| {
            let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
            kind.is_none_or(|kind| kind == "default")
        };
        self.refuse_unless("rope_scaling", plain)?;
        self.refuse_unless("rope_parameters", plain)?;
        self.refuse_unless("partial_rotary_factor", |v| v.as_f64() == Some(1.0))?;
        match self.get("rope_parameters").and_then(|p| p.get("rope_theta")) {
            Some(theta) => theta
                .as_f64()
                .ok_or_else(|| self.error(format!("rope_parameters.rope_theta = {theta} is not a number"))),
            None => self.f64_or("rope_theta", default),
        }
    }

    /// The non-linearity.
    pub fn activation(&self) -> Result<Activation> {
        match self.text("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "relu" => Ok(Activation::Relu),
            "relu2" => Ok(Activation::Relu2),
            other => {
                Err(self
                    .error(format!("hidden_act = \"{other}\" is not known; silu, gelu, relu and relu2 are")))
            }
        }
    }

    /// A gated MLP of the width that a key says.
    pub fn mlp(&self, key: &str) -> Result<MlpSpec> {
        Ok(MlpSpec { intermediate: self.usize(key)?, activation: self.activation()?, gated: true })
    }

    /// The parts of a Llama-like decoder; the layers are still to come.
    pub fn decoder(&self, qk_norm: QkNorm, window: Option<usize>, rope_theta: f64) -> Result<ModelSpec> {
        let (hidden, heads) = (self.usize("hidden_size")?, self.usize("num_attention_heads")?);
        let bias = self.bool_or("attention_bias", false)?;
        let head_dim = match self.maybe_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.error(format!("num_attention_heads = {heads} does not divide hidden_size = {hidden}, and head_dim is missing"))),
        };
        Ok(ModelSpec {
            vocab: self.usize("vocab_size")?,
            hidden,
            max_positions: self.usize("max_position_embeddings")?,
            norm_eps: self.f64("rms_norm_eps")?,
            tie_embeddings: self.bool_or("tie_word_embeddings", false)?,
            init_std: self.f64_or("initializer_range", 0.02)?,
            attention: AttentionSpec {
                heads,
                kv_heads: self.maybe_usize("num_key_value_heads")?.unwrap_or(heads),
                head_dim,
                qkv_bias: bias,
                out_bias: bias,
                qk_norm,
                window,
                rope_theta: self.rope_theta(rope_theta)?,
            },
            layers: Vec::new(),
            tokens: SpecialTokens {
                bos: self.tokens("bos_token_id")?.first().copied(),
                eos: self.tokens("eos_token_id")?,
                pad: self.tokens("pad_token_id")?.first().copied(),
            },
        })
    }

    /// Puts the layers in and checks the whole.
    pub fn finish(&self, mut spec: ModelSpec, layer: impl Fn(usize) -> FfnSpec) -> Result<ModelSpec> {
        let count = self.usize("num_hidden_layers")?;
        if count == 0 || count > 100_000 {
            return Err(self.error(format!("num_hidden_layers = {count} is not from 1 to 100000")));
        }
        spec.layers = (0..count).map(layer).collect();
        spec.validate().map_err(|e| self.error(e.to_string()))?;
        Ok(spec)
    }

    /// The window that all layers have, or an error where layers differ.
    pub fn uniform_window(&self, key: &str) -> Result<Option<usize>> {
        let mixed = |v: &Value| {
            let kinds: std::collections::BTreeSet<_> =
                v.as_array().into_iter().flatten().map(Value::to_string).collect();
            kinds.len() <= 1
        };
        self.refuse_unless("layer_types", mixed)?;
        let full = self.get("layer_types").and_then(Value::as_array).and_then(|kinds| kinds.first());
        match full.and_then(Value::as_str) {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") | None => self.maybe_usize(key),
            Some(other) => Err(self.error(format!("layer_types has \"{other}\", which is not supported"))),
        }
    }
}

/// The name of an activation in `hidden_act`.
fn hidden_act(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::Relu => "relu",
        Activation::Relu2 => "relu2",
    }
}

/// The keys that all families write.
pub fn write_decoder(spec: &ModelSpec, activation: Activation) -> Map<String, Value> {
    let a = &spec.attention;
    let eos = match spec.tokens.eos.as_slice() {
        [] => Value::Null,
        [one] => (*one).into(),
        several => several.into(),
    };
    let value = json!({
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers.len(),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": hidden_act(activation),
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": a.rope_theta,
        "rope_parameters": { "rope_type": "default", "rope_theta": a.rope_theta },
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": spec.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": spec.tokens.bos,
        "eos_token_id": eos,
        "pad_token_id": spec.tokens.pad,
        "torch_dtype": "float32",
        "use_cache": true,
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Adds `extra`'s keys.
pub fn with(mut map: Map<String, Value>, extra: Value) -> Value {
    if let Value::Object(extra) = extra {
        map.extend(extra);
    }
    Value::Object(map)
}

/// Refuses what a Llama-like family has no word for.
pub fn expect_decoder(
    spec: &ModelSpec,
    qk_norm: QkNorm,
    biases: bool,
    window: bool,
) -> std::result::Result<(), String> {
    let a = &spec.attention;
    if a.qk_norm != qk_norm {
        return Err(format!("qk_norm = {:?}", a.qk_norm));
    }
    if a.qkv_bias != a.out_bias || (a.qkv_bias && !biases) {
        return Err(format!("biases on q, k, v: {}, on the output: {}", a.qkv_bias, a.out_bias));
    }
    if let Some(n) = a.window
        && !window
    {
        return Err(format!("window = {n}"));
    }
    Ok(())
}

/// The one dense MLP that all given layers share, if there are any.
pub fn same_dense<'a>(
    layers: impl IntoIterator<Item = &'a FfnSpec>,
) -> std::result::Result<Option<&'a MlpSpec>, String> {
    let mut found: Option<&MlpSpec> = None;
    for layer in layers {
        if let FfnSpec::Dense(mlp) = layer {
            if !mlp.gated {
                return Err("an MLP without a gate".into());
            }
            if found.is_some_and(|first| first != mlp) {
                return Err("dense layers that differ".into());
            }
            found = Some(mlp);
        }
    }
    Ok(found)
}

/// The one kind of MoE layer that all given layers share, if there are any.
pub fn same_moe<'a>(
    layers: impl IntoIterator<Item = &'a FfnSpec>,
) -> std::result::Result<Option<&'a MoeSpec>, String> {
    let mut found: Option<&MoeSpec> = None;
    for layer in layers {
        if let FfnSpec::Moe(moe) = layer {
            if !moe.expert.gated {
                return Err("experts without a gate".into());
            }
            if found.is_some_and(|first| first != moe) {
                return Err("MoE layers that differ".into());
            }
            found = Some(moe);
        }
    }
    Ok(found)
}

/// Whether a softmax router's weights are normalised over the picked; an error for any other router. What is only of
/// training (jitter, initial scale) does not count.
pub fn softmax_normalized(moe: &MoeSpec) -> std::result::Result<bool, String> {
    let r = &moe.router;
    let (one_scale, one_group) = (r.scale == 1.0, r.top_groups == r.groups);
    if !one_scale {
        return Err(format!("router.scale = {}", r.scale));
    }
    if !one_group {
        return Err(format!("router.groups = {}", r.groups));
    }
    match r.kind.as_str() {
        "topk_post" => Ok(true),
        "topk_pre" => Ok(r.normalize),
        "switch" => Ok(false),
        other => Err(format!("router.kind = {other}")),
    }
}
