//! The table of kinds.

use super::*;

/// A row of the menu.
#[derive(Debug)]
pub struct Kind {
    /// The value of `router.kind`.
    pub name: &'static str,
    /// What it does, in a few words.
    pub about: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// Keeps a bias for the selection, moved by `balance.bias_rate` or `balance.quantile`.
    pub selection_bias: bool,
    /// What makes it look at later tokens, where it does.
    pub noncausal: Option<&'static str>,
    /// Which tokens there are decides, not only what they look like: a table \[V, K\] belongs to it.
    pub by_token_id: bool,
    /// `router.groups` and `top_groups` mean something to it.
    pub groups: bool,
    /// Its weights are, or may be, divided by their sum over what was picked: `router.normalize_after_drop` means something to it.
    pub normalizes: bool,
    /// A token may have another number of slots than K.
    pub ragged: bool,
    /// What its experts take is `router.capacity`, in evaluation too, and nothing is dropped beyond.
    pub own_capacity: bool,
    /// It keeps the load even, or needs none of it kept even: an auxiliary loss works against it.
    pub even: bool,
    /// Makes the router for E experts, K per token.
    pub build: fn(&RouterConfig, usize, usize) -> Result<Box<dyn Router>>,
}

const PLAIN: Kind = Kind {
    name: "",
    about: "",
    source: "",
    selection_bias: false,
    noncausal: None,
    by_token_id: false,
    groups: false,
    normalizes: false,
    ragged: false,
    own_capacity: false,
    even: false,
    build: topk::TopK::pre,
};

