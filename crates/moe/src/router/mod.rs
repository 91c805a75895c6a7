//! The routing menu: how tokens choose experts. A kind is a file that implements [`Router`] and a row of [`KINDS`].
//!
//! A router gets logits \[T, E\] (f32 whatever the model's type) and returns a [`Choice`]: which experts, with what weights,
//! and the scores that the balancing losses look at. Maths of size \[T, E\] is stock candle ops, so gradients are candle's.

mod select;
mod sigmoid_bias;
mod softmax_bias;
mod sparsemixer;
mod topk;

use crate::config::RouterConfig;
use crate::error::{MoeError, Result};
use candle_core::Tensor;
pub use select::{allowed_groups, top_k};

/// What a router returns.
#[derive(Debug)]
pub struct Choice {
    /// Expert of each slot, by falling score: \[T, K\]; [`senmon_kernels::dispatch::EMPTY`] where there is none.
    pub experts: Vec<u32>,
    /// Weight of each slot: \[T, K\], with gradient.
    pub weights: Tensor,
    /// Scores that sum to 1 for each token, for the balancing losses: \[T, E\], with gradient.
    pub scores: Tensor,
    /// What an unbiased selection picks, where it may differ from `experts`: \[T, K\].
    pub unbiased: Option<Vec<u32>>,
}

/// What a router may look at besides the logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteInput<'a> {
    /// K.
    pub top_k: usize,
    /// Added to the scores for the selection only: \[E\].
    pub bias: Option<&'a [f32]>,
    /// The selection of an earlier pass, \[T, K\]: weights are computed for it, nothing is selected.
    pub forced: Option<&'a [u32]>,
}

/// A way of choosing.
pub trait Router: std::fmt::Debug + Send + Sync {
    /// Chooses experts for the tokens of `logits` \[T, E\].
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice>;
}

/// A row of the menu.
#[derive(Debug)]
pub struct Kind {
    /// The value of `router.kind`.
    pub name: &'static str,
    /// What it does, in a few words.
    pub about: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// Keeps a bias for the selection, moved by `balance.bias_rate`.
    pub selection_bias: bool,
    /// Makes the router for E experts, K per token.
    pub build: fn(&RouterConfig, usize, usize) -> Result<Box<dyn Router>>,
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    Kind {
        name: "topk_pre",
        about: "softmax, then top-k; weights divided by their sum when `normalize`",
        source: "Switch Transformer 2101.03961; Qwen2-MoE, Qwen3-MoE, OLMoE",
        selection_bias: false,
        build: topk::TopK::pre,
    },
    Kind {
        name: "topk_post",
        about: "top-k of the logits, then softmax over the picked",
        source: "Mixtral 2401.04088",
        selection_bias: false,
        build: topk::TopK::post,
    },
    Kind {
        name: "switch",
        about: "one expert a token, weighted by its probability",
        source: "Switch Transformer 2101.03961",
        selection_bias: false,
        build: topk::TopK::switch,
    },
    Kind {
        name: "sigmoid_bias",
        about: "top-k of sigmoid + bias, weighted by the sigmoid; the bias balances the load",
        source: "DeepSeek-V3 2412.19437; loss-free balancing 2408.15664",
        selection_bias: true,
        build: sigmoid_bias::SigmoidBias::build,
    },
    Kind {
        name: "softmax_bias",
        about: "top-k of softmax + bias, weighted by the softmax",
        source: "Ernie 4.5",
        selection_bias: true,
        build: softmax_bias::SoftmaxBias::build,
    },
    Kind {
        name: "sparsemixer",
        about: "two picks, each weighted by a softmax over the logits close to it",
        source: "Phi-3.5-MoE; SparseMixer 2310.00811, 2409.12136",
        selection_bias: false,
        build: sparsemixer::SparseMixer::build,
    },
];

/// The kind of that name.
pub fn kind(name: &str) -> Result<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name).ok_or_else(|| MoeError::UnknownKind {
        found: name.into(),
        known: KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", "),
    })
}

/// Checks what all kinds share, and makes the router.
pub fn build(config: &RouterConfig, experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
    let refuse = |what: String| Err(MoeError::Config { what });
    if top_k == 0 || top_k > experts {
        return refuse(format!(
            "top_k = {top_k} does not fit {experts} experts: it must be from 1 to {experts}"
        ));
    }
    let (groups, top) = (config.groups, config.top_groups);
    if groups == 0 || !experts.is_multiple_of(groups) {
        return refuse(format!("router.groups = {groups} does not divide {experts} experts"));
    }
    if top == 0 || top > groups {
        return refuse(format!("router.top_groups = {top} must be from 1 to router.groups = {groups}"));
    }
    if top * (experts / groups) < top_k {
        return refuse(format!(
            "router.top_groups = {top} groups hold {} experts, fewer than top_k = {top_k}",
            top * (experts / groups)
        ));
    }
    if !config.scale.is_finite() || !(0.0..1.0).contains(&config.jitter) {
        return refuse(format!(
            "router.scale = {} must be finite and router.jitter = {} in [0, 1)",
            config.scale, config.jitter
        ));
    }
    if !(config.least_sum > 0.0 && config.least_sum.is_finite()) {
        return refuse(format!("router.least_sum = {} must be above 0", config.least_sum));
    }
    if !(0.0..1.0).contains(&config.sparsemixer_eps) {
        return refuse(format!("router.sparsemixer_eps = {} must be in [0, 1)", config.sparsemixer_eps));
    }
    (kind(&config.kind)?.build)(config, experts, top_k)
}

/// The values of `scores` \[T, E\] at `experts` \[T, K\]: \[T, K\]; empty slots take expert 0's and are not dispatched.
fn gather(scores: &Tensor, experts: &[u32], top_k: usize) -> Result<Tensor> {
    let (tokens, count) = scores.dims2()?;
    let index: Vec<u32> = experts.iter().map(|&e| if (e as usize) < count { e } else { 0 }).collect();
    let index = Tensor::from_vec(index, (tokens, top_k), scores.device())?;
    Ok(scores.gather(&index, 1)?)
}
