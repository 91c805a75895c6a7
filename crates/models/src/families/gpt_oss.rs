//! `gpt_oss` (2508.10925): attention sinks, windows in every other layer, biases everywhere, clamped gates, softmax over the
//! picked logits.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, layer_types, no_shared, only_moe, with,
    write_decoder,
};
use crate::error::Result;
use crate::names::{Experts, Names, PLAIN};
use crate::rope::RopeScaling;
use crate::spec::{FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_kernels::activation::Activation;
use senmon_moe::RouterConfig;
use serde_json::json;

pub(super) const NAMES: Names = Names {
    experts: Experts::FusedTurned(["experts.gate_up_proj", "experts.down_proj"]),
    router: "router",
    ..PLAIN
};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let alpha = json.f64_or("swiglu_alpha", 1.702)? as f32;
    let limit = json.f64_or("swiglu_limit", 7.0)? as f32;
    if !(limit > 0.0 && alpha.is_finite()) {
        return Err(
            json.error(format!("swiglu_limit = {limit} must be above 0, swiglu_alpha = {alpha} finite"))
        );
    }
    json.expect_text("hidden_act", &["silu"])?;
    let (window, listed) = json.windows(Some(128), 0)?;
    let layers = json.layer_count()?;
    let by_turns = || Some((0..layers).map(|l| l % 2 == 0).collect());
    let defaults = Defaults {
        rope_theta: 150_000.0,
        kv_heads: Some(8),
        head_dim: Some(64),
        quantized: &["mxfp4"],
        ..Defaults::default()
    };
    let mut spec = json.decoder(QkNorm::None, window, defaults)?;
    let a = &mut spec.attention;
    a.sinks = true;
    a.window_layers = if json.get("layer_types").is_some() { listed } else { by_turns() };
    let bias = json.bool_or("attention_bias", true)?;
    (a.qkv_bias, a.out_bias) = (bias, bias);
    if json.get("rope_parameters").is_none() && json.get("rope_scaling").is_none() {
        a.rope.scaling = RopeScaling::Yarn {
            factor: 32.0,
            original: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: false,
            attention_factor: crate::rope::yarn_mscale(32.0, 1.0),
        };
    }
    let expert = MlpSpec {
        intermediate: json.usize("intermediate_size")?,
        activation: Activation::Clamped { alpha, limit },
        gated: true,
        bias: true,
    };
    let experts = json.usize_as(["num_local_experts", "num_experts"])?;
    let top_k = json.usize_as(["num_experts_per_tok", "experts_per_token"])?;
    let moe = MoeSpec {
        router_bias: true,
        router: RouterConfig { kind: "topk_post".into(), ..RouterConfig::default() },
        ..MoeSpec::plain(experts, top_k, expert)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    let words = Words {
        biases: Biases::All,
        layer_windows: true,
        sinks: true,
        biased_experts: true,
        ..Words::default()
    };
    expect_decoder(spec, QkNorm::None, words)?;
    let moe = only_moe(spec)?;
    no_shared(moe)?;
    if !super::common::softmax_normalized(moe)? {
        return Err("weights that are not normalised over the picked experts".into());
    }
    let Activation::Clamped { alpha, limit } = moe.expert.activation else {
        return Err("another activation".into());
    };
    Ok(with(
        write_decoder(spec, Activation::Silu),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "experts_per_token": moe.top_k,
            "swiglu_alpha": alpha,
            "swiglu_limit": limit,
            "attention_bias": spec.attention.qkv_bias,
            "sliding_window": spec.attention.window,
            "layer_types": layer_types(spec),
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    ))
}
