//! `olmoe` (OLMoE-1B-7B, 2409.02060): every layer MoE, norms over all queries and over all keys, weights normalised or not.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, no_shared, only_moe, with, write_decoder,
    write_softmax_moe,
};
use crate::error::Result;
use crate::spec::{FfnSpec, ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    json.refuse_unless("clip_qkv", |_| false)?;
    // No key of the family, but transformers 5 hands it to the attention where it is there.
    json.refuse_unless("sliding_window", |_| false)?;
    let spec = json.decoder(QkNorm::Full, None, Defaults::default())?;
    let moe = json.softmax_moe("intermediate_size")?;
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
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
    no_shared(moe)?;
    let map = with(write_decoder(spec, moe.expert.activation), write_softmax_moe(moe, "intermediate_size")?);
    Ok(with(map, json!({ "attention_bias": a.qkv_bias, "clip_qkv": null, "router_aux_loss_coef": 0.01 })))
}
