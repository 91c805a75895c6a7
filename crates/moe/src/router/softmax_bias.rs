//! `softmax_bias`: softmax scores, and a bias that only the selection sees.
//!
//! p = softmax(z) \[T, E\]; the k greatest p + b are picked, weights p_i / max(Σ picked p, `least_sum`) when `normalize`, else p_i,
//! times `scale`; b \[E\] is no gradient parameter. Source: Ernie 4.5 (transformers' `ernie4_5_moe`, `moe_norm_min`).

use super::select::{Groups, select_biased};
use super::{Choice, RouteInput, Router, gather};
use crate::config::RouterConfig;
use crate::error::Result;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct SoftmaxBias {
    normalize: bool,
    scale: f64,
    least_sum: f32,
    groups: Groups,
}

impl SoftmaxBias {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        let groups = Groups::new(config, 2);
        Ok(Box::new(Self {
            normalize: config.normalize,
            scale: config.scale,
            least_sum: config.least_sum as f32,
            groups,
        }))
    }
}

impl Router for SoftmaxBias {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let scores = softmax(logits, D::Minus1)?;
        let (picks, unbiased) = select_biased(&scores, input, self.groups)?;
        let mut weights = gather(&scores, &picks, input.top_k)?;
        if self.normalize {
            weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?.maximum(self.least_sum)?)?;
        }
        if self.scale != 1.0 {
            weights = (weights * self.scale)?;
        }
        Ok(Choice { experts: picks, weights, scores, unbiased })
    }
}
