//! `sigmoid_bias`: independent scores, and a bias that balances the load without a loss.
//!
//! s = σ(z) \[T, E\]; the k greatest s + b are picked, weights s_i / (Σ picked s + 1e-20) · scale; b \[E\] is no gradient
//! parameter: `balance.bias_rate` moves it. Groups are ranked by the sum of their two greatest s + b; the others are
//! masked with -inf. Source: DeepSeek-V3 (2412.19437), loss-free balancing (2408.15664), transformers' `dots1`.

use super::select::{Groups, select_biased};
use super::{Choice, RouteInput, Router, gather};
use crate::config::RouterConfig;
use crate::error::Result;
use candle_core::{D, Tensor};
use candle_nn::ops::sigmoid;

/// Scores of a group that its rank counts.
const BEST_OF_GROUP: usize = 2;

#[derive(Debug)]
pub(super) struct SigmoidBias {
    normalize: bool,
    scale: f64,
    groups: Groups,
}

impl SigmoidBias {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        let groups = Groups::new(config, BEST_OF_GROUP);
        Ok(Box::new(Self { normalize: config.normalize, scale: config.scale, groups }))
    }
}

impl Router for SigmoidBias {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let s = sigmoid(logits)?;
        let (picks, unbiased) = select_biased(&s, input, self.groups)?;
        let mut weights = gather(&s, &picks, input.top_k)?;
        if self.normalize {
            weights = weights.broadcast_div(&(weights.sum_keepdim(D::Minus1)? + 1e-20)?)?;
        }
        if self.scale != 1.0 {
            weights = (weights * self.scale)?;
        }
        let scores = s.broadcast_div(&(s.sum_keepdim(D::Minus1)? + 1e-20)?)?;
        Ok(Choice { experts: picks, weights, scores, unbiased })
    }
}
