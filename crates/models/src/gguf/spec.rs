//! From the metadata of a GGUF file to a [`ModelSpec`].

use super::arch::{RopeOrder, Scores, Shared, Special};
use super::metadata::Keys;
use super::rope;
use crate::error::{ModelError, Result};
use crate::rope::yarn_mscale;
use crate::spec::{
    AttentionSpec, FfnSpec, LatentSpec, MAX_LAYERS, MlpSpec, ModelSpec, MoeSpec, NormKind, QkNorm, Scales,
    SpecialTokens,
};
use senmon_kernels::activation::Activation;
use senmon_moe::RouterConfig;
use senmon_moe::config::GroupMask;

/// What is known of the tensors of a file.
pub(super) trait Tensors {
    /// The shape of a tensor, if it is there.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// The numbers of a tensor, if it is there.
    fn values(&self, name: &str) -> Result<Option<Vec<f64>>>;
}

/// Greatest number of heads whose matrices are listed one by one.
const MAX_HEADS: usize = 1 << 12;
/// Texts that end a turn of a conversation, where a file does not say which token does.
const ENDS: [&str; 10] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "[e~[",
];

/// The model of a file. With `turned`, where the architecture has the rows of queries and keys in another order than the
/// family, they stay so, and neighbours turn together: the same model, run without a copy.
pub(super) fn read(keys: &Keys, tensors: &dyn Tensors, turned: bool) -> Result<ModelSpec> {
    let arch = keys.arch;
    let has = |name: &str| tensors.shape(name).is_some();
    let (hidden, heads) = (keys.need("embedding_length")?, keys.need("attention.head_count")?);
    let blocks = keys.need("block_count")?;
    let further = keys.size("nextn_predict_layers")?.unwrap_or(0);
    let layers = blocks.checked_sub(further).filter(|layers| (1..=MAX_LAYERS).contains(layers));
    let layers = layers.ok_or_else(|| {
        keys.error(format!("key {}: {blocks} is not from 1 to {MAX_LAYERS}", keys.name("block_count")))
    })?;
    let table = tensors.shape("token_embd.weight").unwrap_or_default();
    let &[vocab, _] = table.as_slice() else {
        return Err(keys.error("tensor token_embd.weight: is missing, or no matrix"));
    };
    let context = keys.need("context_length")?;
    let mut attention = match arch.special {
        Special::Latent => latent(keys, tensors, heads, context)?,
        _ => of_heads(keys, tensors, hidden, heads, context, layers)?,
    };
    (attention.qkv_bias, attention.out_bias) = (has("blk.0.attn_q.bias"), has("blk.0.attn_output.bias"));
    attention.rope.neighbours |= turned && arch.rope == RopeOrder::Turned;
    attention.rope_theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    attention.scale = attention.scale.or(keys.number("attention.scale")?.filter(|scale| *scale != 0.0));
    let eps = "attention.layer_norm_rms_epsilon";
    let norm_eps = keys.number(eps)?.or(keys.number("attention.layer_norm_epsilon")?);
    let mut spec = ModelSpec::plain(vocab, hidden, attention, Vec::new());
    spec.max_positions = context;
    spec.norm_eps = norm_eps.ok_or_else(|| keys.error(format!("key {}: is missing", keys.name(eps))))?;
    spec.norm = if arch.special == Special::Phi { NormKind::Layer } else { NormKind::Rms };
    (spec.tie_embeddings, spec.head_bias) = (!has("output.weight"), has("output.bias"));
    let logits = keys.number("logit_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0);
    spec.scales = Scales {
        embedding: keys.number("embedding_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0),
        residual: keys.number("residual_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0),
        logits: 1.0 / logits,
    };
    spec.tokens = tokens(keys)?;
    spec.layers = feed_forwards(keys, tensors, layers)?;
    spec.validate().map_err(|e| match e {
        ModelError::Spec { field, value, expected } => keys.error(format!("{field} = {value}: {expected}")),
        other => keys.error(other.to_string()),
    })?;
    Ok(spec)
}

/// Attention with keys and values of each head.
fn of_heads(
    keys: &Keys,
    tensors: &dyn Tensors,
    hidden: usize,
    heads: usize,
    context: usize,
    layers: usize,
) -> Result<AttentionSpec> {
    let has = |name: &str| tensors.shape(name).is_some();
    let kv_heads = keys.size("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = match keys.size("attention.key_length")? {
        Some(width) => width,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let what = format!(
                "key {}: {heads} does not divide {hidden}, and attention.key_length is missing",
                keys.name("attention.head_count")
            );
            return Err(keys.error(what));
        }
    };
    if let Some(width) = keys.size("attention.value_length")?.filter(|width| *width != head_dim) {
        let name = keys.name("attention.value_length");
        return Err(keys.error(format!("key {name}: {width} is not the width of keys, {head_dim}")));
    }
    let (rope, _) = rope::read(keys, head_dim, context, &|name| tensors.values(name))?;
    let normed = has("blk.0.attn_q_norm.weight");
    let mut attention = AttentionSpec {
        qk_norm: if normed { keys.arch.qk_norm } else { QkNorm::None },
        rope,
        ..AttentionSpec::plain(heads, kv_heads, head_dim)
    };
    if keys.arch.special == Special::GptOss {
        let flags = keys.flags("attention.sliding_window_pattern", layers)?;
        let flags = flags.unwrap_or_else(|| (0..layers).map(|layer| layer % 2 == 0).collect());
        attention.sinks = true;
        attention.window = keys.size("attention.sliding_window")?.filter(|_| flags.contains(&true));
        attention.window_layers = attention.window.and(flags.contains(&false).then_some(flags));
    }
    // What phi3's architecture wrote for PhiMoE; llama.cpp does not look at it for the others.
    if keys.arch.special == Special::Phi {
        attention.window =
            keys.size("attention.sliding_window")?.filter(|window| *window > 0 && *window < context);
    }
    Ok(attention)
}

/// Attention of the latent kind.
fn latent(keys: &Keys, tensors: &dyn Tensors, heads: usize, context: usize) -> Result<AttentionSpec> {
    let (rope_dims, kv_rank) = (keys.need("rope.dimension_count")?, keys.need("attention.kv_lora_rank")?);
    let (Some(head_dim), Some(value)) =
        (keys.size("attention.key_length_mla")?, keys.size("attention.value_length_mla")?)
    else {
        return Err(keys.error(format!(
            "key {}: is missing: the file is of an old kind, convert the model again",
            keys.name("attention.key_length_mla")
        )));
    };
    if keys.number("attention.temperature_scale")?.is_some_and(|scale| scale != 0.0) {
        let name = keys.name("attention.temperature_scale");
        return Err(keys.error(format!("key {name}: scores that change with the position are not supported")));
    }
    // Each head is a tensor's part of its own: they must be there before they are listed.
    let stack = tensors.shape("blk.0.attn_v_b.weight").unwrap_or_default();
    if stack.first() != Some(&heads) || heads > MAX_HEADS {
        return Err(keys.error(format!(
            "tensor blk.0.attn_v_b.weight: has shape {stack:?}, expected one matrix for each of {heads} heads"
        )));
    }
    let nope = head_dim.checked_sub(rope_dims).filter(|nope| *nope > 0).ok_or_else(|| {
        let name = keys.name("attention.key_length_mla");
        keys.error(format!("key {name}: {head_dim} is not more than rope.dimension_count, {rope_dims}"))
    })?;
    let latent = LatentSpec {
        // Some files of models without it have the key, and it is 0.
        q_rank: keys.size("attention.q_lora_rank")?.filter(|rank| *rank > 0),
        kv_rank,
        nope,
        rope: rope_dims,
        value,
        // Whatever the other norms have.
        norm_eps: 1e-6,
    };
    let (rope, all_dim) = rope::read(keys, rope_dims, context, &|name| tensors.values(name))?;
    let scale = match (&rope.scaling, all_dim) {
        (crate::rope::RopeScaling::Yarn { factor, .. }, Some(all)) => {
            let mscale = yarn_mscale(*factor, all);
            Some(mscale * mscale / (head_dim as f64).sqrt())
        }
        _ => None,
    };
    Ok(AttentionSpec { rope, scale, latent: Some(latent), ..AttentionSpec::plain(heads, heads, head_dim) })
}

/// The feed-forward of each layer.
fn feed_forwards(keys: &Keys, tensors: &dyn Tensors, layers: usize) -> Result<Vec<FfnSpec>> {
    let arch = keys.arch;
    let has = |name: String| tensors.shape(&name).is_some();
    let experts = keys.size("expert_count")?.unwrap_or(0);
    let plain = || -> Result<MlpSpec> {
        Ok(MlpSpec { activation: Activation::Silu, ..MlpSpec::gated(keys.need("feed_forward_length")?) })
    };
    if experts == 0 || arch.special == Special::Dense {
        return Ok(vec![FfnSpec::Dense(plain()?); layers]);
    }
    let first = keys.size("leading_dense_block_count")?.unwrap_or(0);
    let step = keys.size("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let is_moe = |layer: usize| layer >= first && (layer + 1).is_multiple_of(step);
    let Some(sample) = (0..layers).find(|layer| is_moe(*layer)) else {
        return Ok(vec![FfnSpec::Dense(plain()?); layers]);
    };
    let moe = moe(keys, experts, &|tensor| has(format!("blk.{sample}.{tensor}")))?;
    (0..layers)
        .map(|layer| Ok(if is_moe(layer) { FfnSpec::Moe(moe.clone()) } else { FfnSpec::Dense(plain()?) }))
        .collect()
}

/// The MoE layers; `has` says what tensors the first of them has.
fn moe(keys: &Keys, experts: usize, has: &dyn Fn(&str) -> bool) -> Result<MoeSpec> {
    let arch = keys.arch;
    let width = match keys.size("expert_feed_forward_length")?.filter(|width| *width > 0) {
        Some(width) => width,
        None => keys.need("feed_forward_length")?,
    };
    let oss = arch.special == Special::GptOss;
    let expert = MlpSpec {
        activation: if oss { Activation::Clamped { alpha: 1.702, limit: 7.0 } } else { Activation::Silu },
        bias: has("ffn_down_exps.bias"),
        ..MlpSpec::gated(width)
    };
    let count = keys.size("expert_shared_count")?.unwrap_or(0);
    let shared = match arch.shared {
        Shared::None => 0,
        Shared::Count => count.saturating_mul(width),
        Shared::Width => match keys.size("expert_shared_feed_forward_length")? {
            Some(width) => width,
            None => count.saturating_mul(width),
        },
    };
    let said = keys.size("expert_gating_func")?.filter(|said| *said != 0);
    let scores = match (said, arch.scores) {
        (None, scores) => scores,
        // What is special of these is not a matter of the scores.
        (Some(1), scores @ (Scores::Picked | Scores::SparseMixer)) => scores,
        (Some(1), _) => Scores::Softmax,
        (Some(2), _) => Scores::Sigmoid,
        (Some(3), _) => Scores::Picked,
        (Some(other), _) => {
            let name = keys.name("expert_gating_func");
            return Err(keys.error(format!(
                "key {name}: {other} is not supported; 1 (softmax), 2 (sigmoid) and 3 (softmax of the picked) are"
            )));
        }
    };
    let bias = has("exp_probs_b.bias");
    let kind = match scores {
        Scores::Softmax if bias => "softmax_bias",
        Scores::Softmax => "topk_pre",
        Scores::Sigmoid => "sigmoid_bias",
        Scores::Picked => "topk_post",
        Scores::SparseMixer => "sparsemixer",
    };
    let of_v2 = arch.special == Special::Latent && kind == "topk_pre";
    let router = RouterConfig {
        kind: kind.into(),
        normalize: keys.find("expert_weights_norm")?.unwrap_or(arch.normalize || kind == "topk_post"),
        scale: keys.number("expert_weights_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0),
        groups: keys.size("expert_group_count")?.filter(|groups| *groups > 0).unwrap_or(1),
        top_groups: keys.size("expert_group_used_count")?.filter(|groups| *groups > 0).unwrap_or(1),
        group_mask: if of_v2 { GroupMask::Zero } else { GroupMask::Inf },
        ..RouterConfig::default()
    };
    Ok(MoeSpec {
        shared_intermediate: shared,
        shared_gate: has("ffn_gate_inp_shexp.weight"),
        shared_bias: has("ffn_down_shexp.bias"),
        router_bias: has("ffn_gate_inp.bias"),
        router,
        ..MoeSpec::plain(experts, keys.need("expert_used_count")?, expert)
    })
}

/// The tokens that mean something to programs.
fn tokens(keys: &Keys) -> Result<SpecialTokens> {
    let one = |name: &str| keys.find_any::<u32>(&format!("tokenizer.ggml.{name}_token_id"));
    let mut eos = Vec::new();
    // A turn of a conversation ends as a text does.
    for name in ["eos", "eot", "eom"] {
        eos.extend(one(name)?.filter(|id| !eos.contains(id)));
    }
    if one("eot")?.is_none() {
        eos.extend(ends(keys)?.into_iter().filter(|id| !eos.contains(id)).collect::<Vec<_>>());
    }
    Ok(SpecialTokens { bos: one("bos")?, eos, pad: one("padding")? })
}

/// Control tokens whose texts end a turn, as llama.cpp finds them.
fn ends(keys: &Keys) -> Result<Vec<u32>> {
    let tokens: &[String] = keys.find_any("tokenizer.ggml.tokens")?.unwrap_or_default();
    let kinds: Vec<i32> = keys.find_any("tokenizer.ggml.token_type")?.unwrap_or_default();
    let find = |text: &str| tokens.iter().position(|token| token == text);
    let is_control =
        |id: &usize| kinds.get(*id).is_some_and(|kind| *kind == super::tokenizer::kinds::CONTROL);
    // In gpt-oss's format "<|end|>" ends a message, and the answer goes on with the next.
    let harmony = find("<|return|>").is_some() && find("<|call|>").is_some();
    let texts = ENDS.into_iter().filter(|text| !(harmony && *text == "<|end|>"));
    let ids = texts.filter_map(find).filter(is_control);
    Ok(ids.map(|id| id as u32).collect())
}
