//! Independent or joint scores, and a bias that only the selection sees: `sigmoid_bias`, `softmax_bias` and `sqrt_softplus`.
//!
//! s = σ(z), softmax(z) or sqrt(softplus(z)), \[T, E\]; the k greatest s + b are picked; weights s_i · scale, when `normalize` over
//! (Σ picked s + 1e-20), for `softmax_bias` over max(Σ picked s, `least_sum`). b \[E\] is no gradient parameter: `balance.bias_rate`
//! and `balance.quantile` move it. Groups are ranked by the sum of their two greatest s + b; the others are masked with -inf. Sources:
//! DeepSeek-V3 (2412.19437), loss-free balancing (2408.15664), transformers' `dots1`; Ernie 4.5 (transformers' `ernie4_5_moe`,
//! `moe_norm_min`); DeepSeek-V4.

use super::select::{Groups, select_biased};
use super::{Choice, RouteInput, Router, gather, normalized, scaled};
use crate::config::RouterConfig;
use crate::error::Result;
use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};

/// Scores of a group that its rank counts.
const BEST_OF_GROUP: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Score {
    Sigmoid,
    Softmax,
    SqrtSoftplus,
}

#[derive(Debug)]
pub(super) struct Scored {
    score: Score,
    normalize: bool,
    scale: f64,
    least_sum: f32,
    groups: Groups,
}

impl Scored {
    fn of(score: Score, config: &RouterConfig) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self {
            score,
            normalize: config.normalize,
            scale: config.scale,
            least_sum: config.least_sum as f32,
            groups: Groups::new(config, BEST_OF_GROUP),
        }))
    }

    pub(super) fn sigmoid(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Self::of(Score::Sigmoid, config)
    }

    pub(super) fn softmax(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Self::of(Score::Softmax, config)
    }

    pub(super) fn sqrt_softplus(
        config: &RouterConfig,
        _experts: usize,
        _top_k: usize,
    ) -> Result<Box<dyn Router>> {
        Self::of(Score::SqrtSoftplus, config)
    }
}

/// ln(1 + e^x), without overflow, and to the last bits where it is near 0.
pub(crate) fn softplus(x: &Tensor) -> Result<Tensor> {
    // ln(1 + u) = 2·artanh(u / (2 + u)), of which the series converges fast for u = e^-|x|, at most 1.
    let u = x.abs()?.neg()?.exp()?;
    let s = (&u / (&u + 2.0)?)?;
    let square = s.sqr()?;
    let mut series = square.affine(1.0 / 15.0, 1.0 / 13.0)?;
    for n in [11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = ((series * &square)? + 1.0 / n)?;
    }
    Ok((x.relu()? + (s * series)?.affine(2.0, 0.0)?)?)
}

/// The root of [`softplus`], with a gradient of 0 where that is as good as 0.
pub(super) fn sqrt_softplus(x: &Tensor) -> Result<Tensor> {
    Ok(softplus(x)?.maximum(1e-30f32)?.sqrt()?)
}

impl Router for Scored {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let s = match self.score {
            Score::Sigmoid => sigmoid(logits)?,
            Score::Softmax => softmax(logits, D::Minus1)?,
            Score::SqrtSoftplus => sqrt_softplus(logits)?,
        };
        let (picks, unbiased) = select_biased(&s, input, self.groups)?;
        let mut weights = gather(&s, &picks, input.top_k)?;
        let joint = matches!(self.score, Score::Softmax);
        if self.normalize {
            weights = match joint {
                true => normalized(weights, self.least_sum)?,
                false => weights.broadcast_div(&(weights.sum_keepdim(D::Minus1)? + 1e-20)?)?,
            };
        }
        let selection = Some(s.detach());
        let scores = match joint {
            true => s,
            false => s.broadcast_div(&(s.sum_keepdim(D::Minus1)? + 1e-20)?)?,
        };
        Ok(Choice { unbiased, selection, ..Choice::new(picks, scaled(weights, self.scale)?, scores)? })
    }
}
