//! `granitemoe` and `granitemoeshared` (IBM Granite 3): factors on embeddings, scores, residual sums and logits; the experts'
//! matrices fused; softmax over the picked logits; in the second, a shared expert without a gate.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, no_shared, only_moe, softmax_normalized, with,
    write_decoder,
};
use crate::error::Result;
use crate::names::{Experts, Names, PLAIN};
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm, Scales};
use senmon_moe::RouterConfig;
use serde_json::{Map, Value, json};

pub(super) const NAMES: Names = Names {
    block: "block_sparse_moe",
    experts: Experts::Fused(["input_linear.weight", "output_linear.weight"]),
    router: "router.layer",
    shared: ".shared_mlp",
    shared_fused: Some(["input_linear", "output_linear"]),
    ..PLAIN
};

fn read_any(json: &Json, shared: usize) -> Result<ModelSpec> {
    let mut spec = json.decoder(QkNorm::None, None, Defaults::default())?;
    let logits = json.f64_or("logits_scaling", 1.0)?;
    if logits == 0.0 {
        return Err(json.error("logits_scaling = 0 divides the logits"));
    }
    spec.attention.scale = Some(json.f64_or("attention_multiplier", 1.0)?);
    spec.scales = Scales {
        embedding: json.f64_or("embedding_multiplier", 1.0)?,
        residual: json.f64_or("residual_multiplier", 1.0)?,
        logits: 1.0 / logits,
    };
    let experts = json.usize_as(["num_local_experts", "num_experts"])?;
    let moe = MoeSpec {
        shared_intermediate: shared,
        router: RouterConfig { kind: "topk_post".into(), ..RouterConfig::default() },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, json.mlp("intermediate_size")?)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    read_any(json, 0)
}

pub(super) fn read_shared(json: &Json) -> Result<ModelSpec> {
    read_any(json, json.maybe_usize("shared_intermediate_size")?.unwrap_or(0))
}

fn write_any(spec: &ModelSpec) -> std::result::Result<(Map<String, Value>, usize), String> {
    let words = Words { biases: Biases::All, scales: true, ..Words::default() };
    expect_decoder(spec, QkNorm::None, words)?;
    let moe = only_moe(spec)?;
    if !softmax_normalized(moe)? {
        return Err("weights that are not normalised over the picked experts".into());
    }
    let scale = spec.attention.scale.ok_or("the usual scale of attention")?;
    let value = with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "attention_bias": spec.attention.qkv_bias,
            "attention_multiplier": scale,
            "embedding_multiplier": spec.scales.embedding,
            "residual_multiplier": spec.scales.residual,
            "logits_scaling": 1.0 / spec.scales.logits,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    );
    Ok((value, moe.shared_intermediate))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    no_shared(only_moe(spec)?)?;
    Ok(write_any(spec)?.0)
}

pub(super) fn write_shared(spec: &ModelSpec) -> Written {
    let (mut value, shared) = write_any(spec)?;
    value.insert("shared_intermediate_size".into(), shared.into());
    Ok(value)
}
