//! Softmax routers: `topk_pre`, `topk_post` and `switch`.
//!
//! z = logits \[T, E\], p = softmax(z). `topk_pre`: the k greatest p, weights p_i, divided by their sum when `normalize`;
//! `topk_post`: the k greatest z, weights softmax over them; `switch`: k = 1, weight p. Groups are ranked by their
//! greatest p (DeepSeek-V2).

use super::select::{Groups, select};
use super::{Choice, RouteInput, Router, gather};
use crate::config::{GroupMask, RouterConfig};
use crate::error::{MoeError, Result};
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Clone, Copy, Debug)]
enum Weights {
    /// p_i.
    Probability,
    /// p_i over the sum of the picked.
    Normalized,
    /// softmax over the picked logits.
    Picked,
}

/// A softmax router.
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
        if top_k != 1 {
            let what = format!("router.kind = \"switch\" has one expert per token; experts.top_k is {top_k}");
            return Err(MoeError::Config { what });
        }
        Self::of(Weights::Probability, config)
    }
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
                let picked = gather(&scores, &picks, input.top_k)?;
                picked.broadcast_div(&picked.sum_keepdim(D::Minus1)?)?
            }
            Weights::Picked => softmax(&gather(logits, &picks, input.top_k)?, D::Minus1)?,
        };
        let weights = if self.scale == 1.0 { weights } else { (weights * self.scale)? };
        Ok(Choice { experts: picks, weights, scores, unbiased: None })
    }
}
