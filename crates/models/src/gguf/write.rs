//! From a [`ModelSpec`] to the metadata of a GGUF file. That they say the model is checked by reading them back: what comes out
//! other than it went in is a field that the architecture has no word for.

use super::arch::{ARCHS, Arch, Scores, Shared, Special};
use super::metadata::Keys;
use super::names::parts;
use super::{rope, spec};
use crate::error::{ModelError, Result};
use crate::rope::RopeScaling;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec};
use senmon_gguf::{Value, Writer};
use senmon_moe::config::GroupMask;
use std::collections::HashMap;
use std::path::Path;

/// A model as an architecture has it.
#[derive(Debug)]
pub(crate) struct Said {
    /// The architecture.
    pub arch: &'static Arch,
    /// The model in its words; its parameters are those of the model, but that it may have a head of its own where the model
    /// has a tied one.
    pub spec: ModelSpec,
    /// The keys of the architecture.
    pub keys: Vec<(String, Value)>,
    /// Tensors that are no parameters.
    pub tensors: Vec<(&'static str, Vec<f32>)>,
    /// What its words cannot say and no text notices.
    pub notes: Vec<String>,
}

/// The model in the words of an architecture: of one that holds models of `family`, else of any.
pub(crate) fn say(spec: &ModelSpec, family: &str) -> Result<Said> {
    let own: Vec<_> = ARCHS.iter().filter(|arch| arch.families.contains(&family)).collect();
    let among: Vec<_> = if own.is_empty() { ARCHS.iter().collect() } else { own };
    let mut refused = Vec::new();
    for arch in among {
        match say_as(spec, arch) {
            Ok(said) => return Ok(said),
            Err(what) => refused.push(format!("{}: {what}", arch.name)),
        }
    }
    // Of many architectures none is nearer than another.
    refused.truncate(3);
    Err(ModelError::Layout { family: "GGUF".into(), what: refused.join("; ") })
}

fn say_as(original: &ModelSpec, arch: &'static Arch) -> std::result::Result<Said, String> {
    let (spec, mut notes) = in_its_words(original, arch);
    wanted(&spec, arch)?;
    let rope = rope::write(&spec)?;
    let mut keys = keys(&spec, arch)?;
    keys.extend(rope.keys.into_iter().map(|(key, value)| (format!("{}.{key}", arch.name), value)));
    let back = read_back(&spec, arch, &keys, &rope.tensors).map_err(|e| e.to_string())?;
    if let Some(what) = difference(&spec, &back) {
        return Err(what);
    }
    if let RopeScaling::Yarn { beta_fast, beta_slow, .. } = spec.attention.rope.scaling
        && (beta_fast, beta_slow) != (32.0, 1.0)
    {
        notes.push(format!(
            "llama.cpp takes beta_fast 32 and beta_slow 1, the model has {beta_fast} and {beta_slow}"
        ));
    }
    Ok(Said { arch, spec, keys, tensors: rope.tensors, notes })
}

/// Refuses what llama.cpp would not load.
fn wanted(spec: &ModelSpec, arch: &Arch) -> std::result::Result<(), String> {
    let (a, wants) = (&spec.attention, &arch.wants);
    if wants.hidden_width && a.heads * a.head_dim != spec.hidden {
        return Err(format!(
            "{} heads of width {} are not as wide as hidden = {}",
            a.heads, a.head_dim, spec.hidden
        ));
    }
    if wants.all_heads && a.kv_heads != a.heads {
        return Err(format!("attention.kv_heads = {} of {} heads", a.kv_heads, a.heads));
    }
    if let Some(bias) = wants.out_bias.filter(|bias| *bias != a.out_bias) {
        return Err(format!("attention.out_bias = {} (it must be {bias})", a.out_bias));
    }
    if a.scale.is_some() && a.latent.is_none() && !wants.scale {
        return Err(format!("attention.scale = {}", a.score_scale()));
    }
    for (l, layer) in spec.layers.iter().enumerate() {
        match layer {
            FfnSpec::Dense(_) if wants.all_moe => return Err(format!("layer {l} is dense")),
            FfnSpec::Moe(moe) if wants.shared && moe.shared_intermediate == 0 => {
                return Err(format!("layer {l} has no shared experts"));
            }
            _ => {}
        }
    }
    if wants.head_bias && !spec.head_bias {
        return Err("head_bias = false (it must be true)".into());
    }
    Ok(())
}

/// The same model with what an architecture says otherwise, or not at all, as it says it.
fn in_its_words(spec: &ModelSpec, arch: &Arch) -> (ModelSpec, Vec<String>) {
    let (mut spec, mut notes) = (spec.at_inference(), Vec::new());
    spec.init_std = ModelSpec::plain(1, 1, spec.attention.clone(), Vec::new()).init_std;
    spec.tie_embeddings &= !arch.own_head;
    let mut eos: Vec<u32> = Vec::new();
    spec.tokens.eos.iter().for_each(|id| eos.extend((!eos.contains(id)).then_some(*id)));
    if eos.len() > 3 {
        notes.push(format!("of {} tokens that end a text, GGUF has words for three", eos.len()));
        eos.truncate(3);
    }
    spec.tokens.eos = eos;
    if arch.special != Special::GptOss
        && let Some(window) = spec.attention.window.take()
    {
        // In a context that is no longer than the window, there is none.
        if window < spec.max_positions {
            notes.push(format!(
                "the architecture {} has no window: the context is {window} tokens, where it makes no difference",
                arch.name
            ));
            spec.max_positions = window;
        }
        spec.attention.window_layers = None;
    }
    if let RopeScaling::Llama3 { .. } = spec.attention.rope.scaling {
        let divisors: Vec<f64> = rope::divisors(&spec).into_iter().map(super::metadata::widened).collect();
        spec.attention.rope.scaling = RopeScaling::Longrope {
            short: divisors.clone(),
            long: divisors,
            original: spec.max_positions,
            short_factor: 1.0,
            long_factor: 1.0,
        };
    }
    if let RopeScaling::Longrope { short, long, original, short_factor, .. } =
        &mut spec.attention.rope.scaling
        && short == long
        && *short_factor == 1.0
    {
        *original = spec.max_positions;
    }
    for layer in &mut spec.layers {
        let FfnSpec::Moe(moe) = layer else { continue };
        let r = &mut moe.router;
        if r.groups == r.top_groups {
            (r.groups, r.top_groups, r.group_mask) = (1, 1, GroupMask::Inf);
        }
        // Softmax over the picked is softmax over all, normalised.
        let picked = r.kind == "topk_post" || r.kind == "topk_pre" && r.normalize && r.groups == 1;
        if picked {
            r.normalize = true;
            r.kind = if arch.scores == Scores::Picked { "topk_post" } else { "topk_pre" }.into();
        }
        if r.kind == "sparsemixer" {
            r.normalize = arch.normalize;
        }
        if arch.special == Special::Latent && r.kind == "topk_pre" {
            r.group_mask = GroupMask::Zero;
        }
        moe.shared_gate &= moe.shared_intermediate > 0;
    }
    (spec, notes)
}

/// The keys of a model, but those of its rotary positions.
fn keys(spec: &ModelSpec, arch: &Arch) -> std::result::Result<Vec<(String, Value)>, String> {
    let mut keys: Vec<(String, Value)> = Vec::new();
    let mut put = |key: &str, value: Value| keys.push((format!("{}.{key}", arch.name), value));
    let size = |n: usize| Value::U32(n as u32);
    let number = |x: f64| Value::F32(x as f32);
    let a = &spec.attention;
    put("vocab_size", size(spec.vocab));
    put("context_length", size(spec.max_positions));
    put("embedding_length", size(spec.hidden));
    put("block_count", size(spec.layers.len()));
    put("attention.head_count", size(a.heads));
    put("attention.layer_norm_rms_epsilon", number(spec.norm_eps));
    match &a.latent {
        None => {
            put("attention.head_count_kv", size(a.kv_heads));
            put("attention.key_length", size(a.head_dim));
            put("attention.value_length", size(a.head_dim));
            if let Some(scale) = a.scale {
                put("attention.scale", number(scale));
            }
        }
        Some(latent) => {
            // All heads share the narrow vectors: one head of keys and values, as llama.cpp runs it.
            put("attention.head_count_kv", size(1));
            put("attention.key_length", size(latent.kv_rank + latent.rope));
            put("attention.value_length", size(latent.kv_rank));
            put("attention.key_length_mla", size(a.head_dim));
            put("attention.value_length_mla", size(latent.value));
            put("attention.kv_lora_rank", size(latent.kv_rank));
            // Without one, llama.cpp wants the key too, but for numbers of layers that it knows.
            put("attention.q_lora_rank", size(latent.q_rank.unwrap_or(0)));
        }
    }
    if let Some(window) = a.window {
        put("attention.sliding_window", size(window));
    }
    if arch.special == Special::Granite {
        put("embedding_scale", number(spec.scales.embedding));
        put("residual_scale", number(spec.scales.residual));
        put("logit_scale", number(1.0 / spec.scales.logits));
    }
    let dense = spec.layers.iter().find_map(|layer| match layer {
        FfnSpec::Dense(mlp) => Some(mlp.intermediate),
        FfnSpec::Moe(_) => None,
    });
    let Some(moe) = spec.first_moe() else {
        put("feed_forward_length", size(dense.unwrap_or(0)));
        return Ok(keys);
    };
    put("feed_forward_length", size(dense.unwrap_or(moe.expert.intermediate)));
    experts(moe, spec, arch, &mut put);
    Ok(keys)
}

/// The keys of MoE layers.
fn experts(moe: &MoeSpec, spec: &ModelSpec, arch: &Arch, put: &mut dyn FnMut(&str, Value)) {
    let size = |n: usize| Value::U32(n as u32);
    put("expert_count", size(moe.experts));
    put("expert_used_count", size(moe.top_k));
    put("expert_feed_forward_length", size(moe.expert.intermediate));
    match arch.shared {
        Shared::None => {}
        Shared::Count => put("expert_shared_count", size(moe.shared_intermediate / moe.expert.intermediate)),
        Shared::Width => put("expert_shared_feed_forward_length", size(moe.shared_intermediate)),
    }
    let moe_layers = spec.layers.iter().enumerate().filter(|(_, layer)| matches!(layer, FfnSpec::Moe(_)));
    let moe_layers: Vec<usize> = moe_layers.map(|(l, _)| l).collect();
    let step = moe_layers.get(1).map_or(1, |second| second - moe_layers[0]);
    if arch.special == Special::Ernie {
        put("interleave_moe_layer_step", size(step));
    }
    if moe_layers[0] > 0 || arch.says_router || arch.special == Special::Ernie {
        put("leading_dense_block_count", size(moe_layers[0]));
    }
    let r = &moe.router;
    if arch.says_router || arch.scores == Scores::Sigmoid {
        put("expert_gating_func", Value::U32(if r.kind == "sigmoid_bias" { 2 } else { 1 }));
    }
    if arch.says_router {
        put("expert_weights_scale", Value::F32(r.scale as f32));
        put("expert_weights_norm", Value::Bool(r.normalize));
        put("expert_group_count", size(r.groups));
        put("expert_group_used_count", size(r.top_groups));
    }
}

/// The tensors that are to be written.
struct Planned {
    shapes: HashMap<String, Vec<usize>>,
    values: HashMap<&'static str, Vec<f64>>,
}

impl spec::Tensors for Planned {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn values(&self, name: &str) -> Result<Option<Vec<f64>>> {
        Ok(self.values.get(name).cloned())
    }
}

fn read_back(
    said: &ModelSpec,
    arch: &'static Arch,
    keys: &[(String, Value)],
    tensors: &[(&'static str, Vec<f32>)],
) -> Result<ModelSpec> {
    let path = Path::new("GGUF");
    let mut writer = Writer::new();
    let wrong = |e: senmon_gguf::GgufError| super::metadata::of_file(path, e);
    writer.set("general.architecture", arch.name).map_err(wrong)?;
    for (key, value) in keys.iter().cloned().chain(of_tokens(said)) {
        writer.set(&key, value).map_err(wrong)?;
    }
    let widen = |values: &[f32]| values.iter().map(|x| super::metadata::widened(*x)).collect();
    let planned = Planned {
        shapes: parts(said, arch).into_iter().map(|part| (part.tensor.clone(), part.whole_shape())).collect(),
        values: tensors.iter().map(|(name, values)| (*name, widen(values))).collect(),
    };
    spec::read(&Keys::new(path, writer.metadata())?, &planned, false)
}

/// The keys of the tokens that mean something to programs.
pub(crate) fn of_tokens(spec: &ModelSpec) -> Vec<(String, Value)> {
    let tokens = &spec.tokens;
    let eos = ["eos", "eot", "eom"].into_iter().zip(tokens.eos.iter().copied().map(Some));
    let named = [("bos", tokens.bos), ("padding", tokens.pad)].into_iter().chain(eos);
    named
        .filter_map(|(name, id)| Some((format!("tokenizer.ggml.{name}_token_id"), Value::U32(id?))))
        .collect()
}

/// The first field that two specifications differ in, with its values in both.
fn difference(a: &ModelSpec, b: &ModelSpec) -> Option<String> {
    fn differ(at: &str, a: &serde_json::Value, b: &serde_json::Value) -> Option<String> {
        use serde_json::Value::{Array, Null, Number, Object};
        match (a, b) {
            (Object(x), Object(y)) => {
                let keys: std::collections::BTreeSet<_> = x.keys().chain(y.keys()).collect();
                keys.into_iter().find_map(|key| {
                    let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                    differ(&at, x.get(key).unwrap_or(&Null), y.get(key).unwrap_or(&Null))
                })
            }
            (Array(x), Array(y)) if x.len() == y.len() => {
                x.iter().zip(y).enumerate().find_map(|(n, (x, y))| differ(&format!("{at}[{n}]"), x, y))
            }
            // Numbers become f32 on their way.
            (Number(x), Number(y)) => {
                let (x, y) = (x.as_f64().unwrap_or(f64::NAN), y.as_f64().unwrap_or(f64::NAN));
                ((x - y).abs() > 1e-6 * x.abs()).then(|| format!("{at} = {x} (it would be read as {y})"))
            }
            (x, y) => (x != y).then(|| format!("{at} = {x} (it would be read as {y})")),
        }
    }
    let json = |spec: &ModelSpec| serde_json::to_value(spec).unwrap_or_default();
    differ("", &json(a), &json(b))
}
