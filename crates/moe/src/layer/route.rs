//! From tokens to a routing: logits, choice, capacity, and what the balancing losses need.

use super::{Ctx, MoeConfig, MoeLayer, Routing, SelectionBias};
use crate::capacity::{Capacity, Places};
use crate::config::{Drop, Noise};
use crate::error::{MoeError, Result};
use crate::ops;
use crate::rng::{Draws, Purpose};
use crate::router::{self, Choice, RouteInput, Router};
use crate::tensor::read;
use candle_core::{D, Tensor};
use senmon_kernels::dispatch::{Dispatch, EMPTY};
use std::sync::Arc;

/// A routing, the dispatch that follows from it, and whether its weights are for the experts' inputs.
pub(super) struct Routed {
    pub routing: Routing,
    pub dispatch: Arc<Dispatch>,
    pub weighs_input: bool,
}

impl MoeLayer {
    /// The logits of `x` \[T, H\], with the noise of training on the router's copy of it.
    pub(super) fn logits(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        let seen = match self.config.router.jitter {
            jitter if ctx.train && jitter > 0.0 => jittered(x, jitter as f32, &self.draws(ctx, x.dim(0)?))?,
            _ => x.clone(),
        };
        let mut logits = ops::linear(&seen, &self.params.router)?;
        if let Some(bias) = &self.params.router_bias {
            logits = logits.broadcast_add(bias.tensor())?;
        }
        self.of_members(logits)
    }

    /// Leaves each part of the tokens the experts of its member: the tokens are M times the same, one member after another.
    fn of_members(&self, logits: Tensor) -> Result<Tensor> {
        let members = self.config.extras.members;
        if members < 2 {
            return Ok(logits);
        }
        let (tokens, experts) = logits.dims2()?;
        if !tokens.is_multiple_of(members) {
            let expected = format!("{members} times the same tokens, for experts.members = {members}");
            return Err(MoeError::Shape { what: "the input of the layer", found: vec![tokens], expected });
        }
        let (part, size) = (tokens / members, experts / members);
        let place = |at: usize| (at / experts / part.max(1), at % experts / size);
        let out: Vec<f32> = (0..tokens * experts)
            .map(|at| {
                let (member, owner) = place(at);
                if member == owner { 0.0 } else { f32::NEG_INFINITY }
            })
            .collect();
        Ok((logits + Tensor::from_vec(out, (tokens, experts), &candle_core::Device::Cpu)?)?)
    }

    /// The choice of experts for `x` \[T, H\], and the dispatch that follows from it.
    pub fn route(&self, x: &Tensor, ctx: &Ctx) -> Result<(Routing, Arc<Dispatch>)> {
        let _span = senmon_kernels::profile::span("router");
        let routed = self.route_all(x, &self.logits(x, ctx)?, ctx)?;
        Ok((routed.routing, routed.dispatch))
    }

    pub(super) fn route_all(&self, x: &Tensor, logits: &Tensor, ctx: &Ctx) -> Result<Routed> {
        let (p, r) = (&self.params, &self.config.router);
        let noise_std = match p.extra("router_noise") {
            Some(noise) if ctx.train && r.noise == Noise::Learned => {
                Some(router::softplus(&ops::linear(x, noise)?)?)
            }
            _ => None,
        };
        let predicted = match p.extra("router_predictor") {
            Some(predictor) => Some(ops::linear(&x.detach(), predictor)?),
            None => None,
        };
        let bias = p.selection_bias.as_ref().map(SelectionBias::values);
        let table = p.table.as_ref().map(SelectionBias::values);
        let input = RouteInput {
            top_k: self.config.top_k,
            bias: bias.as_deref(),
            forced: ctx.forced,
            train: ctx.train,
            draws: self.draws(ctx, x.dim(0)?),
            noise_std: noise_std.as_ref(),
            token_ids: ctx.token_ids,
            table: table.as_deref(),
            mask: ctx.mask,
            together: 0,
            predicted: predicted.as_ref(),
        };
        finish(&self.config, &*self.router, logits, &input, ctx.sequences, ctx.off)
    }

    /// The random numbers of a pass of `rows` tokens, of which an ensemble has each once for every member.
    pub(super) fn draws(&self, ctx: &Ctx, rows: usize) -> Draws<'static> {
        Draws {
            seed: ctx.seed,
            step: ctx.step,
            layer: ctx.layer as u64,
            first: ctx.first_token,
            part: rows / self.config.extras.members.max(1),
            given: &[],
        }
    }
}

/// Routes tokens by their logits \[T, columns\], as a layer does: the door for who has logits and no layer. `sequences` of equal length are the tokens; 0 is 1.
pub fn route_logits(
    config: &MoeConfig,
    router: &dyn Router,
    logits: &Tensor,
    input: &RouteInput,
    sequences: usize,
) -> Result<Routing> {
    Ok(finish(config, router, logits, input, sequences, None)?.routing)
}

