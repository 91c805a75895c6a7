//! `mistral` (2310.06825): dense, as Llama, with a window for all layers.

use super::common::{
    Defaults, Json, Words, Written, expect_decoder, same_dense, same_moe, with, write_decoder,
};
use crate::error::Result;
use crate::spec::{FfnSpec, ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let (window, layers) = json.windows(Some(4096), 0)?;
    let mut spec =
        json.decoder(QkNorm::None, window, Defaults { kv_heads: Some(8), ..Defaults::default() })?;
    spec.attention.window_layers = layers;
    let mlp = json.mlp("intermediate_size")?;
    json.finish(spec, |_| FfnSpec::Dense(mlp.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::None, Words { window: true, ..Words::default() })?;
    if same_moe(&spec.layers)?.is_some() {
        return Err("an MoE layer".into());
    }
    let mlp = same_dense(&spec.layers)?.ok_or("no layer")?;
    Ok(with(
        write_decoder(spec, mlp.activation),
        json!({ "intermediate_size": mlp.intermediate, "sliding_window": spec.attention.window }),
    ))
}
