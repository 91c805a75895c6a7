//! A `config.json` written: the keys that several families have in common, and what a family has no words for.

use super::super::rope::{self};
use super::read::hidden_act;
use crate::rope::RopeScaling;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, MoeSpec, NormKind, NormPlace, QkNorm, Scales};
use senmon_kernels::activation::Activation;
use serde_json::{Map, Value, json};

/// The keys that all families write.
pub fn write_decoder(spec: &ModelSpec, activation: Activation) -> Map<String, Value> {
    let a = &spec.attention;
    let eos = match spec.tokens.eos.as_slice() {
        [] => Value::Null,
        [one] => (*one).into(),
        several => several.into(),
    };
    let positions = match a.rope.scaling {
        RopeScaling::Dynamic { original, .. } => original,
        _ => spec.max_positions,
    };
    let value = json!({
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers.len(),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": hidden_act(activation),
        "max_position_embeddings": positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": a.rope_theta,
        "rope_parameters": rope::write(a),
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

/// What a family writes: the keys of `config.json`, or the field that it has no word for.
pub type Written = std::result::Result<Map<String, Value>, String>;

/// Adds `extra`'s keys.
pub fn with(mut map: Map<String, Value>, extra: Value) -> Map<String, Value> {
    if let Value::Object(extra) = extra {
        map.extend(extra);
    }
    map
}

/// What a family has words for beyond a plain decoder.
#[derive(Clone, Copy, Debug, Default)]
pub struct Words {
    /// Biases: on queries, keys and values, or on these and the output.
    pub biases: Biases,
    /// One window for all layers.
    pub window: bool,
    /// A window for some layers.
    pub layer_windows: bool,
    /// Part of a head turns.
    pub partial: bool,
    /// Neighbours turn together (always, where the family has them so).
    pub neighbours: bool,
    /// Norms after blocks (always).
    pub after: bool,
    /// Factors.
    pub scales: bool,
    /// Sinks (always).
    pub sinks: bool,
    /// LayerNorm (always).
    pub layer_norm: bool,
    /// A bias on the head.
    pub head_bias: bool,
    /// Factors on cosines and sines, one for short contexts and one for long ones.
    pub mscales: bool,
    /// Biases of experts and routers, and gpt-oss's activation (always).
    pub biased_experts: bool,
    /// Biases of MLPs and shared experts.
    pub mlp_bias: bool,
    /// A gate of the shared experts (always).
    pub shared_gate: bool,
    /// Latent attention (always).
    pub latent: bool,
}

/// Biases that a family can say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Biases {
    /// None.
    #[default]
    None,
    /// On all projections or on none.
    All,
    /// On queries, keys and values, or on none.
    Qkv,
}

/// Refuses what a family has no words for.
pub fn expect_decoder(spec: &ModelSpec, qk_norm: QkNorm, words: Words) -> std::result::Result<(), String> {
    let a = &spec.attention;
    if a.qk_norm != qk_norm {
        return Err(format!("qk_norm = {:?}", a.qk_norm));
    }
    let biases = match words.biases {
        Biases::None => !a.qkv_bias && !a.out_bias,
        Biases::All => a.qkv_bias == a.out_bias,
        Biases::Qkv => !a.out_bias,
    };
    if !biases {
        return Err(format!("biases on q, k, v: {}, on the output: {}", a.qkv_bias, a.out_bias));
    }
    if let Some(n) = a.window
        && !(words.window || words.layer_windows)
    {
        return Err(format!("window = {n}"));
    }
    let some_windows = a.window.is_some() && a.window_layers.as_ref().is_some_and(|l| l.iter().any(|w| !w));
    let longrope = matches!(a.rope.scaling, RopeScaling::Longrope { short_factor, long_factor, .. } if short_factor != long_factor);
    let foreign = [
        (some_windows && !words.layer_windows, "a window for some layers"),
        (a.rope.dims.is_some() && !words.partial, "rotary positions on part of a head"),
        (a.rope.neighbours != words.neighbours, "rotary positions in another order"),
        (longrope && !words.mscales, "other factors for short contexts than for long ones"),
        ((spec.norm_place == NormPlace::After) != words.after, "norms in another place"),
        ((spec.norm == NormKind::Layer) != words.layer_norm, "norms of another kind"),
        (spec.scales != Scales::default() && !words.scales, "factors"),
        (a.scale.is_some() && !words.scales, "a scale of attention"),
        (a.sinks != words.sinks, "attention sinks"),
        (a.latent.is_some() != words.latent, "latent attention"),
        (spec.head_bias && !words.head_bias, "a bias on the head"),
        (
            matches!(a.rope.scaling, RopeScaling::Dynamic { factor, original }
                if (original as f64 * factor.max(1.0)) as usize != spec.max_positions),
            "a longest context that is not the factor of rotary positions times their own",
        ),
    ];
    for layer in &spec.layers {
        if let FfnSpec::Moe(moe) = layer
            && let Some(what) = moe.beyond_layouts()
        {
            return Err(what);
        }
        let clamped = |mlp: &MlpSpec| matches!(mlp.activation, Activation::Clamped { .. });
        let odd = match layer {
            FfnSpec::Dense(mlp) if mlp.bias && !words.mlp_bias => Some("biases of MLPs"),
            FfnSpec::Dense(mlp) => clamped(mlp).then_some("a clamped MLP"),
            FfnSpec::Moe(moe) => {
                let biased = [moe.router_bias, moe.expert.bias, clamped(&moe.expert)];
                let gate = moe.has_shared_gate() != (words.shared_gate && moe.shared_intermediate > 0);
                [
                    (
                        biased != [words.biased_experts; 3],
                        "biases of experts and routers, or their activation",
                    ),
                    (gate, "a gate of the shared experts"),
                    (moe.shared_bias && !words.mlp_bias, "biases of shared experts"),
                ]
                .into_iter()
                .find_map(|(odd, what)| odd.then_some(what))
            }
        };
        if let Some(what) = odd {
            return Err(what.into());
        }
    }
    match foreign.into_iter().find(|(found, _)| *found) {
        Some((_, what)) => Err(what.into()),
        None => Ok(()),
    }
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

/// The kinds of layers, where some have a window.
pub fn layer_types(spec: &ModelSpec) -> Vec<&'static str> {
    let kind = |l: usize| match spec.attention.window_of(l) {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    (0..spec.layers.len()).map(kind).collect()
}

/// The layers that are dense.
pub fn dense_layers(spec: &ModelSpec) -> Vec<usize> {
    (0..spec.layers.len()).filter(|l| matches!(spec.layers[*l], FfnSpec::Dense(_))).collect()
}

/// How many layers at the bottom are dense; an error where one above an MoE layer is.
pub fn first_dense(spec: &ModelSpec) -> std::result::Result<usize, String> {
    let dense = dense_layers(spec);
    match dense.iter().enumerate().all(|(n, l)| n == *l) {
        true => Ok(dense.len()),
        false => Err("a dense layer above an MoE layer".into()),
    }
}

/// The one kind of MoE layer, and the one dense MLP, of the same activation, beside it.
pub fn moe_and_dense(spec: &ModelSpec) -> std::result::Result<(&MoeSpec, Option<&MlpSpec>), String> {
    let moe = same_moe(&spec.layers)?.ok_or("no MoE layer")?;
    let dense = same_dense(&spec.layers)?;
    if dense.is_some_and(|dense| dense.activation != moe.expert.activation) {
        return Err("dense layers with another activation than the experts'".into());
    }
    Ok((moe, dense))
}

/// The kind of MoE layer that all layers are.
pub fn only_moe(spec: &ModelSpec) -> std::result::Result<&MoeSpec, String> {
    match moe_and_dense(spec)? {
        (moe, None) => Ok(moe),
        _ => Err("a dense layer".into()),
    }
}

/// How many shared experts of the routed ones' width there are.
pub fn shared_experts(moe: &MoeSpec) -> std::result::Result<usize, String> {
    let (shared, one) = (moe.shared_intermediate, moe.expert.intermediate);
    match shared.is_multiple_of(one) {
        true => Ok(shared / one),
        false => Err(format!("shared experts of {shared} in all beside experts of {one}")),
    }
}

/// Refuses shared experts.
pub fn no_shared(moe: &MoeSpec) -> std::result::Result<(), String> {
    if moe.shared_intermediate > 0 { Err("shared experts".into()) } else { Ok(()) }
}

/// The keys that [`Json::softmax_moe`] reads, with those of training, for experts of the width that `width` names.
pub fn write_softmax_moe(moe: &MoeSpec, width: &str) -> std::result::Result<Value, String> {
    let normalized = softmax_normalized(moe)?;
    Ok(json!({
        width: moe.expert.intermediate,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": normalized,
        "output_router_logits": false,
    }))
}

/// The keys that [`Json::deepseek_moe`] reads, and those of the dense layers below and the groups.
pub fn write_deepseek_moe(spec: &ModelSpec) -> std::result::Result<Value, String> {
    let (moe, dense) = moe_and_dense(spec)?;
    let r = &moe.router;
    Ok(json!({
        "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
        "moe_intermediate_size": moe.expert.intermediate,
        "n_routed_experts": moe.experts,
        "n_shared_experts": shared_experts(moe)?,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": r.normalize,
        "routed_scaling_factor": r.scale,
        "n_group": r.groups,
        "topk_group": r.top_groups,
        "first_k_dense_replace": first_dense(spec)?,
    }))
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
