//! `soft`: slots that are means of tokens.
//!
//! Logits \[T, E·s\] of normalised tokens and slots, times a learned factor. Dispatch D = softmax over the tokens that are mixed together, combine C = softmax over
//! the slots; slot j of expert i works on Σ_t D_tj·x_t, and a token gets Σ_j C_tj·(what slot j gives). Everything has a gradient and no token is dropped; not
//! causal. As a [`Choice`] it shows the K experts that a token takes most from; the layer itself uses [`mix`]. Source: Soft MoE (2308.00951).

use super::{Choice, RouteInput, Router, gather};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct Soft {
    experts: usize,
}

impl Soft {
    pub(super) fn build(_config: &RouterConfig, experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { experts }))
    }
}

/// Slots of each expert, s.
pub(crate) fn slots(config: &RouterConfig) -> usize {
    config.slots.max(1)
}

/// Dispatch and combine weights, \[G, n, E·s\] each, of `logits` \[G·n, E·s\] in G groups of tokens; tokens that do not count (`mask` \[T\]) are in no slot.
pub(crate) fn mix(logits: &Tensor, groups: usize, mask: Option<&[bool]>) -> Result<(Tensor, Tensor)> {
    let (tokens, slots) = logits.dims2()?;
    let grouped = logits.reshape((groups, tokens / groups.max(1), slots))?;
    let combine = softmax(&grouped, D::Minus1)?;
    let seen = match mask {
        None => grouped.clone(),
        Some(mask) => {
            let out: Vec<f32> = mask.iter().map(|counts| if *counts { 0.0 } else { f32::MIN }).collect();
            let out = Tensor::from_vec(out, (groups, tokens / groups.max(1), 1), logits.device())?;
            grouped.broadcast_add(&out)?
        }
    };
    Ok((softmax(&seen, 1)?, combine))
}

impl Router for Soft {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, columns) = logits.dims2()?;
        let combine = softmax(logits, D::Minus1)?;
        let scores = combine.reshape((tokens, self.experts, columns / self.experts))?.sum(D::Minus1)?;
        let picks = match input.forced {
            Some(forced) => forced.to_vec(),
            None => read(&scores, |scores| {
                let mut picks = Vec::with_capacity(tokens * input.top_k);
                scores
                    .chunks_exact(self.experts)
                    .for_each(|row| super::top_k(row, input.top_k, |_| true, &mut picks));
                picks
            })?,
        };
        let weights = gather(&scores, &picks, input.top_k)?;
        Choice::new(picks, weights, scores)
    }
}
