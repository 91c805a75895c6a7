//! The MoE layer: router, dispatch, experts, combination, shared experts, and what is beyond plain ones.

mod experts;
mod params;
mod route;
mod running;
mod soft;

use crate::config::{DenseGradient, Extras, RouterConfig};
use crate::error::{MoeError, Result};
use crate::ops;
use crate::router::Router;
use crate::tensor::shaped;
use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};
pub use params::{ExtraDef, ExtraInit, MoeParams, SelectionBias, check_together, extra_defs};
pub use route::route_logits;
pub use running::RunningMeans;
use senmon_kernels::activation::Activation;
use senmon_kernels::dispatch::EMPTY;
use senmon_kernels::expert_mlp::Shape;

/// What a layer is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// H.
    pub hidden: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// I, the inner width of one expert.
    pub intermediate: usize,
    /// The experts' non-linearity.
    pub activation: Activation,
    /// Experts have a gate projection.
    pub gated: bool,
    /// Inner width of the shared experts together; 0 for none.
    pub shared_intermediate: usize,
    /// What the shared experts give is multiplied by σ(x·w), w \[1, H\] (Qwen2-MoE).
    pub shared_gate: bool,
    /// The router's product has a bias \[E\], with the softmax or sigmoid after it (gpt-oss).
    pub router_bias: bool,
    /// Experts have biases, \[E, P\] and \[E, H\] (gpt-oss): such a layer runs, it does not train.
    pub expert_bias: bool,
    /// Tokens of a sequence that an expert takes, the first ones; those beyond get nothing from it (transformers' Switch).
    pub sequence_capacity: Option<usize>,
    /// How tokens choose.
    pub router: RouterConfig,
    /// What is beyond routed experts that are all alike.
    pub extras: Extras,
}

impl MoeConfig {
    /// A layer of `experts` SwiGLU experts, of which each token uses `top_k`.
    pub fn new(hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> Self {
        Self {
            hidden,
            experts,
            top_k,
            intermediate,
            activation: Activation::Silu,
            gated: true,
            shared_intermediate: 0,
            shared_gate: false,
            router_bias: false,
            expert_bias: false,
            sequence_capacity: None,
            router: RouterConfig::default(),
            extras: Extras::default(),
        }
    }

    /// The width that routed experts work in.
    pub fn inner(&self) -> usize {
        if self.extras.latent > 0 { self.extras.latent } else { self.hidden }
    }

    /// Experts that can be picked: the real ones, then those that compute nothing.
    pub fn choices(&self) -> usize {
        self.experts.saturating_add(self.extras.special())
    }

    fn expert_shape(&self) -> Shape {
        Shape {
            hidden: self.inner(),
            intermediate: self.intermediate,
            activation: self.activation,
            gated: self.gated,
        }
    }

    fn shared_shape(&self) -> Shape {
        Shape { hidden: self.hidden, intermediate: self.shared_intermediate, ..self.expert_shape() }
    }

    fn residual_shape(&self) -> Shape {
        Shape { hidden: self.hidden, ..self.expert_shape() }
    }
}

/// What a pass through a layer is told.
#[derive(Default)]
pub struct Ctx<'a> {
    /// Training: noise is on.
    pub train: bool,
    /// The random numbers of this step.
    pub seed: u64,
    /// Optimiser step that the numbers are of.
    pub step: u64,
    /// Tokens of that step before those of this pass: the numbers of a token do not depend on how a step is cut into passes.
    pub first_token: u64,
    /// Which layer this is, for the random numbers and the observer.
    pub layer: usize,
    /// Sequences of equal length that the tokens are, one after another; 0 is 1.
    pub sequences: usize,
    /// 1 for tokens that count, 0 for padding: \[T\]. Padding is sent nowhere and counted nowhere.
    pub mask: Option<&'a [bool]>,
    /// The experts of an earlier pass, \[T, slots\] before drops, to be used again.
    pub forced: Option<&'a [u32]>,
    /// An expert that is switched off: tokens do without it, and what else they have gets its weight, in proportion.
    pub off: Option<u32>,
    /// The ids of the tokens, \[T\], for kinds that go by them.
    pub token_ids: Option<&'a [u32]>,
    /// What only some losses need and takes time.
    pub wants: Wants,
    /// Sees every routing.
    pub observer: Option<&'a mut dyn RoutingObserver>,
}

/// What only some losses need and takes time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// How far apart what the experts of a token give is (`balance.distill`).
    pub distance: bool,
    /// A gradient of the router from experts that were not picked (`balance.dense_gradient`).
    pub dense_gradient: DenseGradient,
}

