//! What the experts of a routing give, and what stands beside them.

use super::route::{Routed, dispatch};
use super::{Ctx, MoeLayer, Routing};
use crate::config::DenseGradient;
use crate::error::Result;
use crate::ops;
use crate::param::Param;
use crate::rng::Purpose;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;
use senmon_kernels::dispatch::{Dispatch, EMPTY};
use std::sync::Arc;

impl MoeLayer {
    /// `y` \[T, L\] of `x` \[T, H\], which the router sees, and `inner` \[T, L\], which the experts do; and whether `y` is added to `onto`
    /// \[T, L\] already.
    pub(super) fn routed(
        &self,
        x: &Tensor,
        inner: &Tensor,
        onto: Option<&Tensor>,
        ctx: &Ctx,
    ) -> Result<(Tensor, Routing, bool)> {
        let Routed { mut routing, dispatch, weighs_input } = self.route_all(x, &self.logits(x, ctx)?, ctx)?;
        let running = ctx.train && ctx.wants.dense_gradient == DenseGradient::Ema;
        let mut added = false;
        let mut y = if weighs_input || ctx.wants.distance || running {
            let out = self.by_slot(inner, &routing, weighs_input, ctx)?;
            if ctx.wants.distance {
                routing.terms.push(("distill", distance(&out, &routing, self.config.experts)?));
            }
            if running {
                let experts = routing.experts.iter().map(|e| *e as usize);
                let width = inner.dim(1)?;
                read(&out.flatten_all()?, |out| self.running.add(experts, out, width, self.config.experts))?;
            }
            match weighs_input {
                true => out.sum(1)?,
                false => out.broadcast_mul(&routing.weights.unsqueeze(2)?)?.sum(1)?,
            }
        } else {
            let more = ctx.train && ctx.wants.dense_gradient != DenseGradient::None;
            let onto = onto.filter(|_| !more);
            added = onto.is_some();
            self.experts(inner, Some(&routing.weights), &dispatch, dispatch.slots, onto, ctx)?
        };
        if ctx.train {
            y = match ctx.wants.dense_gradient {
                DenseGradient::None => y,
                DenseGradient::StraightThrough => (y + self.straight_through(inner, &routing)?)?,
                DenseGradient::Ema => match self.running.values() {
                    None => y,
                    Some(means) => {
                        let means =
                            Tensor::from_vec(means, (self.config.experts, inner.dim(1)?), y.device())?;
                        (y + self.unpicked(&routing)?.1.matmul(&means)?)?
                    }
                },
            };
        }
        Ok((y, routing, added))
    }

    /// What each row \[N, L\] gets from the expert that `dispatch` (of one slot a row) sends it to: \[N, L\]; `slots` rows are of one token.
    pub(super) fn outputs(
        &self,
        rows: &Tensor,
        dispatch: &Arc<Dispatch>,
        slots: usize,
        ctx: &Ctx,
    ) -> Result<Tensor> {
        self.experts(rows, None, dispatch, slots, None, ctx)
    }

    /// The experts' MLPs on `x` \[T, L\], their outputs weighted and summed by token: \[T, L\]; added to `onto`, if there is one.
    /// `slots` of the dispatch are of one token.
    fn experts(
        &self,
        x: &Tensor,
        weights: Option<&Tensor>,
        dispatch: &Arc<Dispatch>,
        slots: usize,
        onto: Option<&Tensor>,
        ctx: &Ctx,
    ) -> Result<Tensor> {
        let (s, p) = (self.config.expert_shape(), &self.params);
        let biases = p.expert_biases.as_ref();
        if !self.drops_out(ctx) {
            return Ok(ops::experts(x, &p.gate_up, &p.down, biases, weights, dispatch, s, onto)?);
        }
        let a = ops::gated_up(x, &p.gate_up, biases.map(|b| &b.0), dispatch, s)?;
        let a = self.dropout(a, dispatch, slots, ctx)?;
        let bias = biases.map(|b| &b.1);
        let y = match weights {
            Some(weights) => ops::down_combine(&a, &p.down, bias, weights, dispatch, s)?,
            None => ops::down(&a, &p.down, bias, dispatch, s)?,
        };
        Ok(ops::added(y, onto)?)
    }

    /// Inner activations are set to 0 by chance.
    fn drops_out(&self, ctx: &Ctx) -> bool {
        ctx.train && self.config.router.expert_dropout > 0.0
    }

