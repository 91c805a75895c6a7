//! One optimiser step: micro-batches, their gradients summed in a fixed tree, clipping, AdamW, balancing.

use std::collections::BTreeMap;

use senmon_kernels::buffers::Buffer;
use senmon_kernels::{optimizer, residual};
use senmon_models::decoder::{Decoder, Pass, Slot};
use senmon_moe::config::Scope;
use senmon_moe::layer::Wants;
use senmon_moe::{Param, balance};

use crate::balancing::{Balancing, Seen};
use crate::config::OptimizerConfig;
use crate::error::{Result, TrainError};
use crate::observer::LayerStats;

/// Tokens of one micro-batch: B sequences of S + 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// \[B, S + 1\].
    pub tokens: Vec<u32>,
    /// B.
    pub batch: usize,
}

impl MicroBatch {
    /// The inputs and the targets, \[B, S\] each.
    pub fn split(&self) -> (Vec<u32>, Vec<u32>) {
        let width = self.tokens.len() / self.batch.max(1);
        let rows = || self.tokens.chunks_exact(width);
        (
            rows().flat_map(|row| &row[..width - 1]).copied().collect(),
            rows().flat_map(|row| &row[1..]).copied().collect(),
        )
    }
}

/// AdamW (Loshchilov & Hutter, 1711.05101) over the parameters of a decoder.
///
/// Weight decay acts on tensors with two or more dimensions, embeddings included. An expert without tokens has gradient
/// 0; its moments and decay still act.
#[derive(Debug)]
pub struct AdamW {
    /// The two moments of each parameter, in the order of the decoder's slots; none for state.
    moments: Vec<Option<(Vec<f32>, Vec<f32>)>>,
    /// Steps taken.
    steps: u64,
}

/// What a step did.
#[derive(Clone, Debug, Default)]
pub struct StepOutcome {
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// With the balance terms.
    pub total: f64,
    /// Each balance term before its coefficient.
    pub losses: BTreeMap<String, f64>,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// The load of each MoE layer.
    pub layers: Vec<LayerStats>,
}

/// The parameters that have a gradient, with their places among the slots.
fn trained(decoder: &Decoder) -> impl Iterator<Item = (usize, &Param)> {
    decoder.slots().iter().enumerate().filter_map(|(index, slot)| match slot {
        Slot::Param(param) => Some((index, param)),
        Slot::State(_) => None,
    })
}

impl AdamW {
    /// Moments of zeros.
    pub fn new(decoder: &Decoder) -> Self {
        let mut moments = vec![None; decoder.slots().len()];
        for (index, param) in trained(decoder) {
            let zeros = vec![0.0; param.tensor().elem_count()];
            moments[index] = Some((zeros.clone(), zeros));
        }
        Self { moments, steps: 0 }
    }

    /// Moments as they were after `steps` steps.
    pub fn resume(moments: Vec<Option<(Vec<f32>, Vec<f32>)>>, steps: u64) -> Self {
        Self { moments, steps }
    }

    /// The two moments of each parameter.
    pub fn moments(&self) -> &[Option<(Vec<f32>, Vec<f32>)>] {
        &self.moments
    }

    /// Norm of the whole gradient, or the name of a parameter whose gradient is not finite.
    fn norm(decoder: &Decoder) -> std::result::Result<f64, String> {
        let mut sum = 0.0;
        for (_, param) in trained(decoder) {
            let Some(sink) = param.sink() else { continue };
            let squares = optimizer::sum_of_squares(&sink.lock());
            if !squares.is_finite() {
                return Err(param.name().to_owned());
            }
            sum += squares;
        }
        Ok(sum.sqrt())
    }

    /// Applies the gradients in the sinks, times `clip_factor`, and zeroes them.
    fn apply(
        &mut self,
        decoder: &Decoder,
        config: &OptimizerConfig,
        lr: f64,
        clip_factor: f64,
    ) -> Result<()> {
        self.steps += 1;
        for (index, param) in trained(decoder) {
            let (Some(sink), Some((m, v))) = (param.sink(), &mut self.moments[index]) else { continue };
            let decay = if param.tensor().rank() >= 2 { config.weight_decay } else { 0.0 };
            let step = optimizer::AdamW {
                lr,
                beta1: config.betas[0],
                beta2: config.betas[1],
                eps: config.eps,
                weight_decay: decay,
                step: self.steps,
                clip_factor: clip_factor as f32,
                zero_grad: true,
            };
            let mut grad = sink.lock();
            param.update(|values| optimizer::adamw(&step, values, &mut grad, m, v))?;
        }
        Ok(())
    }
}

/// Gradients of micro-batches, summed pairwise in a tree over the whole global batch, so that the sum does not depend
/// on who computes which subtree.
#[derive(Default)]
struct GradientTree {
    /// Sums of 2^level micro-batches each, the levels falling.
    sums: Vec<(u32, Vec<Buffer>)>,
}

impl GradientTree {
    /// Takes the sinks' gradients as the next leaf and leaves zeros; the last leaf stays in the sinks, all others added.
    fn leaf(&mut self, decoder: &Decoder, last: bool) {
        if last && self.sums.is_empty() {
            return;
        }
        let mut leaf: Vec<Buffer> = trained(decoder)
            .filter_map(|(_, param)| param.sink())
            .map(|sink| {
                let mut gradient = sink.lock();
                let mut taken = Buffer::stale(gradient.len());
                taken.copy_from_slice(&gradient);
                gradient.fill(0.0);
                taken
            })
            .collect();
        let mut level = 0;
        while let Some((top, earlier)) = self.sums.pop_if(|(top, _)| *top == level || last) {
            for (sum, part) in leaf.iter_mut().zip(&earlier) {
                residual::add_to(sum, part);
            }
            level = top + 1;
        }
        if last {
            let sinks = trained(decoder).filter_map(|(_, param)| param.sink());
            for (sink, sum) in sinks.zip(&leaf) {
                sink.lock().copy_from_slice(sum);
            }
        } else {
            self.sums.push((level, leaf));
        }
    }
}

