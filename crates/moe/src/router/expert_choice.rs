//! `expert_choice`: experts choose.
//!
//! p = softmax(z) over the experts; each expert takes the C = ⌈`capacity`·K·T/E⌉ tokens with the greatest p for it (`capacity` 0 is 1), out of those that are
//! routed together; weight p. A token may have many experts or none; slots are as many as some token needs. Not causal. Source: Zhou et al. 2022 (2202.09368).

use super::{Choice, RouteInput, Router, gather, ragged, scaled, slots_of};
use crate::capacity;
use crate::config::RouterConfig;
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct ExpertChoice {
    capacity: f64,
    least: usize,
    scale: f64,
}

impl ExpertChoice {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        let capacity = if config.capacity == 0.0 { 1.0 } else { config.capacity };
        Ok(Box::new(Self { capacity, least: config.min_capacity, scale: config.scale }))
    }
}

impl Router for ExpertChoice {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let scores = softmax(logits, D::Minus1)?;
        let (picks, slots) = match input.forced {
            Some(forced) => (forced.to_vec(), slots_of(forced, tokens)),
            None => read(&scores, |scores| {
                let mut rows = vec![Vec::new(); tokens];
                for group in input.groups(tokens) {
                    let members: Vec<usize> = group.filter(|t| input.counts(*t)).collect();
                    let c = capacity::places(self.capacity, input.top_k, members.len(), experts, self.least);
                    for e in 0..experts {
                        let mut order = members.clone();
                        // Stable: of two as willing the first.
                        order.sort_by(|a, b| scores[b * experts + e].total_cmp(&scores[a * experts + e]));
                        order.iter().take(c).for_each(|t| rows[*t].push(e as u32));
                    }
                }
                for (t, row) in rows.iter_mut().enumerate() {
                    let p = |e: &u32| scores[t * experts + *e as usize];
                    row.sort_by(|a, b| p(b).total_cmp(&p(a)));
                }
                ragged(&rows)
            })?,
        };
        let weights = scaled(gather(&scores, &picks, slots)?, self.scale)?;
        Choice::new(picks, weights, scores)
    }
}
