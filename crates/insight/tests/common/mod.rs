//! Traces that are made: every row of a layer's slots by a function of the token.

#![allow(dead_code)]

use senmon_insight::{About, EMPTY, LayerTrace, NONE, Trace};
use senmon_moe::rng::Stream;
use std::collections::BTreeMap;

/// Numbers by place.
pub struct Draws(pub Stream);

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self(Stream::new(&[seed]))
    }

    /// Below `below`.
    pub fn below(&self, at: u64, below: u64) -> u64 {
        self.0.bits(at) % below
    }

    pub fn uniform(&self, at: u64) -> f64 {
        f64::from(self.0.uniform(at))
    }

    pub fn normal(&self, at: u64) -> f64 {
        self.0.normal(at)
    }

    /// `k` different numbers below `n`.
    pub fn different(&self, at: u64, n: usize, k: usize) -> Vec<u16> {
        let mut left: Vec<u16> = (0..n as u16).collect();
        (0..k as u64).map(|i| left.swap_remove(self.below(at * 64 + i, left.len() as u64) as usize)).collect()
    }
}

/// `texts` texts of `length` tokens, of `domains` domains in turn; ids by `token(row, domain)`. No layers.
pub fn texts(texts: usize, length: usize, domains: usize, token: impl Fn(usize, usize) -> u32) -> Trace {
    let n = texts * length;
    let domain = |row: usize| row / length % domains;
    let tokens: Vec<u32> = (0..n).map(|row| token(row, domain(row))).collect();
    let last = |row: usize| row % length == length - 1;
    Trace {
        about: About {
            model: "made".into(),
            router: "topk_pre".into(),
            domains: (0..domains).map(|d| format!("domain {d}")).collect(),
        },
        sequence: (0..n).map(|row| (row / length) as u32).collect(),
        position: (0..n).map(|row| (row % length) as u32).collect(),
        targets: (0..n).map(|row| if last(row) { NONE } else { tokens[row + 1] }).collect(),
        predicted: (0..n).map(|row| if row.is_multiple_of(3) { NONE } else { tokens[row] }).collect(),
        loss: (0..n).map(|row| if last(row) { f32::NAN } else { 2.0 }).collect(),
        domains: (0..n).map(|row| domain(row) as u16).collect(),
        documents: Vec::new(),
        tokens,
        layers: BTreeMap::new(),
    }
}

/// A layer whose tokens have these experts, with falling weights.
pub fn layer(n: usize, experts: usize, k: usize, choose: impl Fn(usize) -> Vec<u16>) -> LayerTrace {
    let (mut slots, mut weights) = (Vec::new(), Vec::new());
    for row in 0..n {
        let chosen = choose(row);
        slots.extend((0..k).map(|slot| chosen.get(slot).copied().unwrap_or(EMPTY)));
        weights
            .extend((0..k).map(|slot| if slot < chosen.len() { 0.5f32.powi(slot as i32 + 1) } else { 0.0 }));
    }
    LayerTrace {
        name: None,
        count: Some(experts),
        top_k: k,
        experts: slots,
        weights,
        dropped: vec![0; n * k],
        logits: None,
    }
}
