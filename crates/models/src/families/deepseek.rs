//! `deepseek_v2` (2405.04434) and `deepseek_v3` (2412.19437): latent attention, shared experts, the first layers dense. V2 routes
//! by softmax, within groups ranked by their best score; V3 by sigmoid with a bias for the selection, groups ranked by their
//! two best.

use super::common::{
    Biases, Defaults, Json, Words, expect_decoder, first_dense, moe_and_dense, shared_experts, with,
    write_decoder,
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
    let expert = json.mlp("moe_intermediate_size")?;
    let shared = json.maybe_usize("n_shared_experts")?.unwrap_or(0);
    let experts = json.usize_as(["n_routed_experts", "num_local_experts"])?;
    let moe = MoeSpec {
        shared_intermediate: shared.saturating_mul(expert.intermediate),
        shared_bias: mlp_bias && shared > 0,
        router: RouterConfig { scale: json.f64_or("routed_scaling_factor", router.scale)?, ..router },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, expert)
    };
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
    let router = RouterConfig {
        kind: "sigmoid_bias".into(),
        normalize: json.bool_or("norm_topk_prob", true)?,
        scale: 2.5,
        groups: json.maybe_usize("n_group")?.unwrap_or(8),
        top_groups: json.maybe_usize("topk_group")?.unwrap_or(4),
        ..RouterConfig::default()
    };
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
    let (first, shared) = (first_dense(spec)?, shared_experts(moe)?);
    let mlp_bias = moe.shared_bias;
    if dense.is_some_and(|dense| dense.bias != mlp_bias) {
        return Err("biases in some MLPs and not in others".into());
    }
    let a = &spec.attention;
    let latent = a.latent.as_ref().ok_or("no latent attention")?;
    if latent.norm_eps != 1e-6 {
        return Err(format!("latent.norm_eps = {}", latent.norm_eps));
    }
    let mut map = write_decoder(spec, moe.expert.activation);
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
    let value = with(
        map,
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "moe_intermediate_size": moe.expert.intermediate,
            "n_routed_experts": moe.experts,
            "n_shared_experts": shared,
            "num_experts_per_tok": moe.top_k,
            "routed_scaling_factor": moe.router.scale,
            "first_k_dense_replace": first,
            "q_lora_rank": latent.q_rank,
            "kv_lora_rank": latent.kv_rank,
            "qk_nope_head_dim": latent.nope,
            "qk_rope_head_dim": latent.rope,
            "v_head_dim": latent.value,
            "norm_topk_prob": moe.router.normalize,
            "attention_bias": a.qkv_bias,
        }),
    );
    match value {
        Value::Object(map) => Ok((map, moe.clone())),
        _ => Err("no object".into()),
    }
}

pub(super) fn write_v2(spec: &ModelSpec) -> std::result::Result<Value, String> {
    let (map, moe) = write(spec, true)?;
    let r = &moe.router;
    if r.kind != "topk_pre" || r.normalize {
        return Err(format!("router.kind = {}, normalised: {}", r.kind, r.normalize));
    }
    if moe.shared_intermediate == 0 {
        return Err("no shared experts".into());
    }
    let method = if r.groups > 1 { "group_limited_greedy" } else { "greedy" };
    Ok(with(
        map,
        json!({ "topk_method": method, "n_group": r.groups, "topk_group": r.top_groups, "mlp_bias": moe.shared_bias }),
    ))
}

pub(super) fn write_v3(spec: &ModelSpec) -> std::result::Result<Value, String> {
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
    Ok(with(map, json!({ "n_group": r.groups, "topk_group": r.top_groups, "rope_interleave": neighbours })))
}
