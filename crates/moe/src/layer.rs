//! The MoE layer: router, dispatch, experts, combination, shared experts.

use crate::config::RouterConfig;
use crate::error::{MoeError, Result};
use crate::ops;
use crate::param::Param;
use crate::rng::Stream;
use crate::router::{self, RouteInput, Router};
use crate::tensor::read;
use candle_core::{D, DType, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::{Init, VarBuilder};
use senmon_kernels::activation::Activation;
use senmon_kernels::dispatch::{Dispatch, EMPTY};
use senmon_kernels::expert_mlp::Shape;
use std::sync::{Arc, Mutex, PoisonError};

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
        }
    }

    fn expert_shape(&self) -> Shape {
        Shape {
            hidden: self.hidden,
            intermediate: self.intermediate,
            activation: self.activation,
            gated: self.gated,
        }
    }

    fn shared_shape(&self) -> Shape {
        Shape { intermediate: self.shared_intermediate, ..self.expert_shape() }
    }
}

/// The parameters of a layer.
#[derive(Clone, Debug)]
pub struct MoeParams {
    /// \[E, H\].
    pub router: Param,
    /// Added to the logits: \[E\].
    pub router_bias: Option<Param>,
    /// Added to the scores for the selection, by the kinds that have one: \[E\].
    pub selection_bias: Option<SelectionBias>,
    /// \[E, P, H\]: each expert's gate rows, then its up rows.
    pub gate_up: Param,
    /// \[E, H, I\].
    pub down: Param,
    /// Biases of the experts: \[E, P\] and \[E, H\].
    pub expert_biases: Option<(Param, Param)>,
    /// \[P', H\] and \[H, I'\] of the shared experts together.
    pub shared: Option<(Param, Param)>,
    /// Biases of the shared experts, \[P'\] and \[H\]; with them a layer runs, it does not train.
    pub shared_biases: Option<(Param, Param)>,
    /// \[1, H\].
    pub shared_gate: Option<Param>,
}

impl MoeParams {
    /// A router and experts, \[E, H\], \[E, P, H\] and \[E, H, I\], with nothing beside them.
    pub fn new(router: Param, gate_up: Param, down: Param) -> Self {
        Self {
            router,
            router_bias: None,
            selection_bias: None,
            gate_up,
            down,
            expert_biases: None,
            shared: None,
            shared_biases: None,
            shared_gate: None,
        }
    }
}

/// The selection bias: state that is saved with a model but gets no gradient.
#[derive(Clone, Debug, Default)]
pub struct SelectionBias(Arc<Mutex<Vec<f32>>>);

impl SelectionBias {
    /// A bias that starts from these values.
    pub fn new(values: Vec<f32>) -> Self {
        Self(Arc::new(Mutex::new(values)))
    }

    /// A copy of the values: \[E\].
    pub fn values(&self) -> Vec<f32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the values.
    pub fn update(&self, change: impl FnOnce(&mut [f32])) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What a pass through a layer is told.
#[derive(Default)]
pub struct Ctx<'a> {
    /// Training: noise is on.
    pub train: bool,
    /// The random numbers of this step.
    pub seed: u64,
    /// Optimiser step (or micro-batch) that the numbers are of.
    pub step: u64,
    /// Which layer this is, for the random numbers and the observer.
    pub layer: usize,
    /// Sequences of equal length that the tokens are, one after another; 0 is 1.
    pub sequences: usize,
    /// 1 for tokens that count, 0 for padding: \[T\]. Padding is sent nowhere and counted nowhere.
    pub mask: Option<&'a [bool]>,
    /// The experts of an earlier pass, \[T, K\], to be used again.
    pub forced: Option<&'a [u32]>,
    /// Sees every routing.
    pub observer: Option<&'a mut dyn RoutingObserver>,
}

/// Watches what routers choose, without the layers knowing who does.
pub trait RoutingObserver {
    /// Layer `layer` routed a pass.
    fn routed(&mut self, layer: usize, routing: &Routing);
}

