//! The routing menu: how tokens choose experts. A kind is a file that implements [`Router`] and a row of [`KINDS`].
//!
//! A router gets logits \[T, E\] (f32 whatever the model's type) and returns a [`Choice`]: which experts, with what weights,
//! and the scores that the balancing losses look at. Maths of size \[T, E\] is stock candle ops, so gradients are candle's.

mod base;
mod dense;
mod depth;
mod expert_choice;
mod gshard;
mod hash;
mod hierarchical;
mod kinds;
mod noisy;
mod random;
mod relu;
mod scored;
mod select;
mod sinkhorn;
mod soft;
mod sparsemixer;
mod top_p;
mod topk;

use crate::config::RouterConfig;
use crate::error::{MoeError, Result};
use crate::rng::Draws;
use candle_core::{D, Tensor};
pub use hash::balanced_table;
pub use kinds::{KINDS, Kind, columns, kind, width};
pub(crate) use scored::softplus;
pub use select::{allowed_groups, top_k};
use senmon_kernels::dispatch::EMPTY;
pub(crate) use soft::{mix, slots as soft_slots};

/// What a router returns.
#[derive(Debug)]
pub struct Choice {
    /// Slots of a token: K, or as many as some token needs.
    pub slots: usize,
    /// Expert of each slot: \[T, slots\]; [`senmon_kernels::dispatch::EMPTY`] where there is none.
    pub experts: Vec<u32>,
    /// Weight of each slot: \[T, slots\], with gradient; 0 where there is no expert.
    pub weights: Tensor,
    /// Scores that sum to 1 for each token, for the balancing losses: \[T, E\], with gradient.
    pub scores: Tensor,
    /// What the bias was added to for the selection, by the kinds that have one: \[T, E\].
    pub selection: Option<Tensor>,
    /// What an unbiased selection picks, where it may differ from `experts`: \[T, slots\].
    pub unbiased: Option<Vec<u32>>,
    /// The weight is for the expert's input; its output has weight 1.
    pub weighs_input: bool,
    /// What the kind itself adds to what is minimised.
    pub terms: Vec<Term>,
    /// Gates of all experts, where a loss goes by how open they are: \[T, E\], with gradient.
    pub gates: Option<Tensor>,
    /// The chance that each expert is among the picked of fresh noise, summed over tokens: \[E\], with gradient.
    pub smooth_load: Option<Tensor>,
}

impl Choice {
    /// K experts a token, with weights for their outputs and nothing else.
    fn new(experts: Vec<u32>, weights: Tensor, scores: Tensor) -> Result<Self> {
        let slots = weights.dim(1)?;
        Ok(Self {
            slots,
            experts,
            weights,
            scores,
            selection: None,
            unbiased: None,
            weighs_input: false,
            terms: Vec::new(),
            gates: None,
            smooth_load: None,
        })
    }
}

/// Something that a kind adds to what is minimised.
#[derive(Clone, Debug)]
pub struct Term {
    /// Its name in the log.
    pub name: &'static str,
    /// Its value by token, \[T\], with gradient: the mean over tokens that count is the term.
    pub per_token: Tensor,
}

/// What a router may look at besides the logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteInput<'a> {
    /// K.
    pub top_k: usize,
    /// Added to the scores for the selection only: \[E\].
    pub bias: Option<&'a [f32]>,
    /// The selection of an earlier pass, \[T, slots\]: weights are computed for it, nothing is selected.
    pub forced: Option<&'a [u32]>,
    /// Training: noise is on.
    pub train: bool,
    /// Random numbers.
    pub draws: Draws<'a>,
    /// The deviation of the noise on each logit, \[T, E\], where it is learned.
    pub noise_std: Option<&'a Tensor>,
    /// Which tokens they are: \[T\].
    pub token_ids: Option<&'a [u32]>,
    /// The experts of each token id, \[V, K\], of `hash`.
    pub table: Option<&'a [f32]>,
    /// Tokens that count: \[T\].
    pub mask: Option<&'a [bool]>,
    /// Tokens that are routed together, by the kinds that look at more than one; 0 for all.
    pub together: usize,
    /// What a predictor makes of each token, \[T, 1\], of `depth`.
    pub predicted: Option<&'a Tensor>,
}

impl RouteInput<'_> {
    /// Whether a token counts.
    fn counts(&self, token: usize) -> bool {
        self.mask.is_none_or(|mask| mask[token])
    }

    /// The tokens of `count` that are routed together, one range after another.
    fn groups(&self, count: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let size = if self.together == 0 { count.max(1) } else { self.together };
        (0..count).step_by(size).map(move |start| start..(start + size).min(count))
    }
}

/// A way of choosing.
pub trait Router: std::fmt::Debug + Send + Sync {
    /// Chooses experts for the tokens of `logits` \[T, [`columns`]\].
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice>;
}