fn finish(
    config: &MoeConfig,
    router: &dyn Router,
    logits: &Tensor,
    input: &RouteInput,
    sequences: usize,
    off: Option<u32>,
) -> Result<Routed> {
    let (tokens, columns) = logits.dims2()?;
    let (e, r, sequences) = (config.choices(), &config.router, sequences.max(1));
    let (wanted, kind) = (router::columns(r, e), router::kind(&r.kind)?);
    let shape = |what, found, expected| Err(MoeError::Shape { what, found, expected });
    if columns != wanted {
        return shape("the logits", vec![tokens, columns], format!("[T, {wanted}]"));
    }
    if let Some(forced) = input.forced
        && (forced.is_empty() != (tokens == 0)
            || forced.len() % tokens.max(1) != 0
            || !kind.ragged && forced.len() != tokens * input.top_k)
    {
        return shape("the forced routing", vec![forced.len()], format!("[{tokens}, {}]", input.top_k));
    }
    if let Some(mask) = input.mask
        && mask.len() != tokens
    {
        return shape("the padding mask", vec![mask.len()], format!("[{tokens}]"));
    }
    let input = RouteInput { together: together(config, tokens, sequences), ..*input };
    let mut choice = router.choose(logits, &input)?;
    let slots = choice.slots;
    if choice.experts.len() != tokens * slots {
        return shape("the forced routing", vec![choice.experts.len()], format!("[{tokens}, {slots}]"));
    }
    let mask = match input.mask {
        Some(mask) if mask.iter().any(|counts| !counts) => {
            blank(&mut choice.experts, mask, slots);
            if let Some(unbiased) = &mut choice.unbiased {
                blank(unbiased, mask, input.top_k);
            }
            let mask: Vec<f32> = mask.iter().map(|counts| f32::from(*counts)).collect();
            Some(Tensor::from_vec(mask, (tokens, 1), logits.device())?)
        }
        _ => None,
    };
    let counts = |t: usize| input.mask.is_none_or(|mask| mask[t]);
    let counted = (0..tokens).filter(|t| counts(*t)).count();
    if let Some(odd) = choice.experts.iter().find(|pick| **pick != EMPTY && **pick as usize >= e) {
        return Err(MoeError::Config {
            what: format!("the routing names expert {odd}, which is not one of {e}"),
        });
    }

    let picked = choice.experts.clone();
    let capacity = capacity(config, &input, tokens.div_ceil(sequences), columns)?;
    let dropped = match capacity {
        None => 0,
        Some(capacity) => {
            let ranks = ranks(config, &choice)?;
            let picks = &mut choice.experts;
            read(&ranks, |ranks| capacity.apply(picks, ranks, slots, config.experts, counts))?
        }
    };
    if dropped > 0 {
        choice.weights = if r.normalize_after_drop && kind.normalizes {
            router.choose(logits, &RouteInput { forced: Some(&choice.experts), ..input })?.weights
        } else {
            let kept: Vec<f32> = choice.experts.iter().map(|e| f32::from(u8::from(*e != EMPTY))).collect();
            (&choice.weights * Tensor::from_vec(kept, (tokens, slots), logits.device())?)?
        };
    }

    if let Some(off) = off {
        let mut weights = read(&choice.weights, <[f32]>::to_vec)?;
        switch_off(&mut choice.experts, &mut weights, slots, off);
        choice.weights = Tensor::from_vec(weights, (tokens, slots), logits.device())?;
    }

    // Means over the tokens that count.
    let mean = |per_token: &Tensor| -> candle_core::Result<Tensor> {
        let per_token = match &mask {
            None => per_token.clone(),
            Some(mask) => per_token.broadcast_mul(mask)?,
        };
        per_token.sum(0)? / counted.max(1) as f64
    };
    let scores_width = choice.scores.dim(1)?;
    let entropy = read(&choice.scores, |scores| {
        let rows = scores.chunks_exact(scores_width).enumerate().filter(|(t, _)| counts(*t));
        let sum: f64 = rows.map(|(_, row)| row.iter().map(|p| entropy_term(*p)).sum::<f64>()).sum();
        sum / counted.max(1) as f64
    })?;
    let mut terms = Vec::new();
    for term in &choice.terms {
        terms.push((term.name, mean(&term.per_token.unsqueeze(1)?)?.squeeze(0)?));
    }
    let dispatch = dispatch(&choice.experts, slots, config)?;
    let first: Vec<u32> = picked.iter().step_by(slots).copied().collect();
    let picked_load = count(&picked, e);
    let routing = Routing {
        top_k: slots,
        asked: input.top_k,
        real: config.experts,
        load: count(&choice.experts, e),
        first_load: count(&first, e),
        second_by_chance: r.kind == "gshard",
        unbiased_load: choice.unbiased.as_ref().map(|picks| count(picks, e)),
        unbiased: choice.unbiased,
        mean_scores: mean(&choice.scores)?,
        scores: choice.scores,
        selection: choice.selection,
        z: mean(&logits.log_sum_exp(D::Minus1)?.sqr()?.unsqueeze(1)?)?.squeeze(0)?,
        entropy,
        mean_gates: choice.gates.as_ref().map(&mean).transpose()?,
        smooth_load: choice.smooth_load,
        terms,
        dropped,
        counted,
        mask: input.mask.map(<[bool]>::to_vec),
        sequences,
        logits: logits.clone(),
        experts: choice.experts,
        weights: choice.weights,
        picked_load,
        picked,
    };
    Ok(Routed { routing, dispatch, weighs_input: choice.weighs_input })
}

