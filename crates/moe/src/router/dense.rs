//! `dense`: every expert, the classical mixture. Weights softmax(z), K = E. Sources: Jacobs et al. 1991, Jordan & Jacobs 1994.

use super::{Choice, RouteInput, Router, scaled};
use crate::config::RouterConfig;
use crate::error::Result;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct Dense {
    scale: f64,
}

impl Dense {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { scale: config.scale }))
    }
}

impl Router for Dense {
    fn choose(&self, logits: &Tensor, _input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let scores = softmax(logits, D::Minus1)?;
        let all = (0..tokens).flat_map(|_| 0..experts as u32).collect();
        Choice::new(all, scaled(scores.clone(), self.scale)?, scores)
    }
}
