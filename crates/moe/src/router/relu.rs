//! `relu`: gates that are open or shut.
//!
//! g = ReLU(z) \[T, E\]; every expert with g_i > 0, weight g_i. The term `l1` is the mean over tokens of Σ_i f_i·g_i, with f_i = E/(K·T) ·
//! (tokens of expert i): it pushes the load even too. Its coefficient is the state of the run: it starts at 1e-8 and is multiplied by 1.2 after a
//! step whose share of shut gates is below `target_sparsity` (1 - K/E), divided by 1.2 after one above. Source: ReMoE (2412.14711).

use super::{Choice, RouteInput, Router, TINY, gather, ragged, scaled, slots_of};
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
        let (picks, slots) = match input.forced {
            Some(forced) => (forced.to_vec(), slots_of(forced, tokens)),
            None => read(&gates, |gates| {
                let open = |row: &[f32]| {
                    let mut open: Vec<u32> = (0..experts as u32).filter(|e| row[*e as usize] > 0.0).collect();
                    open.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
                    open
                };
                ragged(&gates.chunks_exact(experts).map(open).collect::<Vec<_>>())
            })?,
        };
        let weights = scaled(gather(&gates, &picks, slots)?, self.scale)?;
        let sum = gates.sum_keepdim(D::Minus1)?.maximum(TINY)?;
        let mut choice = Choice::new(picks, weights, gates.broadcast_div(&sum)?)?;
        choice.gates = Some(gates);
        Ok(choice)
    }
}