/// What a layer's router did with one pass of T tokens.
#[derive(Clone, Debug)]
pub struct Routing {
    /// K.
    pub top_k: usize,
    /// Expert of each slot: \[T, K\].
    pub experts: Vec<u32>,
    /// Weight of each slot: \[T, K\], with gradient.
    pub weights: Tensor,
    /// Slots of each expert: \[E\].
    pub load: Vec<u32>,
    /// What a selection without bias would have given, for kinds with one.
    pub unbiased_load: Option<Vec<u32>>,
    /// Mean over tokens of the scores: \[E\], with gradient.
    pub mean_scores: Tensor,
    /// Mean over tokens of logsumexp(z)²: a scalar with gradient.
    pub z: Tensor,
    /// Mean over tokens of the entropy of the scores, in nats.
    pub entropy: f64,
    /// Slots that lost their expert to a capacity.
    pub dropped: usize,
    /// The logits: \[T, E\].
    pub logits: Tensor,
}

/// A layer of experts behind a router.
#[derive(Debug)]
pub struct MoeLayer {
    config: MoeConfig,
    router: Box<dyn Router>,
    params: MoeParams,
}

impl MoeLayer {
    /// A layer with parameters from `vb`: `router.weight`, `experts.gate_up`, `experts.down`, and where the configuration has
    /// them `router.bias` (of the selection), `router.logits_bias`, `experts.gate_up_bias`, `experts.down_bias`, `shared.gate_up`,
    /// `shared.down`, `shared.gate`. Fresh ones are drawn with standard deviation 0.02, biases are 0.
    pub fn new(config: MoeConfig, vb: VarBuilder) -> Result<Self> {
        let (e, h, i) = (config.experts, config.hidden, config.intermediate);
        let p = config.expert_shape().pre();
        // A configuration that does not hold together is refused before any parameter is made.
        router::build(&config.router, e, config.top_k)?;
        let normal = |stdev: f64| Init::Randn { mean: 0.0, stdev };
        let get = |name: &str, shape: &[usize], stdev: f64| -> Result<Param> {
            Ok(Param::new(name, vb.get_with_hints(shape, name, normal(stdev))?))
        };
        let selection_bias = if router::kind(&config.router.kind)?.selection_bias {
            let bias = vb.get_with_hints(e, "router.bias", Init::Const(0.0))?;
            Some(SelectionBias::new(bias.to_dtype(DType::F32)?.to_vec1()?))
        } else {
            None
        };
        let shared = match config.shared_shape() {
            s if s.intermediate == 0 => None,
            s => Some((
                get("shared.gate_up", &[s.pre(), h], 0.02)?,
                get("shared.down", &[h, s.intermediate], 0.02)?,
            )),
        };
        let bias = |name: &str, shape: &[usize]| -> Result<Param> {
            Ok(Param::new(name, vb.get_with_hints(shape, name, Init::Const(0.0))?))
        };
        let gated = config.shared_gate && shared.is_some();
        let params = MoeParams {
            router: get("router.weight", &[e, h], 0.02 * config.router.init_scale)?,
            router_bias: config.router_bias.then(|| bias("router.logits_bias", &[e])).transpose()?,
            expert_biases: match config.expert_bias {
                false => None,
                true => Some((bias("experts.gate_up_bias", &[e, p])?, bias("experts.down_bias", &[e, h])?)),
            },
            shared_gate: gated.then(|| get("shared.gate", &[1, h], 0.02)).transpose()?,
            selection_bias,
            shared_biases: None,
            gate_up: get("experts.gate_up", &[e, p, h], 0.02)?,
            down: get("experts.down", &[e, h, i], 0.02)?,
            shared,
        };
        Self::from_params(config, params)
    }

