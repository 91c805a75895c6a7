//! `sparsemixer`: two picks, each weighted by a softmax over the logits that come close to it.
//!
//! First pick i = argmax z; its weight is the softmax at i over the experts j with (z_i - z_j) / max(|z_j|, z_i) ≤ 2ε. Second
//! pick: the same without i (the ones left out are measured against the second greatest). ε is `sparsemixer_eps`; the weights
//! are not normalised. This is the evaluation form of SparseMixer (2310.00811, 2409.12136), as transformers' `phimoe` has it.

use super::{Choice, RouteInput, Router, gather};
use crate::config::RouterConfig;
use crate::error::{MoeError, Result};
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct SparseMixer {
    eps: f32,
}

impl SparseMixer {
    pub(super) fn build(config: &RouterConfig, _experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        if top_k != 2 {
            let what = format!("router.kind = \"sparsemixer\" picks two experts; experts.top_k is {top_k}");
            return Err(MoeError::Config { what });
        }
        Ok(Box::new(Self { eps: config.sparsemixer_eps as f32 }))
    }

    /// The picks \[2\] of a row, and for each what is added to the logits before its softmax: 0 or -∞.
    fn row(&self, z: &[f32], forced: Option<&[u32]>, masks: [&mut [f32]; 2]) -> [u32; 2] {
        let mut picks: [u32; 2] = [0; 2];
        let mut first = None;
        for (n, mask) in masks.into_iter().enumerate() {
            let left = |j: usize| Some(j) != first;
            let pick = match forced {
                Some(forced) => forced[n] as usize,
                None => (0..z.len())
                    .filter(|&j| left(j))
                    .fold(None, |best: Option<usize>, j| match best {
                        Some(best) if z[j] <= z[best] || z[j].is_nan() => Some(best),
                        _ => Some(j),
                    })
                    .unwrap_or(0),
            };
            let threshold = z.get(pick).copied().unwrap_or(0.0);
            for (j, mask) in mask.iter_mut().enumerate() {
                let far = (threshold - z[j]) / z[j].abs().max(threshold) > 2.0 * self.eps;
                *mask = if far || !left(j) { f32::NEG_INFINITY } else { 0.0 };
            }
            picks[n] = pick as u32;
            first = Some(pick);
        }
        picks
    }
}

impl Router for SparseMixer {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let (mut first, mut second) = (vec![0.0; tokens * experts], vec![0.0; tokens * experts]);
        let picks: Vec<u32> = read(logits, |z| {
            let masks = first.chunks_exact_mut(experts).zip(second.chunks_exact_mut(experts));
            z.chunks_exact(experts)
                .zip(masks)
                .enumerate()
                .flat_map(|(t, (z, (first, second)))| {
                    let forced = input.forced.map(|forced| &forced[2 * t..2 * t + 2]);
                    self.row(z, forced, [first, second])
                })
                .collect()
        })?;
        let column = |mask: Vec<f32>, n: usize| -> Result<Tensor> {
            let mask = Tensor::from_vec(mask, (tokens, experts), logits.device())?;
            let pick: Vec<u32> = picks.iter().skip(n).step_by(2).copied().collect();
            gather(&softmax(&(logits + mask)?, D::Minus1)?, &pick, 1)
        };
        let weights = Tensor::cat(&[column(first, 0)?, column(second, 1)?], 1)?;
        let scores = softmax(logits, D::Minus1)?;
        Ok(Choice { experts: picks, weights, scores, unbiased: None })
    }
}