/// Watches what routers choose, without the layers knowing who does.
pub trait RoutingObserver {
    /// Layer `layer` routed a pass.
    fn routed(&mut self, layer: usize, routing: &Routing);

    /// Tokens, of the `tokens` of a pass through layer `layer`, of which it wants to see what every expert would give: their
    /// rows. As a rule none.
    fn probes(&mut self, _layer: usize, _tokens: usize) -> Vec<u32> {
        Vec::new()
    }

    /// What every expert of layer `layer` gives for the rows that [`probes`](Self::probes) named, before its weight: \[rows, E, L\].
    fn outputs(&mut self, _layer: usize, _rows: usize, _experts: usize, _outputs: &[f32]) {}
}

/// What a layer's router did with one pass of T tokens.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Slots of a token: K, or as many as some token needs.
    pub top_k: usize,
    /// K, as it was asked for.
    pub asked: usize,
    /// E, the experts that compute.
    pub real: usize,
    /// Expert of each slot: \[T, slots\]; ids from E on are experts that compute nothing.
    pub experts: Vec<u32>,
    /// The same before any drop.
    pub picked: Vec<u32>,
    /// Weight of each slot: \[T, slots\], with gradient.
    pub weights: Tensor,
    /// Slots of each expert, those that compute nothing last.
    pub load: Vec<u32>,
    /// The same before any drop.
    pub picked_load: Vec<u32>,
    /// First slots of each expert, before any drop.
    pub first_load: Vec<u32>,
    /// The kind has a first and a second expert, not two alike (`gshard`).
    pub second_by_chance: bool,
    /// What a selection without bias and groups would have given, for kinds with a bias: \[T, K\].
    pub unbiased: Option<Vec<u32>>,
    /// Slots of each expert there.
    pub unbiased_load: Option<Vec<u32>>,
    /// Scores of the tokens, which sum to 1: \[T, E\], with gradient.
    pub scores: Tensor,
    /// Their mean over the tokens that count: \[E\], with gradient.
    pub mean_scores: Tensor,
    /// What the selection bias was added to, where there is one: \[T, E\].
    pub selection: Option<Tensor>,
    /// Mean over tokens of logsumexp(z)²: a scalar with gradient.
    pub z: Tensor,
    /// Mean over tokens of the entropy of the scores, in nats.
    pub entropy: f64,
    /// Mean over the tokens that count of the gates of `relu`: \[E\], with gradient.
    pub mean_gates: Option<Tensor>,
    /// The chance of each expert to be picked, summed over tokens, where the kind has one: \[E\], with gradient.
    pub smooth_load: Option<Tensor>,
    /// What the kind and the experts add to what is minimised, means over tokens: scalars with gradient.
    pub terms: Vec<(&'static str, Tensor)>,
    /// Slots that lost their expert to a capacity.
    pub dropped: usize,
    /// Tokens that count.
    pub counted: usize,
    /// Which tokens count, where some do not: \[T\].
    pub mask: Option<Vec<bool>>,
    /// Sequences of equal length that the tokens are.
    pub sequences: usize,
    /// The logits: \[T, columns\].
    pub logits: Tensor,
}

impl Routing {
    /// The routing of an ensemble's tokens, \[M·T, slots\], with the slots of all members beside each other: \[T, M·slots\].
    fn by_token(&self, members: usize) -> Result<Self> {
        let (rows, slots) = self.weights.dims2()?;
        let tokens = rows / members;
        let turned = |picks: &[u32]| -> Vec<u32> {
            let of = |t: usize| {
                (0..members).flat_map(move |m| (0..slots).map(move |k| (m * tokens + t) * slots + k))
            };
            (0..tokens).flat_map(of).map(|at| picks[at]).collect()
        };
        let side_by_side = |x: &Tensor, width: usize| -> Result<Tensor> {
            let x = x.reshape((members, tokens, width))?.transpose(0, 1)?.contiguous()?;
            Ok(x.reshape((tokens, members * width))?)
        };
        // A member's logits of the others' experts are -∞: their greatest is the one that there is.
        let experts = self.logits.dim(1)?;
        let logits = self.logits.reshape((members, tokens, experts))?.max(0)?;
        Ok(Self {
            top_k: members * slots,
            experts: turned(&self.experts),
            picked: turned(&self.picked),
            weights: side_by_side(&self.weights, slots)?,
            logits,
            ..self.clone()
        })
    }