/// Checks what all kinds share, and makes the router for `experts` (the special ones too), `top_k` for each token.
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
    let kind = kind(&config.kind)?;
    if groups > 1 && !kind.groups {
        let grouped: Vec<_> = KINDS.iter().filter(|kind| kind.groups).map(|kind| kind.name).collect();
        return refuse(format!(
            "router.groups = {groups} has no meaning for router.kind = \"{}\"; it has for {}",
            kind.name,
            grouped.join(", ")
        ));
    }
    let unscaled = ["sparsemixer", "soft"].contains(&config.kind.as_str());
    if unscaled && config.scale != 1.0 || config.kind == "soft" && config.jitter != 0.0 {
        return refuse(format!(
            "router.scale = {} and router.jitter = {} have no meaning for router.kind = \"{}\"",
            config.scale, config.jitter, config.kind
        ));
    }
    if !config.scale.is_finite() || !(0.0..1.0).contains(&config.jitter) {
        return refuse(format!(
            "router.scale = {} must be finite and router.jitter = {} in [0, 1)",
            config.scale, config.jitter
        ));
    }
    let at_least_0 = [
        ("noise_std", config.noise_std),
        ("capacity", config.capacity),
        ("eval_capacity", config.eval_capacity),
    ];
    for (key, value) in at_least_0 {
        if !(value >= 0.0 && value.is_finite()) {
            return refuse(format!("router.{key} = {value} must be 0 or more"));
        }
    }
    let above_0 = [("least_sum", config.least_sum), ("second_threshold", config.second_threshold)];
    for (key, value) in above_0 {
        if !(value > 0.0 && value.is_finite()) {
            return refuse(format!("router.{key} = {value} must be above 0"));
        }
    }
    let below_1 = [
        ("sparsemixer_eps", config.sparsemixer_eps),
        ("target_sparsity", config.target_sparsity),
        ("expert_dropout", config.expert_dropout),
    ];
    for (key, value) in below_1 {
        if !(0.0..1.0).contains(&value) {
            return refuse(format!("router.{key} = {value} must be in [0, 1)"));
        }
    }
    if !(config.p > 0.0 && config.p <= 1.0) {
        return refuse(format!("router.p = {} must be above 0 and at most 1", config.p));
    }
    (kind.build)(config, experts, top_k)
}

/// Refuses another K than `wanted`.
fn only(kind: &str, does: &str, wanted: usize, top_k: usize) -> Result<()> {
    if top_k == wanted {
        return Ok(());
    }
    Err(MoeError::Config { what: format!("router.kind = \"{kind}\" {does}, and experts.top_k = {top_k}") })
}

/// The values of `scores` \[T, E\] at `experts` \[T, slots\]: \[T, slots\]; 0 in empty slots.
pub(crate) fn gather(scores: &Tensor, experts: &[u32], slots: usize) -> Result<Tensor> {
    let (tokens, count) = scores.dims2()?;
    let is_real = |e: u32| (e as usize) < count;
    let index: Vec<u32> = experts.iter().map(|&e| if is_real(e) { e } else { 0 }).collect();
    let index = Tensor::from_vec(index, (tokens, slots), scores.device())?;
    let values = scores.gather(&index, 1)?;
    if experts.iter().all(|&e| is_real(e)) {
        return Ok(values);
    }
    // Not a product with 0: the value may be infinite.
    let real: Vec<u8> = experts.iter().map(|&e| u8::from(is_real(e))).collect();
    let real = Tensor::from_vec(real, (tokens, slots), scores.device())?;
    Ok(real.where_cond(&values, &values.zeros_like()?)?)
}

/// What a sum is divided by at least: its square, which gradients are divided by, is still a number.
const TINY: f32 = 1e-9;

/// Divides each row by its sum, or by `least` where the sum is less.
fn normalized(weights: Tensor, least: f32) -> Result<Tensor> {
    let sum = weights.sum_keepdim(D::Minus1)?;
    Ok(weights.broadcast_div(&if least > 0.0 { sum.maximum(least)? } else { sum })?)
}

/// Times `scale`.
fn scaled(weights: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(weights) } else { Ok((weights * scale)?) }
}

/// Rows of different lengths as one block of `slots` columns, the longest row (at least 1), filled up with [`EMPTY`].
fn ragged(rows: &[Vec<u32>]) -> (Vec<u32>, usize) {
    let slots = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let mut block = vec![EMPTY; rows.len() * slots];
    for (row, into) in rows.iter().zip(block.chunks_exact_mut(slots)) {
        into[..row.len()].copy_from_slice(row);
    }
    (block, slots)
}

/// Slots of a selection that was given, of `tokens`.
fn slots_of(forced: &[u32], tokens: usize) -> usize {
    forced.len().checked_div(tokens).unwrap_or(1).max(1)
}
