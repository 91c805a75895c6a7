//! `llama` (Llama 2 and 3 without scaled positions, 2307.09288): every layer dense.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, same_dense, same_moe, with, write_decoder,
};
use crate::error::Result;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let spec = json.decoder(QkNorm::None, None, Defaults::default())?;
    let mlp = MlpSpec { bias: json.bool_or("mlp_bias", false)?, ..json.mlp("intermediate_size")? };
    json.finish(spec, |_| FfnSpec::Dense(mlp.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::None, Words { biases: Biases::All, mlp_bias: true, ..Words::default() })?;
    if same_moe(&spec.layers)?.is_some() {
        return Err("an MoE layer".into());
    }
    let mlp = same_dense(&spec.layers)?.ok_or("no layer")?;
    Ok(with(
        write_decoder(spec, mlp.activation),
        json!({
            "intermediate_size": mlp.intermediate,
            "attention_bias": spec.attention.qkv_bias,
            "mlp_bias": mlp.bias,
        }),
    ))
}
