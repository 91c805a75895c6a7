//! `gshard`: a first expert and, by chance, a second.
//!
//! g = softmax(z); first = argmax g, second = argmax of the others; both divided by their sum. In training the second is kept with
//! probability min(1, g₂ / `second_threshold`), g₂ after the division; g₁ stays as it is when the second is left out.
//! `second = "gumbel"`: the second is the argmax of z plus Gumbel noise, and always kept; `"greedy"`: always kept. Not in training: greedy.
//! Sources: GShard (2006.16668, algorithm 1: threshold 0.5), Mesh TensorFlow (0.2), DeepSpeed's `top2gating` (gumbel, with
//! `normalize_after_drop`).

use super::{Choice, RouteInput, Router, gather, normalized, only, scaled};
use crate::config::{RouterConfig, Second};
use crate::error::{MoeError, Result};
use crate::rng::Purpose;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;
use senmon_kernels::dispatch::EMPTY;

#[derive(Debug)]
pub(super) struct GShard {
    second: Second,
    threshold: f32,
    normalize: bool,
    scale: f64,
}

impl GShard {
    pub(super) fn build(config: &RouterConfig, _experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        only("gshard", "picks two experts", 2, top_k)?;
        if config.second == Second::Threshold && config.normalize_after_drop {
            let what = "router.normalize_after_drop goes with router.second = \"gumbel\" or \"greedy\": with \"threshold\" the first weight \
                        stays as it is when the second is left out"
                .into();
            return Err(MoeError::Config { what });
        }
        Ok(Box::new(Self {
            second: config.second,
            threshold: config.second_threshold as f32,
            normalize: config.normalize,
            scale: config.scale,
        }))
    }

    /// First and second of each token.
    fn pick(&self, z: &[f32], experts: usize, input: &RouteInput) -> Vec<u32> {
        let (mut picks, mut noisy) = (Vec::with_capacity(z.len() / experts * 2), Vec::with_capacity(experts));
        for (t, row) in z.chunks_exact(experts).enumerate() {
            let start = picks.len();
            super::top_k(row, 2, |_| true, &mut picks);
            if input.train && self.second == Second::Gumbel {
                let first = picks[start];
                picks.truncate(start + 1);
                noisy.clear();
                let draws = input.draws.row(Purpose::Noise, t, experts);
                noisy.extend(row.iter().enumerate().map(|(e, z)| z + draws.gumbel(e)));
                super::top_k(&noisy, 1, |e| e as u32 != first, &mut picks);
            }
        }
        picks
    }
}

/// The picks with the second greatest in the place of seconds that are empty.
fn with_seconds(z: &[f32], experts: usize, forced: &[u32]) -> Vec<u32> {
    let (mut pairs, mut second) = (forced.to_vec(), Vec::with_capacity(2));
    for (row, pair) in z.chunks_exact(experts).zip(pairs.chunks_exact_mut(2)) {
        if pair[0] != EMPTY && pair[1] == EMPTY {
            second.clear();
            super::top_k(row, 1, |e| e as u32 != pair[0], &mut second);
            pair[1] = second.first().copied().unwrap_or(EMPTY);
        }
    }
    pairs
}

impl Router for GShard {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (_, experts) = logits.dims2()?;
        let scores = softmax(logits, D::Minus1)?;
        let mut picks = match input.forced {
            Some(forced) => forced.to_vec(),
            None => read(logits, |z| self.pick(z, experts, input))?,
        };
        // A second that was left out counts in the sum of a pass that is repeated, as it did.
        let pairs = match input.forced {
            Some(forced) if self.second == Second::Threshold => {
                read(logits, |z| with_seconds(z, experts, forced))?
            }
            _ => picks.clone(),
        };
        let mut weights = gather(&scores, &pairs, 2)?;
        if self.normalize {
            weights = normalized(weights, f32::EPSILON)?;
        }
        if input.train && input.forced.is_none() && self.second == Second::Threshold {
            read(&weights, |weights| {
                for (t, (pair, slots)) in weights.chunks_exact(2).zip(picks.chunks_exact_mut(2)).enumerate() {
                    let u = input.draws.row(Purpose::Noise, t, experts).uniform(0);
                    if pair[1] / self.threshold <= u {
                        slots[1] = EMPTY;
                    }
                }
            })?;
        }
        if pairs != picks {
            let kept: Vec<f32> = picks.iter().map(|e| f32::from(u8::from(*e != EMPTY))).collect();
            weights = (&weights * Tensor::from_vec(kept, weights.shape(), weights.device())?)?;
        }
        Choice::new(picks, scaled(weights, self.scale)?, scores)
    }
}
