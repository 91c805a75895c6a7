//! `depth`: a block that some tokens pass by.
//!
//! One expert and a router r = x·w: of the tokens that are routed together (a sequence, unless `group_size` says otherwise) the C = ⌈`capacity`·S⌉ with the
//! greatest r (`capacity` 0 is 1/8) go through it, with weight r; the others keep their residual stream. With `predictor`, a second product learns
//! (term `predictor`, binary cross-entropy, its input's gradient stopped) which tokens are taken, and decides when not training. Here the block is the
//! feed-forward; in the paper attention goes with it. Source: Mixture of Depths (2404.02258).

use super::scored::softplus;
use super::{Choice, RouteInput, Router, Term, gather, only, scaled};
use crate::capacity;
use crate::config::RouterConfig;
use crate::error::{MoeError, Result};
use crate::tensor::read;
use candle_core::Tensor;
use senmon_kernels::dispatch::EMPTY;

#[derive(Debug)]
pub(super) struct Depth {
    capacity: f64,
    least: usize,
    scale: f64,
}

impl Depth {
    pub(super) fn build(config: &RouterConfig, experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        only("depth", "has one expert", 1, top_k)?;
        if experts != 1 {
            let what = format!("router.kind = \"depth\" has one expert; experts.count is {experts}");
            return Err(MoeError::Config { what });
        }
        let capacity = if config.capacity == 0.0 { 0.125 } else { config.capacity };
        Ok(Box::new(Self { capacity, least: config.min_capacity, scale: config.scale }))
    }
}

impl Router for Depth {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, _) = logits.dims2()?;
        let by_capacity = |r: &[f32]| {
            let mut picks = vec![EMPTY; tokens];
            for group in input.groups(tokens) {
                let mut members: Vec<usize> = group.filter(|t| input.counts(*t)).collect();
                let c = capacity::places(self.capacity, 1, members.len(), 1, self.least);
                members.sort_by(|a, b| r[*b].total_cmp(&r[*a]));
                members.iter().take(c).for_each(|t| picks[*t] = 0);
            }
            picks
        };
        let picks = match (input.forced, input.predicted) {
            (Some(forced), _) => forced.to_vec(),
            (None, Some(predicted)) if !input.train => read(predicted, |predicted| {
                predicted.iter().map(|p| if *p > 0.0 { 0 } else { EMPTY }).collect()
            })?,
            (None, _) => read(logits, by_capacity)?,
        };
        let weights = scaled(gather(logits, &picks, 1)?, self.scale)?;
        let mut terms = Vec::new();
        if let Some(predicted) = input.predicted.filter(|_| input.train) {
            let taken: Vec<f32> = picks.iter().map(|e| f32::from(u8::from(*e != EMPTY))).collect();
            let taken = Tensor::from_vec(taken, (tokens, 1), logits.device())?;
            let loss = (softplus(predicted)? - (predicted * taken)?)?;
            terms.push(Term { name: "predictor", per_token: loss.squeeze(1)? });
        }
        Ok(Choice { terms, ..Choice::new(picks, weights, logits.ones_like()?)? })
    }
}
