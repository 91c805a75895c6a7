//! `qwen3` (the dense Qwen3 models, 2505.09388): every layer dense, norms of each query and key head.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, same_dense, same_moe, with, write_decoder,
};
use crate::error::Result;
use crate::spec::{FfnSpec, ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    json.refuse_unless("use_sliding_window", |v| v.as_bool() == Some(false))?;
    let defaults = Defaults { kv_heads: Some(32), head_dim: Some(128), ..Defaults::default() };
    let spec = json.decoder(QkNorm::Head, None, defaults)?;
    let mlp = json.mlp("intermediate_size")?;
    json.finish(spec, |_| FfnSpec::Dense(mlp.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::Head, Words { biases: Biases::All, ..Words::default() })?;
    if same_moe(&spec.layers)?.is_some() {
        return Err("an MoE layer".into());
    }
    let mlp = same_dense(&spec.layers)?.ok_or("no layer")?;
    Ok(with(
        write_decoder(spec, mlp.activation),
        json!({
            "intermediate_size": mlp.intermediate,
            "attention_bias": spec.attention.qkv_bias,
            "use_sliding_window": false,
            "sliding_window": null,
        }),
    ))
}
