//! `qwen2_moe` (Qwen1.5-MoE, Qwen2-57B-A14B, 2407.10671): biases on queries, keys and values, a gate for the shared expert,
//! weights normalised or not, dense layers by step or by number.

use super::common::{
    Biases, Defaults, Json, Words, Written, dense_layers, expect_decoder, layer_types, moe_and_dense, with,
    write_decoder, write_softmax_moe,
};
use crate::error::Result;
use crate::names::{Names, PLAIN};
use crate::spec::{ModelSpec, MoeSpec, QkNorm};
use serde_json::json;

pub(super) const NAMES: Names = Names { shared: "shared_expert", ..PLAIN };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let (window, layers) = match (json.bool_or("use_sliding_window", false)?, json.get("layer_types")) {
        (false, _) => (None, None),
        (true, Some(_)) => json.windows(Some(4096), 0)?,
        (true, None) => {
            // Every other layer, up to a number.
            let most = json.maybe_usize("max_window_layers")?.unwrap_or(28);
            let (window, _) = json.windows(Some(4096), 0)?;
            (window, Some((0..json.layer_count()?).map(|l| l % 2 == 0 && l < most).collect()))
        }
    };
    let defaults = Defaults { kv_heads: Some(16), ..Defaults::default() };
    let mut spec = json.decoder(QkNorm::None, window, defaults)?;
    let a = &mut spec.attention;
    (a.window_layers, a.qkv_bias, a.out_bias) = (layers, json.bool_or("qkv_bias", true)?, false);
    let moe = MoeSpec {
        shared_intermediate: json.usize("shared_expert_intermediate_size")?,
        shared_gate: true,
        ..json.softmax_moe("moe_intermediate_size")?
    };
    let is_moe = json.sparse_steps()?;
    json.finish_mixed(spec, &moe, |l| is_moe[l])
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    let words = Words { biases: Biases::Qkv, layer_windows: true, shared_gate: true, ..Words::default() };
    expect_decoder(spec, QkNorm::None, words)?;
    let (moe, dense) = moe_and_dense(spec)?;
    if moe.shared_intermediate == 0 {
        return Err("no shared expert".into());
    }
    let a = &spec.attention;
    Ok(with(
        with(write_decoder(spec, moe.expert.activation), write_softmax_moe(moe, "moe_intermediate_size")?),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "shared_expert_intermediate_size": moe.shared_intermediate,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(spec),
            "qkv_bias": a.qkv_bias,
            "use_sliding_window": a.window.is_some(),
            "sliding_window": a.window,
            "layer_types": layer_types(spec),
            "router_aux_loss_coef": 0.001,
        }),
    ))
}