/// The dispatch of picks \[T, slots\] to the real experts; those that compute nothing get no row.
pub(super) fn dispatch(picks: &[u32], slots: usize, config: &MoeConfig) -> Result<Arc<Dispatch>> {
    let dispatch = if config.extras.special() == 0 {
        Dispatch::new(picks, slots, config.experts)
    } else {
        let real = |pick: &u32| if (*pick as usize) < config.experts { *pick } else { EMPTY };
        Dispatch::new(&picks.iter().map(real).collect::<Vec<_>>(), slots, config.experts)
    };
    dispatch
        .map(Arc::new)
        .ok_or_else(|| MoeError::Config { what: format!("a routing of {} slots is too large", picks.len()) })
}

/// Tokens that are routed together: a group, or the sequence for kinds that mix its tokens; 0 for all.
pub(super) fn together(config: &MoeConfig, tokens: usize, sequences: usize) -> usize {
    match (config.router.group_size, config.router.kind.as_str()) {
        (0, "depth" | "soft") => tokens / sequences,
        (size, _) => size,
    }
}

/// What bounds the tokens of each expert, if anything; sequences have `sequence` tokens.
fn capacity<'a>(
    config: &MoeConfig,
    input: &RouteInput<'a>,
    sequence: usize,
    columns: usize,
) -> Result<Option<Capacity<'a>>> {
    let r = &config.router;
    let factor = if input.train { r.capacity } else { r.eval_capacity };
    let (places, group, drop) = match config.sequence_capacity {
        Some(number) => (Places::Number(number), sequence, Drop::Token),
        None if factor == 0.0 || router::kind(&r.kind)?.own_capacity => return Ok(None),
        None => {
            let (top_k, experts, least) = (input.top_k, config.choices(), r.min_capacity);
            (Places::Share { factor, top_k, experts, least }, r.group_size, r.drop)
        }
    };
    Ok(Some(Capacity { places, group, width: columns, drop, draws: input.draws }))
}

/// What slots are ranked by where a capacity goes by that. An order of tokens goes by their scores; what is normalised after drops is not normalised yet.
fn ranks(config: &MoeConfig, choice: &Choice) -> Result<Tensor> {
    let r = &config.router;
    if r.drop == Drop::Priority || r.drop == Drop::Gate && r.normalize_after_drop {
        let scores = choice.selection.as_ref().unwrap_or(&choice.scores);
        return router::gather(scores, &choice.experts, choice.slots);
    }
    Ok(choice.weights.clone())
}

/// -p·ln p in f64.
fn entropy_term(p: f32) -> f64 {
    if p > 0.0 { -(p as f64) * (p as f64).ln() } else { 0.0 }
}

/// Empties the slots of the tokens that do not count.
fn blank(experts: &mut [u32], mask: &[bool], slots: usize) {
    for (slots, counts) in experts.chunks_exact_mut(slots).zip(mask) {
        if !counts {
            slots.fill(EMPTY);
        }
    }
}

/// Empties the slots of an expert; its weight goes to the other experts of its tokens, in proportion to theirs.
fn switch_off(experts: &mut [u32], weights: &mut [f32], slots: usize, off: u32) {
    for (experts, weights) in experts.chunks_exact_mut(slots).zip(weights.chunks_exact_mut(slots)) {
        if !experts.contains(&off) {
            continue;
        }
        let before: f32 = weights.iter().sum();
        for (expert, weight) in experts.iter_mut().zip(&mut *weights).filter(|(expert, _)| **expert == off) {
            (*expert, *weight) = (EMPTY, 0.0);
        }
        let rest: f32 = weights.iter().sum();
        if rest > 0.0 {
            weights.iter_mut().for_each(|weight| *weight *= before / rest);
        }
    }
}

/// Slots of each expert.
pub(super) fn count(picks: &[u32], experts: usize) -> Vec<u32> {
    let mut load = vec![0; experts];
    for &expert in picks.iter().filter(|&&expert| expert != EMPTY) {
        load[expert as usize] += 1;
    }
    load
}

/// The router's copy of `x`, multiplied by U(1 - jitter, 1 + jitter).
fn jittered(x: &Tensor, jitter: f32, draws: &Draws) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let noise: Vec<f32> = (0..tokens)
        .map(|t| draws.row(Purpose::Jitter, t, width))
        .flat_map(|row| (0..width).map(move |i| 1.0 + jitter * (2.0 * row.uniform(i) - 1.0)))
        .collect();
    Ok((x * Tensor::from_vec(noise, x.shape(), x.device())?)?)
}
