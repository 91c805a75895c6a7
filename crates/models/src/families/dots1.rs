//! `dots1` (dots.llm1, 2506.05767): sigmoid scores with a bias for the selection, groups, shared experts, the first layers
//! dense, norms of each query and key head.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, layer_types, moe_and_dense, shared_experts, with,
    write_decoder, write_deepseek_moe,
};
use crate::error::Result;
use crate::spec::{ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let (window, layers) = json.windows(Some(4096), 62)?;
    let mut spec =
        json.decoder(QkNorm::Head, window, Defaults { kv_heads: Some(32), ..Defaults::default() })?;
    spec.attention.window_layers = layers;
    let moe = json.deepseek_moe(json.sigmoid_router(false, 1, 1)?, 0)?;
    let first = json.maybe_usize("first_k_dense_replace")?.unwrap_or(0);
    json.finish_mixed(spec, &moe, |l| l >= first)
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(
        spec,
        QkNorm::Head,
        Words { biases: Biases::All, layer_windows: true, ..Words::default() },
    )?;
    let (moe, _) = moe_and_dense(spec)?;
    let r = &moe.router;
    if r.kind != "sigmoid_bias" {
        return Err(format!("router.kind = {}", r.kind));
    }
    let shared = shared_experts(moe)?;
    if shared == 0 {
        return Err("no shared experts".into());
    }
    if moe.experts / r.groups < 2 {
        return Err("groups of one expert".into());
    }
    Ok(with(
        with(write_decoder(spec, moe.expert.activation), write_deepseek_moe(spec)?),
        json!({
            "attention_bias": spec.attention.qkv_bias,
            "sliding_window": spec.attention.window,
            "max_window_layers": 0,
            "layer_types": layer_types(spec),
        }),
    ))
}