    /// A layer with these parameters.
    pub fn from_params(config: MoeConfig, params: MoeParams) -> Result<Self> {
        let (e, h) = (config.experts, config.hidden);
        let expect = |what, param: &Param, shape: &[usize]| {
            let found = param.dims();
            if found == shape {
                return Ok(());
            }
            Err(MoeError::Shape { what, found: found.to_vec(), expected: format!("{shape:?}") })
        };
        let s = config.expert_shape();
        expect("the router", &params.router, &[e, h])?;
        expect("experts.gate_up", &params.gate_up, &[e, s.pre(), h])?;
        expect("experts.down", &params.down, &[e, h, s.intermediate])?;
        if let Some((up, down)) = &params.shared {
            let s = config.shared_shape();
            expect("shared.gate_up", up, &[s.pre(), h])?;
            expect("shared.down", down, &[h, s.intermediate])?;
        }
        if let Some(bias) = &params.router_bias {
            expect("router.logits_bias", bias, &[e])?;
        }
        if let Some((up, down)) = &params.expert_biases {
            expect("experts.gate_up_bias", up, &[e, s.pre()])?;
            expect("experts.down_bias", down, &[e, h])?;
        }
        if let Some((up, down)) = &params.shared_biases {
            expect("shared.gate_up_bias", up, &[config.shared_shape().pre()])?;
            expect("shared.down_bias", down, &[h])?;
        }
        if let Some(gate) = &params.shared_gate {
            expect("shared.gate", gate, &[1, h])?;
        }
        if let Some(bias) = &params.selection_bias
            && bias.values().len() != e
        {
            let found = vec![bias.values().len()];
            return Err(MoeError::Shape { what: "the selection bias", found, expected: format!("[{e}]") });
        }
        let router = router::build(&config.router, e, config.top_k)?;
        Ok(Self { config, router, params })
    }

    /// What the layer is made of.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Its parameters.
    pub fn params(&self) -> &MoeParams {
        &self.params
    }

    /// `y` of the shape of `x` \[.., H\], and what the router did. Losses are in the routing: nothing is kept outside.
    pub fn forward(&self, x: &Tensor, ctx: &mut Ctx) -> Result<(Tensor, Routing)> {
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
        let x = x.reshape(((), h))?;
        let (routing, dispatch) = self.route(&x, ctx)?;
        let s = self.config.expert_shape();
        let biases = self.params.expert_biases.as_ref();
        let a = ops::gated_up(&x, &self.params.gate_up, biases.map(|b| &b.0), &dispatch, s)?;
        let (down, bias) = (&self.params.down, biases.map(|b| &b.1));
        let mut y = ops::down_combine(&a, down, bias, &routing.weights, &dispatch, s)?;
        if let Some((up, down)) = &self.params.shared {
            let biases = self.params.shared_biases.as_ref();
            let mut shared = ops::biased_mlp(&x, up, down, biases, self.config.shared_shape())?;
            if let Some(gate) = &self.params.shared_gate {
                shared = shared.broadcast_mul(&sigmoid(&ops::linear(&x, gate)?)?)?;
            }
            y = (y + shared)?;
        }
        if let Some(observer) = &mut ctx.observer {
            observer.routed(ctx.layer, &routing);
        }
        Ok((y.reshape(shape)?, routing))
    }

