//! `qwen3_moe` (Qwen3-30B-A3B, 2505.09388): norms of each query and key head, weights normalised or not; every
//! `decoder_sparse_step`-th layer is MoE, but not those of `mlp_only_layers`.

use super::common::{
    Biases, Defaults, Json, Words, Written, dense_layers, expect_decoder, moe_and_dense, no_shared, with,
    write_decoder, write_softmax_moe,
};
use crate::error::Result;
use crate::spec::{ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let window = match json.bool_or("use_sliding_window", false)? {
        true => Some(json.usize("sliding_window")?),
        false => None,
    };
    let spec = json.decoder(QkNorm::Head, window, Defaults { kv_heads: Some(4), ..Defaults::default() })?;
    let moe = json.softmax_moe("moe_intermediate_size")?;
    let is_moe = json.sparse_steps()?;
    json.finish_mixed(spec, &moe, |l| is_moe[l])
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::Head, Words { biases: Biases::All, window: true, ..Words::default() })?;
    let (moe, dense) = moe_and_dense(spec)?;
    no_shared(moe)?;
    Ok(with(
        with(write_decoder(spec, moe.expert.activation), write_softmax_moe(moe, "moe_intermediate_size")?),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(spec),
            "attention_bias": spec.attention.qkv_bias,
            "use_sliding_window": spec.attention.window.is_some(),
            "sliding_window": spec.attention.window,
            "max_window_layers": 0,
            "router_aux_loss_coef": 0.001,
        }),
    ))
}
