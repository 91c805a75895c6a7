//! `hunyuan_v1_moe` (Hunyuan-A13B): norms of each query and key head after the rotation, one shared MLP, weights normalised.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, softmax_normalized, with, write_decoder,
};
use super::rope::RopeKeys;
use crate::error::Result;
use crate::names::{Names, PLAIN};
use crate::rope::RopeScaling;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use serde_json::{Value, json};

pub(super) const NAMES: Names = Names {
    qk_norms: ["self_attn.query_layernorm", "self_attn.key_layernorm"],
    router: "gate.wg",
    shared: "shared_mlp",
    ..PLAIN
};

/// A number for each layer, given as one for all or as a list.
fn by_layer(json: &Json, key: &str, default: usize, layers: usize) -> Result<Vec<usize>> {
    let one = |v: &Value| v.as_u64().filter(|n| *n <= 1 << 24).map(|n| n as usize);
    let read = |v: &Value| match v {
        Value::Array(all) if all.len() == layers => all.iter().map(one).collect(),
        v => one(v).map(|n| vec![n; layers]),
    };
    let found = json.typed(key, &format!("a whole number, or one for each of {layers} layers"), read)?;
    Ok(found.unwrap_or_else(|| vec![default; layers]))
}

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let mut spec = json.decoder(QkNorm::HeadAfter, None, Defaults::default())?;
    if let Some(alpha) = RopeKeys::new(json)?.alpha()?.filter(|alpha| *alpha != 0.0)
        && matches!(spec.attention.rope.scaling, RopeScaling::Dynamic { .. })
    {
        // A fixed θ, whatever the length.
        let d = spec.attention.head_dim as f64;
        spec.attention.rope.scaling = RopeScaling::None;
        spec.max_positions = json.usize("max_position_embeddings")?;
        spec.attention.rope_theta *= alpha.powf(d / (d - 2.0));
    }
    let layers = json.layer_count()?;
    let experts = by_layer(json, "num_experts", 1, layers)?;
    let top_k = by_layer(json, "moe_topk", 1, layers)?;
    let expert = json.mlp("intermediate_size")?;
    json.finish(spec, |l| {
        FfnSpec::Moe(MoeSpec {
            shared_intermediate: expert.intermediate,
            ..MoeSpec::plain(experts[l], top_k[l], expert.clone())
        })
    })
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::HeadAfter, Words { biases: Biases::All, ..Words::default() })?;
    let first = spec.first_moe().ok_or("no MoE layer")?;
    let (mut experts, mut top_k) = (Vec::new(), Vec::new());
    for layer in &spec.layers {
        let FfnSpec::Moe(moe) = layer else { return Err("a dense layer".into()) };
        if (MoeSpec { experts: first.experts, top_k: first.top_k, ..moe.clone() }) != *first {
            return Err("MoE layers that differ in more than the number of experts".into());
        }
        if !softmax_normalized(moe)? {
            return Err("weights that are not normalised over the picked experts".into());
        }
        experts.push(moe.experts);
        top_k.push(moe.top_k);
    }
    // One number where all layers have it.
    let short = |list: Vec<usize>| match list.iter().all(|n| *n == list[0]) {
        true => json!(list[0]),
        false => json!(list),
    };
    let moe = first;
    if moe.shared_intermediate != moe.expert.intermediate {
        return Err(format!(
            "a shared expert of {} beside experts of {}",
            moe.shared_intermediate, moe.expert.intermediate
        ));
    }
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_experts": short(experts),
            "moe_topk": short(top_k),
            "attention_bias": spec.attention.qkv_bias,
        }),
    ))
}
