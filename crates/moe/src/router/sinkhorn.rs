//! `sinkhorn`: logits evened out before the choice.
//!
//! In training the k greatest of each row of d₀ · exp(z - max of the row) · d₁ are picked, with d₀ \[T\] and d₁ \[E\] such that rows sum to 1/T and columns to
//! 1/E: Sinkhorn's iteration, until the mean change of d₁ is below 1e-4 or [`MOST`] rounds are over. Otherwise the k greatest z. Weights come from the
//! logits as they are: σ(z) for k = 1, else softmax(z), not normalised. It goes without an auxiliary loss. Sources: S-BASE in Clark et al.
//! (2202.01169); Megatron-Core's `sinkhorn`.

use super::{Choice, RouteInput, Router, gather, scaled};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::router::select::{Groups, select};
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};

/// Rounds of the iteration at most.
const MOST: usize = 1000;
const TOLERANCE: f64 = 1e-4;
/// Added to what is divided by (Megatron-Core).
const LEAST: f64 = 1e-8;

#[derive(Debug)]
pub(super) struct Sinkhorn {
    scale: f64,
    groups: Groups,
}

impl Sinkhorn {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { scale: config.scale, groups: Groups::new(config, 1) }))
    }
}

/// The evened-out matrix of the rows of `z` \[T, E\] that count; the others are left 0.
fn even(z: &[f32], experts: usize, counts: impl Fn(usize) -> bool) -> Vec<f32> {
    let tokens: Vec<usize> = (0..z.len() / experts).filter(|t| counts(*t)).collect();
    let cost: Vec<f64> = tokens
        .iter()
        .flat_map(|t| {
            let row = &z[t * experts..][..experts];
            let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().map(move |z| f64::from(z - greatest).exp())
        })
        .collect();
    let (mut d0, mut d1) = (vec![1.0; tokens.len()], vec![1.0; experts]);
    for _ in 0..MOST {
        for (d0, row) in d0.iter_mut().zip(cost.chunks_exact(experts)) {
            let sum: f64 = row.iter().zip(&d1).map(|(c, d)| c * d).sum();
            *d0 = 1.0 / tokens.len() as f64 / (sum + LEAST);
        }
        let mut sums = vec![0.0; experts];
        for (d0, row) in d0.iter().zip(cost.chunks_exact(experts)) {
            sums.iter_mut().zip(row).for_each(|(sum, c)| *sum += d0 * c);
        }
        let mut change = 0.0;
        for (d1, sum) in d1.iter_mut().zip(&sums) {
            let new = 1.0 / experts as f64 / (sum + LEAST);
            change += (new - *d1).abs() / experts as f64;
            *d1 = new;
        }
        if change <= TOLERANCE {
            break;
        }
    }
    let mut out = vec![0.0; z.len()];
    for ((t, d0), row) in tokens.iter().zip(&d0).zip(cost.chunks_exact(experts)) {
        let into = out[t * experts..].iter_mut();
        into.zip(row.iter().zip(&d1)).for_each(|(out, (c, d1))| *out = (d0 * c * d1) as f32);
    }
    out
}

impl Router for Sinkhorn {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (_, experts) = logits.dims2()?;
        let k = input.top_k;
        let picks = match input.forced {
            Some(forced) => forced.to_vec(),
            None => read(logits, |z| match input.train {
                true => select(&even(z, experts, |t| input.counts(t)), experts, k, self.groups),
                false => select(z, experts, k, self.groups),
            })?,
        };
        let scores = softmax(logits, D::Minus1)?;
        let weights =
            if k == 1 { gather(&sigmoid(logits)?, &picks, 1)? } else { gather(&scores, &picks, k)? };
        Choice::new(picks, scaled(weights, self.scale)?, scores)
    }
}
