//! Balancing over optimiser steps: what moves once a step, from all of its tokens, and is saved with a run.

use std::collections::BTreeMap;

use senmon_models::decoder::{Decoder, LayerRouting};
use senmon_moe::{BalanceConfig, balance};

use crate::config::RunConfig;
use crate::error::Result;

/// What the balancing of a run goes by, and how it stands. Selection biases stand in the model; the rest is here, and in the layers' running means.
#[derive(Clone, Debug)]
pub struct Balancing {
    /// `[balance]`.
    pub config: BalanceConfig,
    /// The coefficient of `l1`, for routers that have one.
    multiplier: Option<f64>,
    /// The share of gates, over all layers, that `l1` leads to be shut; 0 for all but K a token.
    target: f64,
    top_k: usize,
    /// `distill` is the consistency of two passes, not the distance of a token's experts.
    pub consistent: bool,
}

/// What one optimiser step has seen of each MoE layer.
#[derive(Debug, Default)]
pub struct Seen {
    /// By layer.
    pub layers: BTreeMap<usize, SeenLayer>,
}

/// What one optimiser step has seen of an MoE layer.
#[derive(Debug, Default)]
pub struct SeenLayer {
    /// Slots of each expert, after drops: \[E\].
    pub load: Vec<u64>,
    /// The same before drops.
    pub picked: Vec<u64>,
    /// Slots that were dropped.
    pub dropped: u64,
    /// Tokens.
    tokens: u64,
    /// The scores of all tokens, \[T, E\], where they are asked for.
    scores: Vec<f32>,
}

impl Seen {
    /// Takes in a micro-batch.
    pub fn add(&mut self, routings: &[LayerRouting], scores: bool) -> Result<()> {
        for (layer, routing) in routings {
            let seen = self.layers.entry(*layer).or_default();
            for (sum, counts) in [(&mut seen.load, &routing.load), (&mut seen.picked, &routing.picked_load)] {
                sum.resize(counts.len(), 0);
                sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += u64::from(*count));
            }
            seen.dropped += routing.dropped as u64;
            seen.tokens += routing.counted as u64;
            if let Some(selection) = routing.selection.as_ref().filter(|_| scores) {
                senmon_moe::tensor::read(selection, |scores| seen.scores.extend(scores))?;
            }
        }
        Ok(())
    }

    /// The share of gates that were shut.
    fn shut(&self) -> f64 {
        let gates: u64 = self.layers.values().map(|of| of.tokens * of.picked.len() as u64).sum();
        let open: u64 = self.layers.values().flat_map(|of| &of.picked).sum();
        1.0 - open as f64 / gates.max(1) as f64
    }
}

impl Balancing {
    /// The balancing of a run that begins.
    pub fn new(config: &RunConfig) -> Self {
        let relu = config.router.kind == "relu";
        Self {
            config: config.balance.clone(),
            multiplier: relu.then_some(balance::LEAST_MULTIPLIER),
            target: config.router.target_sparsity,
            top_k: config.experts.top_k,
            consistent: config.router.kind == "random",
        }
    }

    /// The coefficient of `l1` now; 0 where there is none.
    pub fn multiplier(&self) -> f64 {
        self.multiplier.unwrap_or(0.0)
    }

    /// Takes up the coefficient of `l1` as it was saved.
    pub fn restore(&mut self, multiplier: Option<f64>) {
        if self.multiplier.is_some() && multiplier.is_some() {
            self.multiplier = multiplier;
        }
    }

    /// The coefficient of `l1`, to be saved.
    pub fn saved(&self) -> Option<f64> {
        self.multiplier
    }

    /// Ends an optimiser step.
    pub fn step(&mut self, decoder: &Decoder, seen: &Seen) {
        let config = &self.config;
        for (layer, bias) in decoder.selection_biases() {
            let Some(seen) = seen.layers.get(&layer) else { continue };
            if config.bias_rate != 0.0 {
                let (rate, recentre) = (config.bias_rate, config.recentre);
                bias.update(|bias| balance::step_bias(bias, &seen.picked, rate, recentre));
            }
            if config.quantile {
                let experts = seen.picked.len();
                bias.update(|bias| balance::quantile(&seen.scores, experts, self.top_k, bias));
            }
        }
        for (_, layer) in decoder.moe_layers() {
            layer.running().step(config.ema_decay);
        }
        if let Some(multiplier) = &mut self.multiplier {
            // K open gates a token in each layer, of all that there are.
            let gates: usize = seen.layers.values().map(|of| of.picked.len()).sum();
            let target = match self.target {
                0.0 => 1.0 - (self.top_k * seen.layers.len()) as f64 / gates.max(1) as f64,
                target => target,
            };
            *multiplier = balance::step_multiplier(*multiplier, seen.shut(), target);
        }
    }
}
