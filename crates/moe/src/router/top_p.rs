//! `top_p`: as many experts as a token needs.
//!
//! p = softmax(z), sorted; the fewest whose sum reaches `p`, K at most; weights p_i, over the sum of the picked when `normalize`. The
//! coefficient `balance.entropy` keeps the router from picking all. Source: Huang et al., "Harder Tasks Need More Experts",
//! ACL 2024 (2403.07652).

use super::{Choice, RouteInput, Router, TINY, gather, normalized, ragged, scaled, slots_of};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct TopP {
    p: f32,
    normalize: bool,
    scale: f64,
}

impl TopP {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { p: config.p as f32, normalize: config.normalize, scale: config.scale }))
    }
}

impl Router for TopP {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let scores = softmax(logits, D::Minus1)?;
        let (picks, slots) = match input.forced {
            Some(forced) => (forced.to_vec(), slots_of(forced, tokens)),
            None => read(&scores, |scores| {
                let rows: Vec<Vec<u32>> = scores
                    .chunks_exact(experts)
                    .map(|row| {
                        let mut picks = Vec::with_capacity(input.top_k + 1);
                        super::top_k(row, input.top_k, |_| true, &mut picks);
                        let mut sum = 0.0;
                        let enough = picks.iter().position(|e| {
                            sum += row[*e as usize];
                            sum >= self.p
                        });
                        picks.truncate(enough.map_or(input.top_k, |last| last + 1));
                        picks
                    })
                    .collect();
                ragged(&rows)
            })?,
        };
        let mut weights = gather(&scores, &picks, slots)?;
        if self.normalize {
            weights = normalized(weights, TINY)?;
        }
        Choice::new(picks, scaled(weights, self.scale)?, scores)
    }
}
