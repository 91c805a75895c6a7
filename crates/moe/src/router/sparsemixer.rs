//! `sparsemixer`: two picks, each weighted by a softmax over the logits that come close to it.
//!
//! First pick i = argmax z; its weight is the softmax at i over the experts j with (z_i - z_j) / max(|z_j|, z_i) ≤ 2ε. Second
//! pick: the same without i (the ones left out are measured against the second greatest). ε is `sparsemixer_eps`; the weights
//! are not normalised. In training each pick is drawn from its softmax; a pick that is not the greatest has its weight cut to a third in three
//! of four cases, and the gradient is that of the softmax (Heun's third-order estimate). Sources: SparseMixer (2310.00811),
//! SparseMixer-v2 (2409.12136), as transformers' `phimoe` has them.

use super::{Choice, RouteInput, Router, gather, only};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::rng::Purpose;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

/// Factor on the weight of a pick whose gradient needs it, and how rarely it is left out.
const CUT: f32 = 0.3333;
const UNCUT: f32 = 0.75;

#[derive(Debug)]
pub(super) struct SparseMixer {
    eps: f32,
}

impl SparseMixer {
    pub(super) fn build(config: &RouterConfig, _experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        only("sparsemixer", "picks two experts", 2, top_k)?;
        Ok(Box::new(Self { eps: config.sparsemixer_eps as f32 }))
    }

    /// The picks \[2\] of token `t`, for each what is added to the logits before its softmax (0 or -∞), and the factor on its weight.
    fn row(&self, t: usize, z: &[f32], input: &RouteInput, masks: [&mut [f32]; 2]) -> [(u32, f32); 2] {
        let mut picks = [(0, 1.0); 2];
        let mut first = None;
        let purposes = [Purpose::Pick, Purpose::Second];
        for (n, mask) in masks.into_iter().enumerate() {
            let left = |j: usize| Some(j) != first;
            let greatest = |value: &dyn Fn(usize) -> f32| {
                (0..z.len()).filter(|j| left(*j)).fold(None, |best: Option<usize>, j| match best {
                    Some(best) if value(j) <= value(best) || value(j).is_nan() => Some(best),
                    _ => Some(j),
                })
            };
            let best = greatest(&|j| z[j]).unwrap_or(0);
            let threshold = z[best];
            for (j, mask) in mask.iter_mut().enumerate() {
                let far = (threshold - z[j]) / z[j].abs().max(threshold) > 2.0 * self.eps;
                *mask = if far || !left(j) { f32::NEG_INFINITY } else { 0.0 };
            }
            let drawn = || {
                // The greatest of z + Gumbel noise is a draw from the softmax.
                let draws = input.draws.row(purposes[n], t, z.len());
                let noise = |j| -draws.exponential(j).ln();
                greatest(&|j| z[j] + mask[j] + noise(j)).unwrap_or(best)
            };
            let pick = match input.forced {
                Some(forced) => forced.get(2 * t + n).map_or(best, |pick| *pick as usize),
                None if input.train => drawn(),
                None => best,
            };
            let uncut =
                !input.train || pick == best || input.draws.row(Purpose::Keep, t, 2).uniform(n) > UNCUT;
            picks[n] = (pick as u32, if uncut { 1.0 } else { CUT });
            // A first pick that was dropped was the greatest, as far as anyone knows.
            first = Some(if pick < z.len() { pick } else { best });
        }
        picks
    }
}

impl Router for SparseMixer {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let (mut first, mut second) = (vec![0.0; tokens * experts], vec![0.0; tokens * experts]);
        let (picks, factors): (Vec<u32>, Vec<f32>) = read(logits, |z| {
            let masks = first.chunks_exact_mut(experts).zip(second.chunks_exact_mut(experts));
            let rows = z.chunks_exact(experts).zip(masks).enumerate();
            rows.flat_map(|(t, (z, (first, second)))| self.row(t, z, input, [first, second])).unzip()
        })?;
        let column = |mask: Vec<f32>, n: usize| -> Result<Tensor> {
            let mask = Tensor::from_vec(mask, (tokens, experts), logits.device())?;
            let pick: Vec<u32> = picks.iter().skip(n).step_by(2).copied().collect();
            gather(&softmax(&(logits + mask)?, D::Minus1)?, &pick, 1)
        };
        let mut weights = Tensor::cat(&[column(first, 0)?, column(second, 1)?], 1)?;
        if factors.iter().any(|factor| *factor != 1.0) {
            // The value is cut, the gradient is that of the whole.
            let cut = Tensor::from_vec(factors, (tokens, 2), logits.device())?;
            let value = weights.detach();
            weights = (weights + ((&value * cut)? - &value)?)?;
        }
        Choice::new(picks, weights, softmax(logits, D::Minus1)?)
    }
}
