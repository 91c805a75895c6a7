//! `random`: no router at all.
//!
//! In training each token goes to K different experts drawn evenly, weights 1/K. Otherwise it gets the mean over all experts, or with
//! `random_eval = "random"` K experts that its id draws. With `balance.distill` a token passes twice, and the two predictions are kept close (THOR's
//! consistency). Logits are not looked at. Source: THOR (2110.04260).

use super::{Choice, RouteInput, Router, scaled, slots_of};
use crate::config::{RandomEval, RouterConfig};
use crate::error::{MoeError, Result};
use crate::rng::{Draws, Purpose};
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

#[derive(Debug)]
pub(super) struct Random {
    eval: RandomEval,
    scale: f64,
}

impl Random {
    pub(super) fn build(config: &RouterConfig, _experts: usize, _top_k: usize) -> Result<Box<dyn Router>> {
        Ok(Box::new(Self { eval: config.random_eval, scale: config.scale }))
    }
}

/// K different experts of E by the numbers of a token: the K greatest of E.
fn draw(draws: &Draws, token: usize, experts: usize, k: usize, into: &mut Vec<u32>) {
    let row = draws.row(Purpose::Pick, token, experts);
    let numbers: Vec<f32> = (0..experts).map(|e| row.uniform(e)).collect();
    super::top_k(&numbers, k, |_| true, into);
}

impl Router for Random {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let mut picks = Vec::new();
        match (input.forced, input.train, self.eval) {
            (Some(forced), ..) => picks.extend(forced),
            (None, true, _) => {
                (0..tokens).for_each(|t| draw(&input.draws, t, experts, input.top_k, &mut picks))
            }
            (None, false, RandomEval::Mean) => (0..tokens).for_each(|_| picks.extend(0..experts as u32)),
            (None, false, RandomEval::Random) => {
                let Some(ids) = input.token_ids else {
                    let what =
                        "router.random_eval = \"random\" goes by token ids: the layer was given none".into();
                    return Err(MoeError::Config { what });
                };
                let draws = Draws { layer: input.draws.layer, ..Draws::default() };
                ids.iter().for_each(|id| draw(&draws, *id as usize, experts, input.top_k, &mut picks));
            }
        }
        let slots = slots_of(&picks, tokens);
        let weights = Tensor::full(1.0 / slots as f32, (tokens, slots), logits.device())?;
        Choice::new(picks, scaled(weights, self.scale)?, softmax(logits, D::Minus1)?)
    }
}
