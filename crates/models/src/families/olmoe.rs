//! `olmoe` (OLMoE-1B-7B, 2409.02060): every layer MoE, norms over all queries and over all keys, weights normalised or not.

use super::common::{
    Biases, Defaults, Json, Words, expect_decoder, no_shared, only_moe, softmax_normalized, with,
    write_decoder,
};
use crate::error::Result;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    json.refuse_unless("clip_qkv", |_| false)?;
    // No key of the family, but transformers 5 hands it to the attention where it is there.
    json.refuse_unless("sliding_window", |_| false)?;
    let spec = json.decoder(QkNorm::Full, None, Defaults::default())?;
    let experts = json.usize_as(["num_experts", "num_local_experts"])?;
    let moe = MoeSpec {
        router: RouterConfig { normalize: json.bool_or("norm_topk_prob", false)?, ..RouterConfig::default() },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, json.mlp("intermediate_size")?)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::Full, Words { biases: Biases::All, ..Words::default() })?;
    let a = &spec.attention;
    if a.heads * a.head_dim != spec.hidden {
        return Err(format!(
            "heads · head_dim = {} is not the hidden width {}",
            a.heads * a.head_dim,
            spec.hidden
        ));
    }
    let moe = only_moe(spec)?;
    let normalized = softmax_normalized(moe)?;
    no_shared(moe)?;
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": normalized,
            "attention_bias": a.qkv_bias,
            "clip_qkv": null,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": false,
        }),
    ))
}