    /// The choice of experts for `x` \[T, H\], and the dispatch that follows from it.
    pub fn route(&self, x: &Tensor, ctx: &Ctx) -> Result<(Routing, Arc<Dispatch>)> {
        let (tokens, _) = x.dims2()?;
        let (e, k) = (self.config.experts, self.config.top_k);
        let seen = match self.config.router.jitter {
            jitter if ctx.train && jitter > 0.0 => jittered(x, jitter as f32, ctx)?,
            _ => x.clone(),
        };
        let mut logits = ops::linear(&seen, &self.params.router)?;
        if let Some(bias) = &self.params.router_bias {
            logits = logits.broadcast_add(bias.tensor())?;
        }
        let bias = self.params.selection_bias.as_ref().map(SelectionBias::values);
        if let Some(forced) = ctx.forced
            && forced.len() != tokens * k
        {
            let expected = format!("[{tokens}, {k}]");
            return Err(MoeError::Shape { what: "the forced routing", found: vec![forced.len()], expected });
        }
        let input = RouteInput { top_k: k, bias: bias.as_deref(), forced: ctx.forced };
        let mut choice = self.router.choose(&logits, &input)?;
        let mask = match ctx.mask {
            Some(mask) if mask.len() != tokens => {
                let (found, expected) = (vec![mask.len()], format!("[{tokens}]"));
                return Err(MoeError::Shape { what: "the padding mask", found, expected });
            }
            Some(mask) if mask.iter().any(|counts| !counts) => {
                blank(&mut choice.experts, mask, k);
                if let Some(unbiased) = &mut choice.unbiased {
                    blank(unbiased, mask, k);
                }
                let mask: Vec<f32> = mask.iter().map(|counts| f32::from(*counts)).collect();
                Some(Tensor::from_vec(mask, (tokens, 1), x.device())?)
            }
            _ => None,
        };
        let mut dropped = 0;
        if let Some(capacity) = self.config.sequence_capacity {
            let slots = tokens.div_ceil(ctx.sequences.max(1)).max(1) * k;
            for sequence in choice.experts.chunks_mut(slots) {
                dropped += drop_beyond(sequence, e, capacity);
            }
        }
        let counted = match &mask {
            None => tokens as f64,
            Some(mask) => mask.sum_all()?.to_scalar::<f32>()?.max(1.0) as f64,
        };
        // Means over the tokens that count.
        let mean = |per_token: &Tensor| -> candle_core::Result<Tensor> {
            let per_token = match &mask {
                None => per_token.clone(),
                Some(mask) => per_token.broadcast_mul(mask)?,
            };
            per_token.sum(0)? / counted.max(1.0)
        };
        let mean_scores = mean(&choice.scores)?;
        let z = mean(&logits.log_sum_exp(D::Minus1)?.sqr()?.unsqueeze(1)?)?.squeeze(0)?;
        let entropy = read(&choice.scores, |scores| {
            let counts = |t: usize| ctx.mask.is_none_or(|mask| mask[t]);
            let rows = scores.chunks_exact(e).enumerate().filter(|(t, _)| counts(*t));
            let sum: f64 = rows.map(|(_, row)| row.iter().map(|p| entropy_term(*p)).sum::<f64>()).sum();
            sum / counted.max(1.0)
        })?;
        let dispatch = Dispatch::new(&choice.experts, k, e).ok_or_else(|| MoeError::Config {
            what: format!("the routing names an expert that is not one of {e}"),
        })?;
        let unbiased_load = choice.unbiased.as_ref().map(|picks| count(picks, e));
        let routing = Routing {
            top_k: k,
            load: dispatch.load(),
            unbiased_load,
            experts: choice.experts,
            weights: choice.weights,
            mean_scores,
            z,
            entropy,
            dropped,
            logits,
        };
        Ok((routing, Arc::new(dispatch)))
    }
}

/// -p·ln p in f64.
fn entropy_term(p: f32) -> f64 {
    if p > 0.0 { -(p as f64) * (p as f64).ln() } else { 0.0 }
}

/// Empties the slots of the tokens that do not count.
fn blank(experts: &mut [u32], mask: &[bool], top_k: usize) {
    for (slots, counts) in experts.chunks_exact_mut(top_k).zip(mask) {
        if !counts {
            slots.fill(EMPTY);
        }
    }
}

/// Empties the slots beyond the first `capacity` of each expert, and says how many.
fn drop_beyond(experts: &mut [u32], count: usize, capacity: usize) -> usize {
    let (mut taken, mut dropped) = (vec![0; count], 0);
    for slot in experts.iter_mut() {
        let Some(taken) = taken.get_mut(*slot as usize) else { continue };
        if *taken == capacity {
            *slot = EMPTY;
            dropped += 1;
        } else {
            *taken += 1;
        }
    }
    dropped
}

/// Slots of each expert.
fn count(picks: &[u32], experts: usize) -> Vec<u32> {
    let mut load = vec![0; experts];
    for &expert in picks.iter().filter(|&&expert| expert != EMPTY) {
        load[expert as usize] += 1;
    }
    load
}

/// The router's copy of `x`, multiplied by U(1 - jitter, 1 + jitter).
fn jittered(x: &Tensor, jitter: f32, ctx: &Ctx) -> Result<Tensor> {
    let stream = Stream::new(&[ctx.seed, ctx.step, ctx.layer as u64, 0x6a69]);
    let noise: Vec<f32> =
        (0..x.elem_count() as u64).map(|i| 1.0 + jitter * (2.0 * stream.uniform(i) - 1.0)).collect();
    Ok((x * Tensor::from_vec(noise, x.shape(), x.device())?)?)
}
