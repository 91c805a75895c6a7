//! `flex_olmo` (FlexOlmo, 2507.07024): norms after attention and feed-forward, norms of all query and key heads together.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, no_shared, only_moe, with, write_decoder,
    write_softmax_moe,
};
use crate::error::Result;
use crate::names::{Names, PLAIN};
use crate::spec::{FfnSpec, ModelSpec, NormPlace, QkNorm};
use serde_json::json;

pub(super) const NAMES: Names =
    Names { norms: ["post_attention_layernorm", "post_feedforward_layernorm"], ..PLAIN };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    json.refuse_unless("sliding_window", |_| false)?;
    let defaults = Defaults { rope_theta: 500_000.0, ..Defaults::default() };
    let mut spec = json.decoder(QkNorm::Full, None, defaults)?;
    spec.norm_place = NormPlace::After;
    let moe = json.softmax_moe("intermediate_size")?;
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::Full, Words { biases: Biases::All, after: true, ..Words::default() })?;
    let moe = only_moe(spec)?;
    no_shared(moe)?;
    let map = with(write_decoder(spec, moe.expert.activation), write_softmax_moe(moe, "intermediate_size")?);
    Ok(with(map, json!({ "attention_bias": spec.attention.qkv_bias, "router_aux_loss_coef": 0.01 })))
}
