//! `sigmoid_bias`: independent scores, and a bias that balances the load without a loss.
//!
//! s = σ(z) \[T, E\]; the k greatest s + b are picked, weights s_i / (Σ picked s + 1e-20) · scale; b \[E\] is no gradient
//! parameter: `balance.bias_rate` moves it. Groups are ranked by the sum of their two greatest s + b; the others are
//! masked with -inf. Source: DeepSeek-V3 (2412.19437), loss-free balancing (2408.15664), transformers' `dots1`.

use super::select::select;
use super::{Choice, RouteInput, Router, gather};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::sigmoid;

/// Scores of a group that its rank counts.
const BEST_OF_GROUP: usize = 2;

#[derive(Debug)]
pub(super) struct SigmoidBias {
    normalize: bool,
    scale: f64,
    groups: (usize, usize),
}

impl SigmoidBias {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        let groups = (config.groups, config.top_groups);
        Ok(Box::new(Self { normalize: config.normalize, scale: config.scale, groups }))
    }
}

impl Router for SigmoidBias {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (_, experts) = logits.dims2()?;
        let s = sigmoid(logits)?;
        let (groups, top) = self.groups;
        let groups = Some((groups, top, BEST_OF_GROUP));
        let pick = |scores: &[f32]| select(scores, experts, input.top_k, groups);
        let (picks, unbiased) = match (input.forced, input.bias) {
            (Some(forced), _) => (forced.to_vec(), None),
            (None, Some(bias)) => read(&s, |s| {
                let biased: Vec<f32> = s
                    .chunks_exact(experts)
                    .flat_map(|row| row.iter().zip(bias).map(|(s, b)| s + b))
                    .collect();
                (pick(&biased), Some(pick(s)))
            })?,
            (None, None) => (read(&s, pick)?, None),
        };
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