    /// What each slot's expert gives, before its weight: \[T, slots, L\]; 0 in slots without one. With `weighs_input` it is given the token times
    /// the weight.
    fn by_slot(&self, inner: &Tensor, routing: &Routing, weighs_input: bool, ctx: &Ctx) -> Result<Tensor> {
        let (tokens, width) = inner.dims2()?;
        let slots = routing.top_k;
        let mut rows = inner.unsqueeze(1)?.broadcast_as((tokens, slots, width))?;
        if weighs_input {
            rows = rows.broadcast_mul(&routing.weights.unsqueeze(2)?)?;
        }
        let rows = rows.contiguous()?.reshape((tokens * slots, width))?;
        let dispatch = dispatch(&routing.experts, 1, &self.config)?;
        Ok(self.outputs(&rows, &dispatch, slots, ctx)?.reshape((tokens, slots, width))?)
    }

    /// Shows an observer that asks for it what every expert gives for some rows of `inner` \[T, L\].
    pub(super) fn show_outputs(&self, inner: &Tensor, ctx: &mut Ctx) -> Result<()> {
        let (layer, experts) = (ctx.layer, self.config.experts);
        let (tokens, width) = inner.dims2()?;
        let rows = match &mut ctx.observer {
            Some(observer) => observer.probes(layer, tokens),
            None => return Ok(()),
        };
        if rows.is_empty() {
            return Ok(());
        }
        let count = rows.len();
        let rows = inner.detach().index_select(&Tensor::from_vec(rows, count, inner.device())?, 0)?;
        let each = rows.unsqueeze(1)?.broadcast_as((count, experts, width))?.contiguous()?;
        let picks: Vec<u32> = (0..count).flat_map(|_| 0..experts as u32).collect();
        let dispatch = dispatch(&picks, 1, &self.config)?;
        let out = self.outputs(&each.reshape((count * experts, width))?, &dispatch, experts, ctx)?;
        read(&out.flatten_all()?, |out| {
            if let Some(observer) = &mut ctx.observer {
                observer.outputs(layer, count, experts, out);
            }
        })?;
        Ok(())
    }

    /// Sets a share of the inner activations \[N, I\] to 0, and scales the others up. `slots` of the dispatch are of one token.
    fn dropout(&self, a: Tensor, dispatch: &Dispatch, slots: usize, ctx: &Ctx) -> Result<Tensor> {
        let share = self.config.router.expert_dropout;
        let (_, width) = a.dims2()?;
        let tokens = dispatch.tokens * dispatch.slots / slots.max(1);
        let (draws, keep) = (self.draws(ctx, tokens), (1.0 / (1.0 - share)) as f32);
        // By token and expert: how many slots a token has plays no part.
        let experts = dispatch.experts();
        let rows = (0..experts).flat_map(|e| dispatch.rows_of(e).map(move |row| (e, row)));
        let factors: Vec<f32> = rows
            .flat_map(|(e, row)| {
                let token = dispatch.slot_of_row[row] as usize / slots;
                let draws = draws.row(Purpose::Dropout, token, experts * width);
                let draw = move |i| f64::from(draws.uniform(e * width + i));
                (0..width).map(move |i| if draw(i) < share { 0.0 } else { keep })
            })
            .collect();
        Ok((&a * Tensor::from_vec(factors, a.shape(), a.device())?)?)
    }

    /// The real experts that each token did not pick, \[T, E\], [`EMPTY`] in the place of those that it did, and of all for padding; and their scores less
    /// themselves: 0, with their gradient, \[T, E\].
    fn unpicked(&self, routing: &Routing) -> Result<(Vec<u32>, Tensor)> {
        let (tokens, _) = routing.scores.dims2()?;
        let experts = self.config.experts;
        let mut others: Vec<u32> = (0..tokens).flat_map(|_| 0..experts as u32).collect();
        for (slot, pick) in routing.picked.iter().enumerate().filter(|(_, pick)| (**pick as usize) < experts)
        {
            others[slot / routing.top_k * experts + *pick as usize] = EMPTY;
        }
        if let Some(mask) = &routing.mask {
            let rows = others.chunks_exact_mut(experts).zip(mask).filter(|(_, counts)| !**counts);
            rows.for_each(|(row, _)| row.fill(EMPTY));
        }
        let scale = self.config.router.scale as f32;
        let open = others.iter().map(|e| if *e == EMPTY { 0.0 } else { scale }).collect::<Vec<_>>();
        let scores = routing.scores.narrow(1, 0, experts)?;
        let open = Tensor::from_vec(open, (tokens, experts), scores.device())?;
        Ok((others, ((&scores - scores.detach())? * open)?))
    }

