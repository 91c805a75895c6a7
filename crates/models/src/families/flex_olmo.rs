//! `flex_olmo` (FlexOlmo, 2507.07024): norms after attention and feed-forward, norms of all query and key heads together.

use super::common::{
    Biases, Defaults, Json, Words, expect_decoder, no_shared, only_moe, softmax_normalized, with,
    write_decoder,
};
use crate::error::Result;
use crate::names::{Names, PLAIN};
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, NormPlace, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) const NAMES: Names =
    Names { norms: ["post_attention_layernorm", "post_feedforward_layernorm"], ..PLAIN };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    json.refuse_unless("sliding_window", |_| false)?;
    let defaults = Defaults { rope_theta: 500_000.0, ..Defaults::default() };
    let mut spec = json.decoder(QkNorm::Full, None, defaults)?;
    spec.norm_place = NormPlace::After;
    let experts = json.usize_as(["num_experts", "num_local_experts"])?;
    let moe = MoeSpec {
        router: RouterConfig { normalize: json.bool_or("norm_topk_prob", false)?, ..RouterConfig::default() },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, json.mlp("intermediate_size")?)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::Full, Words { biases: Biases::All, after: true, ..Words::default() })?;
    let moe = only_moe(spec)?;
    let normalized = softmax_normalized(moe)?;
    no_shared(moe)?;
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": normalized,
            "attention_bias": spec.attention.qkv_bias,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": false,
        }),
    ))
}
