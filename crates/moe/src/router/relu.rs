//! `relu`: gates that are open or shut.
//!
//! g = ReLU(z) \[T, E\]; every expert with g_i > 0, weight g_i. The term `l1` is the mean over tokens of Σ_i f_i·g_i, with f_i = E/(K·T) ·
//! (tokens of expert i): it pushes the load even too. Its coefficient is the state of the run: it starts at 1e-8 and is multiplied by 1.2 after a
//! step whose share of shut gates is below `target_sparsity` (1 - K/E), divided by 1.2 after one above. Source: ReMoE (2412.14711).

use super::{Choice, RouteInput, Router, Term, gather, ragged, scaled, slots_of};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};

#[derive(Debug)]
pub(super) struct Relu {
    scale: f64,
}

impl Relu {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { scale: config.scale }))
    }
}

impl Router for Relu {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let gates = logits.relu()?;
        let (picks, slots, fractions) = read(&gates, |gates| {
            let mut counts = vec![0u64; experts];
            let rows: Vec<Vec<u32>> = gates
                .chunks_exact(experts)
                .enumerate()
                .map(|(t, row)| {
                    let mut open: Vec<u32> = (0..experts as u32).filter(|e| row[*e as usize] > 0.0).collect();
                    open.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
                    if input.counts(t) {
                        open.iter().for_each(|e| counts[*e as usize] += 1);
                    }
                    open
                })
                .collect();
            let counted = (0..tokens).filter(|t| input.counts(*t)).count().max(1);
            let even = experts as f64 / (input.top_k * counted) as f64;
            let fractions: Vec<f32> = counts.iter().map(|c| (even * *c as f64) as f32).collect();
            let (picks, slots) = match input.forced {
                Some(forced) => (forced.to_vec(), slots_of(forced, tokens)),
                None => ragged(&rows),
            };
            (picks, slots, fractions)
        })?;
        let weights = scaled(gather(&gates, &picks, slots)?, self.scale)?;
        let fractions = Tensor::from_vec(fractions, (1, experts), logits.device())?;
        let l1 = gates.broadcast_mul(&fractions)?.sum(D::Minus1)?;
        let sum = gates.sum_keepdim(D::Minus1)?.maximum(f32::MIN_POSITIVE)?;
        let mut choice = Choice::new(picks, weights, gates.broadcast_div(&sum)?)?;
        choice.terms.push(Term { name: "l1", per_token: l1 });
        Ok(choice)
    }
}
