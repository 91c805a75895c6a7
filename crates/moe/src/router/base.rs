//! `base`: as many tokens for each expert.
//!
//! In training the tokens are assigned so that no expert has more than ⌈T/E⌉ of them and the sum of their logits is the greatest
//! there is; weight σ(z). Otherwise each token takes its greatest. K = 1. Source: BASE Layers (2103.16716); theirs comes
//! near the optimum by an auction, ours reaches it by shortest augmenting paths over the experts.

use super::{Choice, RouteInput, Router, gather, only, scaled};
use crate::config::RouterConfig;
use crate::error::Result;
use crate::tensor::read;
use candle_core::{D, Tensor};
use candle_nn::ops::{sigmoid, softmax};
use senmon_kernels::dispatch::EMPTY;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

#[derive(Debug)]
pub(super) struct Base {
    scale: f64,
}

impl Base {
    pub(super) fn build(config: &RouterConfig, _experts: usize, top_k: usize) -> Result<Box<dyn Router>> {
        only("base", "has one expert per token", 1, top_k)?;
        Ok(Box::new(Self { scale: config.scale }))
    }
}

impl Router for Base {
    fn choose(&self, logits: &Tensor, input: &RouteInput) -> Result<Choice> {
        let (tokens, experts) = logits.dims2()?;
        let picks = match input.forced {
            Some(forced) => forced.to_vec(),
            None if input.train => read(logits, |z| {
                let mut picks = vec![EMPTY; tokens];
                for group in input.groups(tokens) {
                    let members: Vec<usize> = group.filter(|t| input.counts(*t)).collect();
                    let rows: Vec<&[f32]> = members.iter().map(|t| &z[t * experts..][..experts]).collect();
                    for (t, expert) in members.iter().zip(assign(&rows, experts)) {
                        picks[*t] = expert;
                    }
                }
                picks
            })?,
            None => read(logits, |z| {
                let mut picks = Vec::with_capacity(tokens);
                z.chunks_exact(experts).for_each(|row| super::top_k(row, 1, |_| true, &mut picks));
                picks
            })?,
        };
        let weights = scaled(gather(&sigmoid(logits)?, &picks, 1)?, self.scale)?;
        Choice::new(picks, weights, softmax(logits, D::Minus1)?)
    }
}

/// A token that could leave an expert for another, by what that costs.
#[derive(PartialEq)]
struct Move {
    cost: f64,
    token: u32,
}

impl Eq for Move {}

impl Ord for Move {
    /// The cheapest is the greatest; of two as cheap the lowest token.
    fn cmp(&self, other: &Self) -> Ordering {
        other.cost.total_cmp(&self.cost).then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Move {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The expert of each row \[E\] of logits, none with more than ⌈T/E⌉, such that the sum of the logits is
/// greatest: tokens come one by one, each by the cheapest chain of moves that ends at an expert with a place left.
fn assign(rows: &[&[f32]], experts: usize) -> Vec<u32> {
    let most = rows.len().div_ceil(experts.max(1));
    let mut load = vec![0usize; experts];
    let mut of = vec![EMPTY; rows.len()];
    // Tokens of expert a by what it costs to move them to b; entries of tokens that have left are passed over.
    let mut moves: Vec<BinaryHeap<Move>> = (0..experts * experts).map(|_| BinaryHeap::new()).collect();
    let (mut cost, mut from) = (vec![0.0; experts], vec![usize::MAX; experts]);
    for token in 0..rows.len() {
        let value = |t: u32, e: usize| {
            let z = rows[t as usize][e];
            if z.is_nan() { f64::MIN } else { f64::from(z).clamp(-1e30, 1e30) }
        };
        for e in 0..experts {
            (cost[e], from[e]) = (-value(token as u32, e), usize::MAX);
        }
        let mut cheapest = |a: usize, b: usize| -> Option<f64> {
            let heap = &mut moves[a * experts + b];
            while heap.peek().is_some_and(|top| of[top.token as usize] != a as u32) {
                heap.pop();
            }
            heap.peek().map(|top| top.cost)
        };
        // Bellman and Ford: at most E rounds, mostly two or three.
        for _ in 0..experts {
            let mut changed = false;
            for a in (0..experts).filter(|a| load[*a] == most) {
                for b in (0..experts).filter(|b| *b != a) {
                    if let Some(step) = cheapest(a, b)
                        && cost[a] + step < cost[b] - 1e-12
                    {
                        (cost[b], from[b]) = (cost[a] + step, a);
                        changed = true;
                    }
                }
            }
            if !changed {
                break;
            }
        }
        let free = (0..experts).filter(|e| load[*e] < most);
        let Some(end) = free.min_by(|a, b| cost[*a].total_cmp(&cost[*b])) else { break };
        load[end] += 1;
        let settle = |of: &mut Vec<u32>, moves: &mut Vec<BinaryHeap<Move>>, t: u32, e: usize| {
            of[t as usize] = e as u32;
            for b in (0..experts).filter(|b| *b != e) {
                moves[e * experts + b].push(Move { cost: value(t, e) - value(t, b), token: t });
            }
        };
        let mut at = end;
        // A chain has no circle: it ends within E steps.
        for _ in 0..experts {
            let before = from[at];
            if before == usize::MAX {
                break;
            }
            let heap = &mut moves[before * experts + at];
            while heap.peek().is_some_and(|top| of[top.token as usize] != before as u32) {
                heap.pop();
            }
            let Some(moved) = heap.pop() else { break };
            settle(&mut of, &mut moves, moved.token, at);
            at = before;
        }
        settle(&mut of, &mut moves, token as u32, at);
    }
    of
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// The best of all assignments of so few tokens.
    fn best(rows: &[&[f32]], load: &mut Vec<usize>, most: usize) -> f64 {
        let Some((row, rest)) = rows.split_first() else { return 0.0 };
        let mut found = f64::NEG_INFINITY;
        for e in 0..load.len() {
            if load[e] < most {
                load[e] += 1;
                found = found.max(f64::from(row[e]) + best(rest, load, most));
                load[e] -= 1;
            }
        }
        found
    }

    #[test]
    fn no_assignment_is_better() {
        for seed in 0..60 {
            let stream = Stream::new(&[seed]);
            let (tokens, experts) = (1 + stream.bits(9000) as usize % 9, 2 + stream.bits(9001) as usize % 3);
            let z: Vec<f32> = (0..tokens * experts).map(|i| stream.uniform(i as u64) * 4.0 - 2.0).collect();
            let rows: Vec<&[f32]> = z.chunks_exact(experts).collect();
            let picks = assign(&rows, experts);
            let most = tokens.div_ceil(experts);
            let mut load = vec![0; experts];
            picks.iter().for_each(|e| load[*e as usize] += 1);
            assert!(load.iter().all(|n| *n <= most), "{load:?}");
            let sum: f64 = picks.iter().zip(&rows).map(|(e, row)| f64::from(row[*e as usize])).sum();
            let most_there_is = best(&rows, &mut vec![0; experts], most);
            assert!((sum - most_there_is).abs() < 1e-6, "{sum} of {most_there_is}");
        }
    }
}
