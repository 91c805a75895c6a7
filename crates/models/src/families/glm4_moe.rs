//! `glm4_moe` (GLM-4.5, 2508.06471): half of each head turns, biases on queries, keys and values, sigmoid scores with a bias for
//! the selection, shared experts, the first layers dense.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, moe_and_dense, shared_experts, with,
    write_decoder, write_deepseek_moe,
};
use crate::error::Result;
use crate::spec::{ModelSpec, QkNorm};
use serde_json::json;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let qk_norm = if json.bool_or("use_qk_norm", false)? { QkNorm::Head } else { QkNorm::None };
    let defaults = Defaults { kv_heads: Some(8), partial: Some(0.5), ..Defaults::default() };
    let mut spec = json.decoder(qk_norm, None, defaults)?;
    spec.attention.out_bias = false;
    let moe = json.deepseek_moe(json.sigmoid_router(true, 1, 1)?, 1)?;
    let first = json.maybe_usize("first_k_dense_replace")?.unwrap_or(1);
    json.finish_mixed(spec, &moe, |l| l >= first)
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    let a = &spec.attention;
    let normed = match a.qk_norm {
        QkNorm::Head => QkNorm::Head,
        _ => QkNorm::None,
    };
    expect_decoder(spec, normed, Words { biases: Biases::Qkv, partial: true, ..Words::default() })?;
    let (moe, _) = moe_and_dense(spec)?;
    let r = &moe.router;
    if r.kind != "sigmoid_bias" || moe.experts / r.groups < 2 {
        return Err(format!("router.kind = {}, or groups of one expert", r.kind));
    }
    let shared = shared_experts(moe)?;
    if shared == 0 {
        return Err("no shared experts".into());
    }
    let part = a.rope.dims.map_or(1.0, |dims| dims as f64 / a.head_dim as f64);
    let mut value = with(
        with(write_decoder(spec, moe.expert.activation), write_deepseek_moe(spec)?),
        json!({
            "attention_bias": a.qkv_bias,
            "use_qk_norm": a.qk_norm == QkNorm::Head,
            "partial_rotary_factor": part,
        }),
    );
    value["rope_parameters"]["partial_rotary_factor"] = part.into();
    Ok(value)
}
