//! `config.json` of T5 and Switch.

use crate::error::Result;
use crate::families::Json;
use crate::spec::{
    LIMIT, MAX_EXPERTS, MAX_EXPERTS_IN_ALL, MAX_LAYERS, MAX_PARAMETERS, MlpSpec, SpecialTokens,
};

/// An encoder-decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Seq2SeqSpec {
    /// V.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// D; heads · D may differ from H.
    pub head_dim: usize,
    /// Distances are sorted into this many buckets, each with a bias for each head.
    pub buckets: usize,
    /// Distances from here on share the last bucket.
    pub max_distance: usize,
    /// ε of every norm.
    pub norm_eps: f64,
    /// What an expert and a dense MLP are.
    pub mlp: MlpSpec,
    /// The layers of the encoder.
    pub encoder: StackSpec,
    /// The layers of the decoder.
    pub decoder: StackSpec,
    /// E.
    pub experts: usize,
    /// Tokens of a sequence that an expert takes.
    pub capacity: usize,
    /// The routers have biases.
    pub router_bias: bool,
    /// The head is a tensor of its own.
    pub own_head: bool,
    /// Encoder and decoder have embeddings of their own.
    pub own_tables: [bool; 2],
    /// The last layer's output is divided by sqrt(H) before the head.
    pub scale_output: bool,
    /// The token that a decoded text begins with.
    pub start: u32,
    /// The tokens that mean something to programs.
    pub tokens: SpecialTokens,
    /// `switch_transformers` rather than `t5`.
    pub switch: bool,
}

/// The layers of one of the two.
#[derive(Clone, Debug, PartialEq)]
pub struct StackSpec {
    /// Whether each is a layer of experts.
    pub sparse: Vec<bool>,
}

pub(super) fn read(json: &Json) -> Result<Seq2SeqSpec> {
    let switch = json.text("model_type")? == Some("switch_transformers");
    let size = |key: &str, default: usize| -> Result<usize> {
        match json.maybe_usize(key)?.unwrap_or(default) {
            size @ 1..=LIMIT => Ok(size),
            size => Err(json.error(format!("{key} = {size} is not from 1 to {LIMIT}"))),
        }
    };
    let layers = size("num_layers", if switch { 12 } else { 6 })?;
    let decoder_layers = size("num_decoder_layers", layers)?;
    for (key, layers) in [("num_layers", layers), ("num_decoder_layers", decoder_layers)] {
        if layers > MAX_LAYERS {
            return Err(json.error(format!("{key} = {layers} is not from 1 to {MAX_LAYERS}")));
        }
    }
    let (act, gated) = match switch {
        true => (json.text("dense_act_fn")?.unwrap_or("relu").to_owned(), false),
        false => {
            let name = json.text("feed_forward_proj")?.unwrap_or("relu");
            let last = name.rsplit('-').next().unwrap_or(name);
            let act = if name == "gated-gelu" { "gelu_new" } else { last };
            // What the file says of either goes before the name of both.
            let act = json.text("dense_act_fn")?.unwrap_or(act);
            (act.to_owned(), json.bool_or("is_gated_act", name.starts_with("gated-"))?)
        }
    };
    let activation = crate::families::activation_named(&act)
        .ok_or_else(|| json.error(format!("the activation \"{act}\" is not known")))?;
    let stack = |layers: usize, name: &str| -> Result<StackSpec> {
        let sparse = json.maybe_usize(&format!("num_sparse_{name}_layers"))?.unwrap_or(3);
        let step = json.maybe_usize(&format!("{name}_sparse_step"))?;
        let step = step.unwrap_or_else(|| layers.checked_div(sparse).unwrap_or(layers));
        let is_sparse = |l: usize| switch && step > 0 && (step == 1 || l % step == 1);
        Ok(StackSpec { sparse: (0..layers).map(is_sparse).collect() })
    };
    let experts = if switch { size("num_experts", 8)? } else { 0 };
    if experts > MAX_EXPERTS {
        return Err(json.error(format!("num_experts = {experts} is not from 1 to {MAX_EXPERTS}")));
    }
    let (encoder, decoder) = (stack(layers, "encoder")?, stack(decoder_layers, "decoder")?);
    let sparse = encoder.sparse.iter().chain(&decoder.sparse).filter(|sparse| **sparse).count();
    if sparse * experts > MAX_EXPERTS_IN_ALL {
        let expected = format!("{sparse} layers have more than {MAX_EXPERTS_IN_ALL} together");
        return Err(json.error(format!("num_experts = {experts}: {expected}")));
    }
    json.expect_text("router_dtype", &["float32"])?;
    let tied = json.bool_or("tie_word_embeddings", true)?;
    let scaled = if switch { tied } else { json.bool_or("scale_decoder_outputs", tied)? };
    let pad = json.tokens("pad_token_id")?.first().copied();
    let start = json.tokens("decoder_start_token_id")?.first().copied().or(pad).unwrap_or(0);
    let norm_eps = json.f64_or("layer_norm_epsilon", 1e-6)?;
    if !(norm_eps.is_finite() && norm_eps >= 0.0) {
        return Err(json.error(format!("layer_norm_epsilon = {norm_eps} must be 0 or more")));
    }
    let buckets = size("relative_attention_num_buckets", 32)?;
    if buckets < 4 || !buckets.is_multiple_of(4) {
        return Err(json.error(format!("relative_attention_num_buckets = {buckets} must be a multiple of 4")));
    }
    let max_distance = size("relative_attention_max_distance", 128)?;
    if max_distance <= buckets / 2 {
        return Err(json.error(format!(
            "relative_attention_max_distance = {max_distance} must be above half the buckets, {}",
            buckets / 2
        )));
    }
    let mlp = MlpSpec { intermediate: size("d_ff", json.usize("d_ff")?)?, activation, gated, bias: false };
    let spec = Seq2SeqSpec {
        vocab: size("vocab_size", 32_128)?,
        hidden: size("d_model", if switch { 768 } else { 512 })?,
        heads: size("num_heads", if switch { 12 } else { 8 })?,
        head_dim: size("d_kv", 64)?,
        buckets,
        max_distance,
        norm_eps,
        mlp,
        encoder,
        decoder,
        experts,
        capacity: if switch { size("expert_capacity", 64)? } else { 0 },
        router_bias: switch && json.bool_or("router_bias", false)?,
        own_head: !tied,
        own_tables: [false; 2],
        scale_output: scaled,
        start,
        tokens: SpecialTokens { bos: None, eos: json.tokens("eos_token_id")?, pad },
        switch,
    };
    if spec.most_parameters() > MAX_PARAMETERS {
        return Err(json.error(format!("describes a model of more than {MAX_PARAMETERS} parameters")));
    }
    Ok(spec)
}

impl Seq2SeqSpec {
    /// No fewer parameters than the matrices have; no factor is large enough for an overflow.
    fn most_parameters(&self) -> u128 {
        let wide = |n: usize| n as u128 * self.hidden as u128;
        let attention = 8 * wide(self.heads) * self.head_dim as u128 + (self.buckets * self.heads) as u128;
        let ffn =
            |sparse: &bool| if *sparse { self.experts as u128 } else { 1 } * 3 * wide(self.mlp.intermediate);
        let layers = self.encoder.sparse.iter().chain(&self.decoder.sparse);
        layers.map(|sparse| attention + ffn(sparse)).sum::<u128>() + 4 * wide(self.vocab)
    }
}
