//! `olmoe` (OLMoE-1B-7B, 2409.02060): every layer MoE, norms over all queries and over all keys, weights normalised or not.

use super::common::{
    Defaults, Json, expect_decoder, same_dense, same_moe, softmax_normalized, with, write_decoder,
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
    let moe = MoeSpec {
        experts: json.usize_as(["num_experts", "num_local_experts"])?,
        top_k: json.usize("num_experts_per_tok")?,
        expert: json.mlp("intermediate_size")?,
        shared_intermediate: 0,
        router: RouterConfig { normalize: json.bool_or("norm_topk_prob", false)?, ..RouterConfig::default() },
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::Full, true, false)?;
    let a = &spec.attention;
    if a.heads * a.head_dim != spec.hidden {
        return Err(format!(
            "heads · head_dim = {} is not the hidden width {}",
            a.heads * a.head_dim,
            spec.hidden
        ));
    }
    if same_dense(&spec.layers)?.is_some() {
        return Err("a dense layer".into());
    }
    let moe = same_moe(&spec.layers)?.ok_or("no MoE layer")?;
    let normalized = softmax_normalized(moe)?;
    if moe.shared_intermediate > 0 {
        return Err("shared experts".into());
    }
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