    /// A routing that was made elsewhere: experts \[T, slots\], weights \[T, slots\] and logits \[T, E\], whose softmax is taken for its scores.
    pub fn new(experts: Vec<u32>, weights: Tensor, logits: Tensor) -> Result<Self> {
        let (tokens, slots) = weights.dims2()?;
        let count = logits.dim(1)?;
        let odd = experts.iter().find(|e| **e != EMPTY && **e as usize >= count);
        if experts.len() != tokens * slots || odd.is_some() {
            let expected = format!("[{tokens}, {slots}] of experts below {count}");
            return Err(MoeError::Shape { what: "the routing", found: vec![experts.len()], expected });
        }
        let scores = softmax(&logits, D::Minus1)?;
        let load = route::count(&experts, count);
        let first: Vec<u32> = experts.iter().step_by(slots.max(1)).copied().collect();
        Ok(Self {
            top_k: slots,
            asked: slots,
            real: count,
            picked: experts.clone(),
            picked_load: load.clone(),
            first_load: route::count(&first, count),
            second_by_chance: false,
            unbiased: None,
            unbiased_load: None,
            mean_scores: scores.mean(0)?,
            scores,
            selection: None,
            z: logits.log_sum_exp(D::Minus1)?.sqr()?.mean_all()?,
            entropy: 0.0,
            mean_gates: None,
            smooth_load: None,
            terms: Vec::new(),
            dropped: 0,
            counted: tokens,
            mask: None,
            sequences: 1,
            experts,
            weights,
            load,
            logits,
        })
    }
}

/// A layer of experts behind a router.
#[derive(Debug)]
pub struct MoeLayer {
    config: MoeConfig,
    router: Box<dyn Router>,
    params: MoeParams,
    running: RunningMeans,
}

impl MoeLayer {
    /// What the layer is made of.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Its parameters.
    pub fn params(&self) -> &MoeParams {
        &self.params
    }

    /// The running means of what its experts give.
    pub fn running(&self) -> &RunningMeans {
        &self.running
    }

    /// `y` of the shape of `x` \[.., H\], and what the router did. Losses are in the routing: nothing is kept outside.
    pub fn forward(&self, x: &Tensor, ctx: &mut Ctx) -> Result<(Tensor, Routing)> {
        self.forward_onto(x, None, ctx)
    }

    /// As [`forward`](Self::forward), added to the residual stream `onto`, of the shape of `x`: where nothing follows the experts, within their op.
    pub fn forward_onto(
        &self,
        x: &Tensor,
        onto: Option<&Tensor>,
        ctx: &mut Ctx,
    ) -> Result<(Tensor, Routing)> {
        let h = self.config.hidden;
        if x.dims().last() != Some(&h) {
            let expected = format!("[.., {h}]");
            return Err(MoeError::Shape {
                what: "the input of the layer",
                found: x.dims().to_vec(),
                expected,
            });
        }
        let shape = x.shape().clone();
        let x = shaped(x, (x.elem_count() / h.max(1), h))?;
        let inner = match &self.params.extra("latent.down") {
            None => x.clone(),
            Some(down) => ops::linear(&x, down)?,
        };
        let onto = onto.map(|onto| shaped(onto, x.shape())).transpose()?;
        let last = self.params.shared.is_none() && !self.config.extras.follow_experts();
        let (mut y, routing, added) = match self.config.router.kind.as_str() {
            "soft" => {
                let (y, routing) = self.soft(&x, &inner, ctx)?;
                (y, routing, false)
            }
            _ => self.routed(&x, &inner, onto.as_ref().filter(|_| last), ctx)?,
        };
        if let Some(up) = self.params.extra("latent.up") {
            if self.config.extras.latent_norm {
                let mean = y.sqr()?.mean_keepdim(1)?;
                y = y.broadcast_div(&(mean + 1e-6)?.sqrt()?)?;
            }
            y = ops::linear(&y, up)?;
        }
        y = self.beyond(y, &x, &routing)?;
        if let Some((up, down)) = &self.params.shared {
            let biases = self.params.shared_biases.as_ref();
            let mut shared = ops::biased_mlp(&x, up, down, biases, self.config.shared_shape(), None)?;
            if let Some(gate) = &self.params.shared_gate {
                shared = shared.broadcast_mul(&sigmoid(&ops::linear(&x, gate)?)?)?;
            }
            y = (y + shared)?;
        }
        y = ops::added(y, onto.as_ref().filter(|_| !added))?;
        self.show_outputs(&inner, ctx)?;
        if let Some(observer) = &mut ctx.observer {
            match self.config.extras.members {
                0 | 1 => observer.routed(ctx.layer, &routing),
                members => observer.routed(ctx.layer, &routing.by_token(members)?),
            }
        }
        Ok((shaped(&y, shape)?, routing))
    }
}