/// All kinds.
pub const KINDS: &[Kind] = &[
    Kind {
        name: "topk_pre",
        about: "softmax, then top-k; weights divided by their sum when `normalize`",
        source: "Switch Transformer 2101.03961; Qwen2-MoE, Qwen3-MoE, OLMoE",
        groups: true,
        normalizes: true,
        build: topk::TopK::pre,
        ..PLAIN
    },
    Kind {
        name: "topk_post",
        about: "top-k of the logits, then softmax over the picked",
        source: "Mixtral 2401.04088",
        groups: true,
        normalizes: true,
        build: topk::TopK::post,
        ..PLAIN
    },
    Kind {
        name: "switch",
        about: "one expert a token, weighted by its probability",
        source: "Switch Transformer 2101.03961",
        groups: true,
        build: topk::TopK::switch,
        ..PLAIN
    },
    Kind {
        name: "sigmoid_bias",
        about: "top-k of sigmoid + bias, weighted by the sigmoid; the bias balances the load",
        source: "DeepSeek-V3 2412.19437; loss-free balancing 2408.15664",
        selection_bias: true,
        groups: true,
        normalizes: true,
        build: scored::Scored::sigmoid,
        ..PLAIN
    },
    Kind {
        name: "softmax_bias",
        about: "top-k of softmax + bias, weighted by the softmax",
        source: "Ernie 4.5",
        selection_bias: true,
        groups: true,
        normalizes: true,
        build: scored::Scored::softmax,
        ..PLAIN
    },
    Kind {
        name: "sqrt_softplus",
        about: "top-k of sqrt(softplus) + bias, weighted by it",
        source: "DeepSeek-V4",
        selection_bias: true,
        groups: true,
        normalizes: true,
        build: scored::Scored::sqrt_softplus,
        ..PLAIN
    },
    Kind {
        name: "sigmoid_input",
        about: "top-k of the logits; their sigmoids multiply what goes into the experts",
        source: "Llama 4",
        groups: true,
        build: topk::TopK::sigmoid_input,
        ..PLAIN
    },
    Kind {
        name: "sparsemixer",
        about: "two picks, each weighted by a softmax over the logits close to it; in training drawn, with a gradient for the draw",
        source: "Phi-3.5-MoE; SparseMixer 2310.00811, 2409.12136",
        build: sparsemixer::SparseMixer::build,
        ..PLAIN
    },
    Kind {
        name: "noisy_topk",
        about: "in training, noise on the logits, of a learned or a fixed deviation; then as `topk_post`",
        source: "Shazeer et al. 1701.06538; V-MoE 2106.05974",
        groups: true,
        normalizes: true,
        build: noisy::Noisy::build,
        ..PLAIN
    },
    Kind {
        name: "gshard",
        about: "the first of the softmax and, in training by chance, a second",
        source: "GShard 2006.16668; Mesh TensorFlow; DeepSpeed",
        normalizes: true,
        build: gshard::GShard::build,
        ..PLAIN
    },
    Kind {
        name: "dense",
        about: "every expert, weighted by the softmax",
        source: "Jacobs et al. 1991; Jordan & Jacobs 1994",
        ragged: true,
        even: true,
        build: dense::Dense::build,
        ..PLAIN
    },
    Kind {
        name: "top_p",
        about: "the fewest experts whose probabilities sum to `p`, K at most",
        source: "Huang et al., ACL 2024 (2403.07652)",
        normalizes: true,
        ragged: true,
        build: top_p::TopP::build,
        ..PLAIN
    },
    Kind {
        name: "relu",
        about: "every expert whose logit is above 0, weighted by it; a loss leads to K a token",
        source: "ReMoE 2412.14711",
        ragged: true,
        even: true,
        build: relu::Relu::build,
        ..PLAIN
    },
    Kind {
        name: "hierarchical",
        about: "a softmax over groups, then one within each group that was picked",
        source: "Shazeer et al. 1701.06538; Mesh TensorFlow",
        groups: true,
        normalizes: true,
        build: hierarchical::Hierarchical::build,
        ..PLAIN
    },
    Kind {
        name: "hash",
        about: "a fixed table from token ids to experts",
        source: "Hash Layers 2106.04426",
        by_token_id: true,
        normalizes: true,
        even: true,
        build: hash::Hash::build,
        ..PLAIN
    },
    Kind {
        name: "random",
        about: "experts drawn at random in training, their mean afterwards",
        source: "THOR 2110.04260",
        ragged: true,
        even: true,
        build: random::Random::build,
        ..PLAIN
    },
    Kind {
        name: "base",
        about: "in training, as many tokens for each expert, by the best assignment; weight sigmoid; then the greatest",
        source: "BASE Layers 2103.16716",
        even: true,
        build: base::Base::build,
        ..PLAIN
    },
    Kind {
        name: "sinkhorn",
        about: "in training, top-k of the logits evened out by Sinkhorn's iteration; then top-k",
        source: "Clark et al. 2202.01169; Megatron-Core",
        groups: true,
        even: true,
        build: sinkhorn::Sinkhorn::build,
        ..PLAIN
    },
    Kind {
        name: "expert_choice",
        about: "each expert takes the tokens that want it most",
        source: "Zhou et al. 2202.09368",
        noncausal: Some("an expert takes a token or not by what other tokens there are, later ones too"),
        ragged: true,
        own_capacity: true,
        even: true,
        build: expert_choice::ExpertChoice::build,
        ..PLAIN
    },
    Kind {
        name: "soft",
        about: "experts work on weighted means of all tokens",
        source: "Soft MoE 2308.00951",
        noncausal: Some("every slot is a mean of all tokens, later ones too"),
        own_capacity: true,
        even: true,
        build: soft::Soft::build,
        ..PLAIN
    },
    Kind {
        name: "depth",
        about: "one expert that takes some tokens; the others pass it by",
        source: "Mixture of Depths 2404.02258",
        noncausal: Some("which tokens are taken depends on later ones, unless router.predictor = true"),
        own_capacity: true,
        even: true,
        build: depth::Depth::build,
        ..PLAIN
    },
];

/// The kind of that name.
pub fn kind(name: &str) -> Result<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name).ok_or_else(|| MoeError::UnknownKind {
        found: name.into(),
        known: KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", "),
    })
}

/// Logits that a router of `experts` (the special ones too) looks at for each token: the rows of its matrix.
pub fn columns(config: &RouterConfig, experts: usize) -> usize {
    match config.kind.as_str() {
        "hierarchical" => config.groups.saturating_add(experts),
        "soft" => experts.saturating_mul(config.slots.max(1)),
        _ => experts,
    }
}

/// Experts that a token meets in the mean, of `experts` with `top_k` asked for: what its cost goes by.
pub fn width(config: &RouterConfig, experts: usize, top_k: usize) -> f64 {
    let or = |default: f64| if config.capacity == 0.0 { default } else { config.capacity };
    let width = match config.kind.as_str() {
        "dense" => experts as f64,
        "depth" => or(0.125),
        // As many slots as tokens, which is the default.
        "soft" => 1.0,
        "expert_choice" => top_k as f64 * or(1.0),
        _ => top_k as f64,
    };
    width.min(experts as f64)
}
