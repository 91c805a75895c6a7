//! `phimoe` (Phi-3.5-MoE, 2404.14219): LayerNorm, biases on attention and head, SparseMixer's two picks, LongRoPE.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, no_shared, only_moe, with, write_decoder,
};
use crate::error::Result;
use crate::names::{Experts, Names, PLAIN};
use crate::rope::RopeScaling;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, NormKind, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::json;

pub(super) const NAMES: Names =
    Names { block: "block_sparse_moe", experts: Experts::Each(["w1", "w3", "w2"]), ..PLAIN };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let defaults = Defaults { rope_theta: 1e6, kv_heads: Some(8), ..Defaults::default() };
    let mut spec = json.decoder(QkNorm::None, json.maybe_usize("sliding_window")?, defaults)?;
    if !matches!(spec.attention.rope.scaling, RopeScaling::None | RopeScaling::Longrope { .. }) {
        return Err(json.error("rope_parameters.rope_type of this family is default or longrope"));
    }
    (spec.norm, spec.head_bias) = (NormKind::Layer, json.bool_or("lm_head_bias", false)?);
    let experts = json.usize_as(["num_local_experts", "num_experts"])?;
    let top_k = json.usize("num_experts_per_tok")?;
    if top_k != 2 {
        return Err(json.error(format!("num_experts_per_tok = {top_k}: SparseMixer picks two")));
    }
    let moe = MoeSpec {
        router: RouterConfig {
            kind: "sparsemixer".into(),
            sparsemixer_eps: json.f64_or("router_jitter_noise", 0.01)?,
            ..RouterConfig::default()
        },
        ..MoeSpec::plain(experts, top_k, json.mlp("intermediate_size")?)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    let words = Words {
        biases: Biases::All,
        window: true,
        layer_norm: true,
        head_bias: true,
        mscales: true,
        ..Words::default()
    };
    expect_decoder(spec, QkNorm::None, words)?;
    let moe = only_moe(spec)?;
    no_shared(moe)?;
    if moe.router.kind != "sparsemixer" {
        return Err(format!("router.kind = {}", moe.router.kind));
    }
    let mut value = with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "attention_bias": spec.attention.qkv_bias,
            "lm_head_bias": spec.head_bias,
            "sliding_window": spec.attention.window,
            "router_jitter_noise": moe.router.sparsemixer_eps,
            "input_jitter_noise": 0.0,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    );
    if let RopeScaling::Longrope { short_factor, long_factor, original, .. } = &spec.attention.rope.scaling {
        value["rope_parameters"]["short_mscale"] = (*short_factor).into();
        value["rope_parameters"]["long_mscale"] = (*long_factor).into();
        value.insert("original_max_position_embeddings".into(), (*original).into());
    }
    Ok(value)
}
