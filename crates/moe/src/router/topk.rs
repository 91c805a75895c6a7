//! Routers that take the k greatest logits: `topk_pre`, `topk_post`, `switch` and `sigmoid_input`.
//!
//! z = logits \[T, E\], p = softmax(z). `topk_pre`: the k greatest p, weights p_i, divided by their sum when `normalize`;
//! `topk_post`: the k greatest z, weights softmax over them; `switch`: k = 1, weight p; `sigmoid_input`: the k greatest z, and
//! σ(z_i) multiplies what expert i is given (Llama 4). Groups are ranked by their greatest p (DeepSeek-V2).

use super::select::{Groups, select};
use super::{Choice, RouteInput, Router, TINY, gather, normalized, only, scaled};
use crate::config::{GroupMask, RouterConfig};
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};

#[derive(Clone, Copy, Debug)]
enum Weights {
    /// p_i.
    Probability,
    /// p_i over the sum of the picked.
    Normalized,
    /// softmax over the picked logits.
    Picked,
    /// σ(z_i), for the input.
    Sigmoid,
}

/// A router by the greatest logits.
#[derive(Debug)]
pub(super) struct TopK {
    weights: Weights,
    scale: f64,
    groups: Groups,
    by_score: bool,
}

impl TopK {
    fn of(weights: Weights, config: &RouterConfig) -> Result<Box<dyn Router>> {
        let (groups, by_score) = (Groups::new(config, 1), config.group_mask == GroupMask::Zero);
        Ok(Box::new(Self { weights, scale: config.scale, groups, by_score }))
    }

    pub(super) fn pre(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Self::of(if config.normalize { Weights::Normalized } else { Weights::Probability }, config)
    }

    pub(super) fn post(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Self::of(Weights::Picked, config)
    }

    pub(super) fn switch(config: &RouterConfig, _experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        only("switch", "has one expert per token", 1, top_k)?;
        Self::of(Weights::Probability, config)
    }

    pub(super) fn sigmoid_input(
        config: &RouterConfig,
        _experts: usize,
        _top_k: usize,
    ) -> Result<Box<dyn Router>> {
        Self::of(Weights::Sigmoid, config)
    }
}

/// Softmax over the picked logits: \[T, slots\]; 0 in empty slots.
pub(super) fn picked_softmax(logits: &Tensor, picks: &[u32], slots: usize) -> Result<Tensor> {
    let picked = gather(logits, picks, slots)?;
    let experts = logits.dim(1)? as u32;
    if picks.iter().all(|&e| e < experts) {
        return Ok(softmax(&picked, D::Minus1)?);
    }
    let out: Vec<f32> = picks.iter().map(|&e| if e < experts { 0.0 } else { f32::NEG_INFINITY }).collect();
    let out = Tensor::from_vec(out, picked.shape(), picked.device())?;
    // A row with nothing in it is 0, not 0/0.
    let greatest = (&picked + &out)?.max_keepdim(D::Minus1)?.maximum(f32::MIN)?.detach();
    let exp = (picked + out)?.broadcast_sub(&greatest)?.exp()?;
    normalized(exp, TINY)
}

impl Router for TopK {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (_, experts) = logits.dims2()?;
        let scores = softmax(logits, D::Minus1)?;
        let picks = match input.forced {
            Some(forced) => forced.to_vec(),
            // The order of p is that of z, but rounding may tie what z tells apart; a mask of 0 is one for p alone.
            None => read(if self.by_score { &scores } else { logits }, |z| {
                select(z, experts, input.top_k, self.groups)
            })?,
        };
        let weights = match self.weights {
            Weights::Probability => gather(&scores, &picks, input.top_k)?,
            Weights::Normalized => {
                let least = if input.forced.is_some() { TINY } else { 0.0 };
                normalized(gather(&scores, &picks, input.top_k)?, least)?
            }
            Weights::Picked => picked_softmax(logits, &picks, input.top_k)?,
            Weights::Sigmoid => sigmoid(&gather(logits, &picks, input.top_k)?)?,
        };
        let mut choice = Choice::new(picks, scaled(weights, self.scale)?, scores)?;
        choice.weighs_input = matches!(self.weights, Weights::Sigmoid);
        Ok(choice)
    }
}
