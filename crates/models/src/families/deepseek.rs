//! `deepseek_v2` (2405.04434) and `deepseek_v3` (2412.19437): latent attention, shared experts, the first layers dense. V2 routes
//! by softmax, within groups ranked by their best score; V3 by sigmoid with a bias for the selection, groups ranked by their
//! two best.

use super::common::{
    Biases, Defaults, Json, Words, Written, expect_decoder, moe_and_dense, with, write_decoder,
    write_deepseek_moe,
};
use super::rope::RopeKeys;
use crate::error::Result;
use crate::rope::{RopeScaling, RopeSpec, yarn_mscale};
use crate::spec::{AttentionSpec, LatentSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use senmon_moe::config::GroupMask;
use serde_json::{Map, Value, json};

/// What both versions share.
fn read(json: &Json, router: RouterConfig, neighbours: bool, with_mlp_bias: bool) -> Result<ModelSpec> {
    let bias = json.bool_or("attention_bias", false)?;
    let mlp_bias = json.bool_or("mlp_bias", false)? && with_mlp_bias;
    json.refuse_unless("moe_layer_freq", |v| v.as_u64() == Some(1))?;
    // The width of a head is not what `head_dim` says here.
    let mut spec = json.decoder(QkNorm::None, None, Defaults { head_dim: Some(2), ..Defaults::default() })?;
    let latent = LatentSpec {
        q_rank: json.maybe_usize("q_lora_rank")?,
        kv_rank: json.usize("kv_lora_rank")?,
        nope: json.usize("qk_nope_head_dim")?,
        rope: json.usize("qk_rope_head_dim")?,
        value: json.usize("v_head_dim")?,
        // Whatever rms_norm_eps is.
        norm_eps: 1e-6,
    };
    let (keys, heads) = (RopeKeys::new(json)?, spec.attention.heads);
    let head_dim = latent.nope + latent.rope;
    let mut scale = None;
    if keys.kind()? != "default"
        && let Some((factor, all)) = keys.all_dim()?
    {
        let mscale = yarn_mscale(factor, all);
        scale = Some(mscale * mscale / (head_dim as f64).sqrt());
    }
    spec.attention = AttentionSpec {
        rope_theta: spec.attention.rope_theta,
        rope: RopeSpec { neighbours, dims: None, scaling: keys.scaling()? },
        scale,
        qkv_bias: bias,
        out_bias: bias,
        latent: Some(latent),
        ..AttentionSpec::plain(heads, heads, head_dim)
    };
    let mut moe = json.deepseek_moe(router, 0)?;
    moe.shared_bias = mlp_bias && moe.shared_intermediate > 0;
    let first = json.maybe_usize("first_k_dense_replace")?.unwrap_or(0);
    json.finish_biased(spec, &moe, mlp_bias, |l| l >= first)
}

pub(super) fn read_v2(json: &Json) -> Result<ModelSpec> {
    json.expect_text("topk_method", &["greedy", "group_limited_greedy"])?;
    json.expect_text("scoring_func", &["softmax"])?;
    // transformers does not look at it; the authors' code divides by the sum and leaves the factor out.
    json.refuse_unless("norm_topk_prob", |v| v.as_bool() == Some(false))?;
    let grouped = json.text("topk_method")? == Some("group_limited_greedy");
    let group = |key: &str| json.maybe_usize(key).map(|n| n.filter(|_| grouped).unwrap_or(1));
    let router = RouterConfig {
        normalize: false,
        groups: group("n_group")?,
        top_groups: group("topk_group")?,
        group_mask: GroupMask::Zero,
        ..RouterConfig::default()
    };
    read(json, router, true, true)
}

pub(super) fn read_v3(json: &Json) -> Result<ModelSpec> {
    json.expect_text("topk_method", &["noaux_tc"])?;
    json.expect_text("scoring_func", &["sigmoid"])?;
    let router = RouterConfig { scale: 2.5, ..json.sigmoid_router(true, 8, 4)? };
    read(json, router, json.bool_or("rope_interleave", true)?, false)
}

/// The keys of both versions, and the MoE layers.
fn write(spec: &ModelSpec, neighbours: bool) -> std::result::Result<(Map<String, Value>, MoeSpec), String> {
    expect_decoder(
        spec,
        QkNorm::None,
        Words {
            biases: Biases::All,
            latent: true,
            neighbours,
            scales: true,
            mlp_bias: true,
            ..Words::default()
        },
    )?;
    if spec.scales != Default::default() {
        return Err("factors".into());
    }
    let (moe, dense) = moe_and_dense(spec)?;
    let mlp_bias = moe.shared_bias;
    if dense.is_some_and(|dense| dense.bias != mlp_bias) {
        return Err("biases in some MLPs and not in others".into());
    }
    let a = &spec.attention;
    let latent = a.latent.as_ref().ok_or("no latent attention")?;
    if latent.norm_eps != 1e-6 {
        return Err(format!("latent.norm_eps = {}", latent.norm_eps));
    }
    let mut map = with(write_decoder(spec, moe.expert.activation), write_deepseek_moe(spec)?);
    // The factor on the scores goes by way of YaRN's mscale_all_dim.
    let plain = 1.0 / (a.head_dim as f64).sqrt();
    match (a.scale, &a.rope.scaling) {
        (None, _) => {}
        (Some(scale), RopeScaling::Yarn { factor, .. }) if *factor > 1.0 && scale > plain => {
            let all = ((scale / plain).sqrt() - 1.0) / (0.1 * factor.ln());
            map["rope_parameters"]["mscale_all_dim"] = all.into();
        }
        (Some(scale), _) => return Err(format!("a scale of attention of {scale}")),
    }
    map.remove("head_dim");
    let map = with(
        map,
        json!({
            "q_lora_rank": latent.q_rank,
            "kv_lora_rank": latent.kv_rank,
            "qk_nope_head_dim": latent.nope,
            "qk_rope_head_dim": latent.rope,
            "v_head_dim": latent.value,
            "attention_bias": a.qkv_bias,
        }),
    );
    Ok((map, moe.clone()))
}

pub(super) fn write_v2(spec: &ModelSpec) -> Written {
    let (map, moe) = write(spec, true)?;
    let r = &moe.router;
    if r.kind != "topk_pre" || r.normalize {
        return Err(format!("router.kind = {}, normalised: {}", r.kind, r.normalize));
    }
    if moe.shared_intermediate == 0 {
        return Err("no shared experts".into());
    }
    let method = if r.groups > 1 { "group_limited_greedy" } else { "greedy" };
    Ok(with(map, json!({ "topk_method": method, "mlp_bias": moe.shared_bias })))
}

pub(super) fn write_v3(spec: &ModelSpec) -> Written {
    let neighbours = spec.attention.rope.neighbours;
    let (map, moe) = write(spec, neighbours)?;
    let r = &moe.router;
    if r.kind != "sigmoid_bias" || r.group_mask != GroupMask::Inf {
        return Err(format!("router.kind = {}", r.kind));
    }
    if moe.shared_bias {
        return Err("biases of MLPs".into());
    }
    if moe.experts / r.groups < 2 || moe.shared_intermediate == 0 {
        return Err("groups of one expert, or no shared experts".into());
    }
    Ok(with(map, json!({ "rope_interleave": neighbours })))
}