    /// 0, \[T, L\], with the gradient that the router would have if the experts that were not picked had been weighed by their scores (DenseMixer).
    fn straight_through(&self, inner: &Tensor, routing: &Routing) -> Result<Tensor> {
        let (others, weights) = self.unpicked(routing)?;
        let dispatch = dispatch(&others, self.config.experts, &self.config)?;
        let s = self.config.expert_shape();
        let frozen = |param: &Param| Param::new(param.name(), param.tensor().detach());
        let a = ops::gated_up(&inner.detach(), &frozen(&self.params.gate_up), None, &dispatch, s)?;
        Ok(ops::down_combine(&a, &frozen(&self.params.down), None, &weights, &dispatch, s)?)
    }

    /// Adds to `y` \[T, H\] what the experts that compute nothing give, and mixes it with the dense MLP beside the experts.
    pub(super) fn beyond(&self, mut y: Tensor, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        let (extras, e) = (&self.config.extras, self.config.experts);
        let first = e + extras.zero;
        let weight_of = |ids: std::ops::Range<usize>| -> Result<Tensor> {
            let is: Vec<f32> = routing
                .experts
                .iter()
                .map(|pick| f32::from(u8::from(ids.contains(&(*pick as usize)))))
                .collect();
            let is = Tensor::from_vec(is, routing.weights.shape(), x.device())?;
            Ok((&routing.weights * is)?.sum_keepdim(1)?)
        };
        if extras.identity > 0 {
            y = (y + x.broadcast_mul(&weight_of(first..first + extras.identity)?)?)?;
        }
        let constants = self.params.extra("constant.values").zip(self.params.extra("constant.mix"));
        if let Some((values, mix)) = constants {
            let n = extras.constant;
            let first = first + extras.identity;
            let weights = (0..n).map(|j| weight_of(first + j..first + j + 1)).collect::<Result<Vec<_>>>()?;
            let weights = Tensor::cat(&weights, 1)?;
            let alpha = softmax(&ops::linear(x, mix)?.reshape(((), n, 2))?, D::Minus1)?;
            let of =
                |which: usize| -> Result<Tensor> { Ok((&weights * alpha.narrow(2, which, 1)?.squeeze(2)?)?) };
            y = (y + x.broadcast_mul(&of(0)?.sum_keepdim(1)?)?)?;
            y = (y + ops::linear(&of(1)?, values)?)?;
        }
        if let (Some(up), Some(down), Some(mix), Some(bias)) = (
            self.params.extra("residual.gate_up"),
            self.params.extra("residual.down"),
            self.params.extra("residual.mix"),
            self.params.extra("residual.mix_bias"),
        ) {
            let dense = ops::mlp(x, up, down, self.config.residual_shape())?;
            let mix = softmax(&ops::linear(x, mix)?.broadcast_add(&ops::watched(bias)?)?, D::Minus1)?;
            y = (y.broadcast_mul(&mix.narrow(1, 0, 1)?)? + dense.broadcast_mul(&mix.narrow(1, 1, 1)?)?)?;
        }
        Ok(y)
    }
}

/// Mean over tokens of the mean over pairs of a token's experts of the squared distance of their outputs \[T, slots, L\], by element.
fn distance(out: &Tensor, routing: &Routing, experts: usize) -> Result<Tensor> {
    let (tokens, slots, width) = out.dims3()?;
    let real: Vec<f32> =
        routing.experts.iter().map(|e| f32::from(u8::from((*e as usize) < experts))).collect();
    let numbers: Vec<f32> = real.chunks_exact(slots).map(|row| row.iter().sum()).collect();
    // Over n(n - 1)/2 pairs Σ|a - b|² is n·Σ|a|² - |Σa|².
    let factor = |n: &f32| if *n > 1.0 { 2.0 / (n * (n - 1.0)) / width as f32 } else { 0.0 };
    let factors: Vec<f32> = numbers.iter().map(factor).collect();
    let column = |values: Vec<f32>| Tensor::from_vec(values, (tokens, 1), out.device());
    let out = out.broadcast_mul(&Tensor::from_vec(real, (tokens, slots, 1), out.device())?)?;
    let squares = out.sqr()?.sum(D::Minus1)?.sum_keepdim(1)?.mul(&column(numbers)?)?;
    let pairs = (squares - out.sum(1)?.sqr()?.sum_keepdim(1)?)?;
    Ok((pairs.mul(&column(factors)?)?.sum_all()? / routing.counted.max(1) as f64)?)
}