/// Takes one optimiser step (`step` from 1) on the micro-batches that `next` gives for 0..`accumulate`.
///
/// `advice` completes the message when a loss or a gradient is not finite; nothing is changed then.
pub fn step(
    decoder: &Decoder,
    adamw: &mut AdamW,
    balancing: &mut Balancing,
    config: &OptimizerConfig,
    step: u64,
    lr: f64,
    seed: u64,
    accumulate: usize,
    next: &mut dyn FnMut(usize) -> Result<MicroBatch>,
    advice: &str,
) -> Result<StepOutcome> {
    let bad = |what: String| TrainError::NonFinite { step, what, advice: advice.to_owned() };
    let share = 1.0 / accumulate as f64;
    let mut outcome = StepOutcome::default();
    let mut batches = Vec::with_capacity(accumulate);
    for micro in 0..accumulate {
        batches.push(next(micro)?);
    }
    let balance = balancing.config.clone();
    let wants = Wants {
        distance: balance.distill != 0.0 && !balancing.consistent,
        dense_gradient: balance.dense_gradient,
    };
    let firsts: Vec<u64> = batches
        .iter()
        .scan(0, |sum, batch| {
            let first = *sum;
            *sum += (batch.tokens.len() - batch.batch) as u64;
            Some(first)
        })
        .collect();
    // The picks of the whole step, where a loss goes by them: once through without gradients.
    let counted = balance.aux != 0.0 || balancing.multiplier() != 0.0;
    let counts = match balance.scope == Scope::Global && counted && accumulate > 1 {
        false => None,
        true => {
            let mut sums: Vec<Vec<u64>> = Vec::new();
            for (batch, first_token) in batches.iter().zip(&firsts) {
                let (tokens, _) = batch.split();
                let mut pass = Pass { train: true, seed, step, first_token: *first_token, ..Pass::default() };
                let (_, routings) = decoder.forward(&tokens, batch.batch, &mut pass)?;
                sums.resize_with(routings.len(), Vec::new);
                for (sum, (_, routing)) in sums.iter_mut().zip(&routings) {
                    let counted = balance::counted(routing, &balance);
                    sum.resize(counted.len(), 0);
                    sum.iter_mut().zip(counted).for_each(|(sum, count)| *sum += u64::from(*count));
                }
            }
            Some(sums)
        }
    };
    let tokens = batches.iter().map(|batch| (batch.tokens.len() - batch.batch) as u64).sum();
    let around = balance::Around { counts: counts.as_deref(), tokens, multiplier: balancing.multiplier() };
    let mut seen = Seen::default();
    let mut tree = GradientTree::default();
    for (micro, batch) in batches.iter().enumerate() {
        let (tokens, targets) = batch.split();
        let mut pass = Pass { train: true, seed, step, first_token: firsts[micro], wants, ..Pass::default() };
        let apart = if balancing.consistent { balance.distill * share } else { 0.0 };
        let (loss, distance, routings) = if apart == 0.0 {
            let (loss, routings) =
                decoder.loss(&tokens, &targets, batch.batch, Some(share as f32), &mut pass)?;
            (loss.mean, None, routings)
        } else {
            let (share, apart) = (share as f32, apart as f32);
            let (mean, distance, routings) =
                decoder.loss_of_two(&tokens, &targets, batch.batch, share, apart, &mut pass)?;
            (mean, Some(distance), routings)
        };
        seen.add(&routings, balance.quantile)?;
        let routings: Vec<_> = routings.into_iter().map(|(_, routing)| routing).collect();
        let mut terms = balance::losses_of(&routings, &balance, around)?;
        terms.extend(distance.map(|value| balance::BalanceLoss {
            name: "distill",
            coefficient: balance.distill,
            value,
        }));
        let mean = f64::from(loss.to_scalar::<f32>()?);
        if !mean.is_finite() {
            return Err(bad("the loss".into()));
        }
        outcome.loss += mean * share;
        outcome.total += mean * share;
        let mut total = if accumulate == 1 { loss.clone() } else { loss.affine(share, 0.0)? };
        for term in &terms {
            let value = f64::from(term.value.to_scalar::<f32>()?);
            if !value.is_finite() {
                return Err(bad(format!("the balance loss `{}`", term.name)));
            }
            *outcome.losses.entry(term.name.to_owned()).or_default() += value * share;
            outcome.total += term.coefficient * value * share;
            total = (total + term.value.affine(term.coefficient * share, 0.0)?)?;
        }
        total.backward()?;
        pass.reclaim()?;
        tree.leaf(decoder, micro + 1 == accumulate);
    }
    outcome.grad_norm = AdamW::norm(decoder).map_err(|name| bad(format!("the gradient of {name}")))?;
    let clip_factor = match config.clip {
        clip if clip > 0.0 => (clip / (outcome.grad_norm + 1e-6)).min(1.0),
        _ => 1.0,
    };
    adamw.apply(decoder, config, lr, clip_factor)?;
    balancing.step(decoder, &seen);
    outcome.layers =
        seen.layers.iter().map(|(layer, of)| LayerStats::from_counts(*layer, &of.load, of.dropped)).collect();
    Ok(outcome)
}
