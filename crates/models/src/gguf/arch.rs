//! The architectures of GGUF: what one fixes that its metadata do not say. The names and meanings are llama.cpp's.

use crate::error::{ModelError, Result};
use crate::spec::QkNorm;

/// An architecture (`general.architecture`).
#[derive(Debug)]
pub struct Arch {
    /// Its name.
    pub name: &'static str,
    /// The Hugging Face families whose models it holds; a model is read as one of the first.
    pub families: &'static [&'static str],
    /// What turns together in a head.
    pub rope: RopeOrder,
    /// Norms of queries and keys, in a layer that has them.
    pub qk_norm: QkNorm,
    /// How logits become scores, where the file does not say.
    pub scores: Scores,
    /// Weights of the picked experts are divided by their sum, where the file does not say.
    pub normalize: bool,
    /// llama.cpp looks for what the file says of scores, weights and groups, and it is written. What another file says is read, and
    /// llama.cpp would take it as above.
    pub says_router: bool,
    /// The shared experts.
    pub shared: Shared,
    /// The norm before the feed-forward.
    pub ffn_norm: &'static str,
    /// llama.cpp wants a head of its own, tied or not.
    pub own_head: bool,
    /// What llama.cpp wants besides.
    pub wants: Wants,
    /// What else is special.
    pub special: Special,
}

/// What turns together in a head of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeOrder {
    /// i and i + half.
    Halves,
    /// 2i and 2i + 1.
    Neighbours,
    /// i and i + half in the family, and 2i and 2i + 1 in the file: its rows of queries and keys are in another order.
    Turned,
}

/// How a router's logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Softmax over all experts; with a bias for the selection, where the file has one.
    Softmax,
    /// Sigmoid, with a bias for the selection.
    Sigmoid,
    /// Softmax over the picked experts.
    Picked,
    /// SparseMixer's two picks.
    SparseMixer,
}

/// Where the width of the shared experts is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// There are none.
    None,
    /// In a key of its own; without it, there are none.
    Width,
    /// Their number is in a key, each as wide as an expert.
    Count,
}

/// What llama.cpp wants of an architecture, whatever the metadata say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wants {
    /// Heads are as wide together as the residual stream.
    pub hidden_width: bool,
    /// As many key-value heads as heads.
    pub all_heads: bool,
    /// A bias on the output: there is one, or there is none; `None`: as the model has it.
    pub out_bias: Option<bool>,
    /// A bias on the head of the model.
    pub head_bias: bool,
    /// Experts in every layer.
    pub all_moe: bool,
    /// Shared experts.
    pub shared: bool,
    /// It takes a factor on the scores of attention.
    pub scale: bool,
}

/// No bias on the output, and nothing else.
const FREE: Wants = Wants {
    hidden_width: false,
    all_heads: false,
    out_bias: Some(false),
    head_bias: false,
    all_moe: false,
    shared: false,
    scale: false,
};

/// What few architectures have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Nothing.
    None,
    /// No experts.
    Dense,
    /// gpt-oss: sinks, a window in every other layer, clamped gates.
    GptOss,
    /// Latent attention.
    Latent,
    /// LayerNorm, LongRoPE.
    Phi,
    /// Factors on what flows between the parts.
    Granite,
    /// MoE layers at an interval.
    Ernie,
}

const PLAIN: Arch = Arch {
    name: "",
    families: &[],
    rope: RopeOrder::Halves,
    qk_norm: QkNorm::None,
    scores: Scores::Softmax,
    normalize: true,
    says_router: false,
    shared: Shared::None,
    ffn_norm: "ffn_norm",
    own_head: false,
    wants: FREE,
    special: Special::None,
};

/// The architectures that are read and written.
pub const ARCHS: &[Arch] = &[
    Arch {
        name: "llama",
        families: &["mixtral", "llama", "mistral"],
        rope: RopeOrder::Turned,
        wants: Wants { out_bias: None, scale: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "olmoe",
        families: &["olmoe"],
        qk_norm: QkNorm::Full,
        normalize: false,
        own_head: true,
        wants: Wants { hidden_width: true, all_heads: true, all_moe: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "qwen2moe",
        families: &["qwen2_moe"],
        normalize: false,
        shared: Shared::Width,
        own_head: true,
        wants: Wants { hidden_width: true, all_moe: true, shared: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "qwen3moe",
        families: &["qwen3_moe"],
        qk_norm: QkNorm::Head,
        wants: Wants { all_moe: true, ..FREE },
        ..PLAIN
    },
    Arch { name: "qwen3", families: &["qwen3"], qk_norm: QkNorm::Head, special: Special::Dense, ..PLAIN },
    Arch {
        name: "deepseek2",
        families: &["deepseek_v3", "deepseek_v2"],
        rope: RopeOrder::Neighbours,
        normalize: false,
        says_router: true,
        shared: Shared::Count,
        special: Special::Latent,
        ..PLAIN
    },
    Arch {
        name: "gpt-oss",
        families: &["gpt_oss"],
        scores: Scores::Picked,
        ffn_norm: "post_attention_norm",
        own_head: true,
        special: Special::GptOss,
        wants: Wants { out_bias: Some(true), ..FREE },
        ..PLAIN
    },
    Arch {
        name: "granitemoe",
        families: &["granitemoe", "granitemoeshared"],
        rope: RopeOrder::Turned,
        scores: Scores::Picked,
        shared: Shared::Width,
        special: Special::Granite,
        wants: Wants { out_bias: None, scale: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "phimoe",
        families: &["phimoe"],
        scores: Scores::SparseMixer,
        own_head: true,
        special: Special::Phi,
        wants: Wants { hidden_width: true, out_bias: Some(true), head_bias: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "glm4moe",
        families: &["glm4_moe"],
        qk_norm: QkNorm::Head,
        scores: Scores::Sigmoid,
        normalize: false,
        says_router: true,
        shared: Shared::Count,
        ffn_norm: "post_attention_norm",
        ..PLAIN
    },
    Arch {
        name: "dots1",
        families: &["dots1"],
        qk_norm: QkNorm::Head,
        scores: Scores::Sigmoid,
        normalize: false,
        says_router: true,
        shared: Shared::Count,
        own_head: true,
        wants: Wants { all_heads: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "ernie4_5-moe",
        families: &["ernie4_5_moe"],
        rope: RopeOrder::Neighbours,
        shared: Shared::Width,
        special: Special::Ernie,
        wants: Wants { out_bias: None, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "hunyuan-moe",
        families: &["hunyuan_v1_moe"],
        qk_norm: QkNorm::HeadAfter,
        shared: Shared::Width,
        wants: Wants { all_moe: true, shared: true, ..FREE },
        ..PLAIN
    },
    Arch {
        name: "minimax-m2",
        families: &["minimax_m2"],
        qk_norm: QkNorm::Full,
        scores: Scores::Sigmoid,
        own_head: true,
        wants: Wants { all_moe: true, ..FREE },
        ..PLAIN
    },
];

/// The architecture of that name; the error names the nearest ones.
pub fn arch(name: &str) -> Result<&'static Arch> {
    ARCHS.iter().find(|arch| arch.name == name).ok_or_else(|| {
        let near = crate::families::nearest(name, ARCHS.iter().map(|arch| arch.name));
        ModelError::Option {
            what: format!("architecture \"{name}\" of GGUF is not known; the nearest are {near}"),
        }
    })
}
