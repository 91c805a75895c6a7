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

    /// θ of the rotary positions, wherever this version of the file has it; scalings are refused. As in transformers, what
    /// `rope_scaling` says goes before `rope_parameters`, and both before a `rope_theta` of its own.
    fn rope_theta(&self, default: f64) -> Result<f64> {
        let whole = |v: &Value| v.as_f64() == Some(1.0);
        let plain = |rope: &Value| {
            let Some(rope) = rope.as_object() else { return false };
            let kind = rope.get("rope_type").or_else(|| rope.get("type"));
            match kind.filter(|kind| !kind.is_null()) {
                Some(kind) if kind.as_str() != Some("default") => return false,
                // Anything but θ without a type is a scaling of some kind.
                None if rope
                    .keys()
                    .any(|key| !matches!(key.as_str(), "rope_theta" | "rope_type" | "type")) =>
                {
                    return false;
                }
                _ => {}
            }
            // Tables within are per kind of layer.
            rope.get("partial_rotary_factor").is_none_or(whole) && !rope.values().any(Value::is_object)
        };
        self.refuse_unless("rope_scaling", plain)?;
        self.refuse_unless("rope_parameters", plain)?;
        self.refuse_unless("partial_rotary_factor", whole)?;
        for table in ["rope_scaling", "rope_parameters"] {
            if let Some(theta) = self.get(table).and_then(|rope| rope.get("rope_theta")) {
                let wrong = || self.error(format!("{table}.rope_theta = {theta} is not a number"));
                return theta.as_f64().ok_or_else(wrong);
            }
        }
        self.f64_or("rope_theta", default)
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
    pub fn decoder(&self, qk_norm: QkNorm, window: Option<usize>, defaults: Defaults) -> Result<ModelSpec> {
        self.refuse_unless("quantization_config", |_| false)?;
        let (hidden, heads) = (self.usize("hidden_size")?, self.usize("num_attention_heads")?);
        let bias = self.bool_or("attention_bias", false)?;
        let head_dim = match self.maybe_usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if defaults.head_dim.is_some() => defaults.head_dim.unwrap_or_default(),
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
                kv_heads: self.kv_heads(heads, defaults.kv_heads)?,
                head_dim,
                qkv_bias: bias,
                out_bias: bias,
                qk_norm,
                window,
                rope_theta: self.rope_theta(defaults.rope_theta)?,
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
        if count == 0 || count > 10_000 {
            return Err(self.error(format!("num_hidden_layers = {count} is not from 1 to 10000")));
        }
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

    /// The window that all layers have, or an error where layers differ. Where the file has no `layer_types`, layers from
    /// `max_window_layers` on have the window; `window` and `first` are what the two keys are when absent.
    pub fn uniform_window(&self, window: usize, first: usize) -> Result<Option<usize>> {
        let absent = |key: &str| !self.value.as_object().is_some_and(|map| map.contains_key(key));
        let width = match self.maybe_usize("sliding_window")? {
            None if absent("sliding_window") => Some(window),
            width => width,
        };
        let layers = self.usize("num_hidden_layers")?;
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
            (false, _) => Ok(None),
            (true, true) if width.is_some() => Ok(width),
            (true, true) => Err(self.error("layer_types has sliding_attention, and sliding_window is null")),
            (true, false) => Err(self.error(
                "layer_types, or sliding_window with max_window_layers, gives only some layers a window, which is not \
                 supported",
            )),
        }
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
}

impl Default for Defaults {
    fn default() -> Self {
        Self { rope_theta: 10_000.0, kv_heads: None, head_dim: None }
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
