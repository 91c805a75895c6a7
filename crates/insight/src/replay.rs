//! What-if replay: a recorded trace routed again under another K, a capacity, a placement over ranks, or a cache, without the
//! model.
//!
//! The router's choices are the recorded ones. With fewer experts per token a token keeps its first choices, since slots stand in the
//! router's order; with more it takes the experts of its greatest logits that it does not have yet. What a changed routing
//! would have done to later tokens and layers is not replayed: the hidden states are those of the recording.

use crate::error::{InsightError, Result};
use crate::statistics::cache::{decoded, lru};
use crate::statistics::confidence::softmax;
use crate::statistics::load::assignments;
use crate::statistics::numbers::{Figure, expected_greatest, ratio, share};
use crate::statistics::placement::{check_length, cost_of, homes};
use crate::statistics::view::{Layer, Sets, layers, texts};
use crate::statistics::{Cost, Placement};
use crate::trace::{EMPTY, Trace, name};
use rayon::prelude::*;
use senmon_moe::capacity::{Capacity as Rule, Places, places};
pub use senmon_moe::config::Drop;
use senmon_moe::rng::Draws;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The id of an empty slot where rules of capacity are applied.
const UNPICKED: u32 = u32::MAX;

/// What is to be other than it was. All that is left out stays as recorded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// K, the experts of a token.
    pub top_k: Option<usize>,
    /// How many tokens an expert takes.
    pub capacity: Option<Capacity>,
    /// Where experts are.
    pub ranks: Option<Ranks>,
    /// Experts of a layer that a cache has room for.
    pub cache: Option<usize>,
}

/// How many tokens an expert takes, and who is left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// An expert takes at most C = ⌈factor · T·K/E⌉ of T tokens.
    pub factor: f64,
    /// T: tokens that are routed together, in the order of the trace; 0 for all. Of tokens that a layer did not see none counts.
    #[serde(default)]
    pub batch: usize,
    /// Who is left out. `priority` and `gate` go by the weights; where experts were added, by the probabilities of the logits.
    #[serde(default)]
    pub drop: Drop,
}

/// Where experts are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ranks {
    /// R.
    pub ranks: usize,
    /// Placements of layers, by number; the others have their experts in order.
    #[serde(default)]
    pub placements: BTreeMap<usize, Placement>,
}

/// What became of a layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Replayed {
    /// Its number.
    pub layer: usize,
    /// What it is called, where that is not its number.
    pub name: Option<String>,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// Tokens that the layer saw.
    pub tokens: u64,
    /// Slots with an expert that computes, after drops.
    pub assignments: u64,
    /// Slots whose expert computes nothing.
    pub idle: u64,
    /// Slots that were dropped when the trace was recorded, among those that a token still has. They stay so: whose they were is not recorded.
    pub dropped_before: u64,
    /// Slots that the capacity empties.
    pub dropped: u64,
    /// The same over all slots that had an expert. By chance: Σ max(0, X - C) over experts and batches, over K·T, where X is the binomial
    /// number of an expert's tokens of a batch, of the probability K/E.
    pub dropped_rate: Figure,
    /// Tokens that are left with no expert.
    pub without: u64,
    /// Assignments of each expert: \[E\].
    pub counts: Vec<u64>,
    /// The greatest of them over their mean. By chance: of an even router without capacity.
    pub max_over_mean: Figure,
    /// Traffic and loads of ranks.
    pub ranks: Option<Cost>,
    /// Hits of the cache.
    pub cache: Option<Hits>,
}

/// Hits of a cache that evicts what was used least recently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hits {
    /// Experts it has room for.
    pub size: usize,
    /// Experts that were asked for.
    pub requests: u64,
    /// Those that were there.
    pub hits: u64,
    /// The share of these. By chance: size / E.
    pub rate: Figure,
}

/// Routes a trace again. With nothing changed the counts are those of the trace.
pub fn replay(trace: &Trace, scenario: &Scenario) -> Result<Vec<Replayed>> {
    let layers = layers(trace)?;
    check(scenario, &layers)?;
    let texts = texts(trace);
    layers.par_iter().map(|layer| of(trace, layer, &texts, scenario)).collect()
}

/// Refuses what means nothing.
fn check(scenario: &Scenario, layers: &[Layer]) -> Result<()> {
    let refuse = |what: String| Err(InsightError::trace(what));
    if scenario.top_k == Some(0) {
        return refuse("top_k = 0: expected 1 or more".into());
    }
    if scenario.cache == Some(0) {
        return refuse("cache = 0: expected room for 1 expert or more".into());
    }
    if let Some(Capacity { factor, .. }) = scenario.capacity
        && !(factor.is_finite() && factor > 0.0)
    {
        return refuse(format!("capacity factor {factor}: expected more than 0"));
    }
    let Some(ranks) = &scenario.ranks else { return Ok(()) };
    let known: BTreeSet<usize> = layers.iter().map(|layer| layer.number).collect();
    if let Some(layer) = ranks.placements.keys().find(|layer| !known.contains(*layer)) {
        return refuse(format!("a placement of layer {layer}; there are layers {known:?}"));
    }
    if let Some((layer, of)) = ranks.placements.iter().find(|(_, of)| of.ranks() != ranks.ranks) {
        return refuse(format!(
            "the placement of layer {layer} is over {} ranks, expected {}",
            of.ranks(),
            ranks.ranks
        ));
    }
    Ok(())
}

/// The experts of a layer's tokens under a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// K.
    pub top_k: usize,
    /// The expert of each slot, or [`EMPTY`]: \[N, K\].
    pub experts: Vec<u16>,
}

/// The experts of each layer's tokens under a scenario, for who has the model and wants to know what they cost.
pub fn choices_of(trace: &Trace, scenario: &Scenario) -> Result<BTreeMap<usize, Choice>> {
    let layers = layers(trace)?;
    check(scenario, &layers)?;
    let choice = |layer: &Layer| {
        let top_k = scenario.top_k.unwrap_or(layer.trace.top_k);
        Ok((layer.number, Choice { top_k, experts: routed(layer, trace.len(), scenario)?.slots }))
    };
    layers.par_iter().map(choice).collect()
}

/// The slots of a layer routed again.
struct Routed {
    /// \[N, K\], after drops.
    slots: Vec<u16>,
    /// Slots that had an expert before drops.
    before: u64,
    /// Slots that the capacity emptied.
    dropped: u64,
    /// Whether the layer saw a token: \[N\].
    seen: Vec<bool>,
}

fn routed(layer: &Layer, n: usize, scenario: &Scenario) -> Result<Routed> {
    let experts = layer.experts;
    let k = scenario.top_k.unwrap_or(layer.trace.top_k);
    let (mut slots, ranks) = choices(layer, n, k)?;
    let before = slots.iter().filter(|id| **id != EMPTY).count() as u64;
    let mut seen = vec![false; n];
    layer.seen.iter().for_each(|row| seen[*row] = true);
    let mut dropped = 0;
    // Without experts that compute there is nothing to be full.
    if let Some(capacity) = scenario.capacity.filter(|_| experts > 0) {
        let mut picks: Vec<u32> =
            slots.iter().map(|id| if *id == EMPTY { UNPICKED } else { u32::from(*id) }).collect();
        let rule = Rule {
            places: Places::Share { factor: capacity.factor, top_k: k, experts, least: 0 },
            group: capacity.batch,
            width: experts,
            drop: capacity.drop,
            draws: Draws { layer: layer.number as u64, ..Draws::default() },
        };
        dropped = rule.apply(&mut picks, &ranks, k, experts, |row| seen[row]) as u64;
        slots = picks.iter().map(|id| u16::try_from(*id).unwrap_or(EMPTY)).collect();
    }
    Ok(Routed { slots, before, dropped, seen })
}

/// A layer routed again.
fn of(trace: &Trace, layer: &Layer, texts: &[Vec<usize>], scenario: &Scenario) -> Result<Replayed> {
    let (recorded, experts, n) = (layer.trace, layer.experts, trace.len());
    let k = scenario.top_k.unwrap_or(recorded.top_k);
    let Routed { slots, before, dropped, seen } = routed(layer, n, scenario)?;
    let filled = |slots: &[u16]| slots.iter().filter(|id| **id != EMPTY).count() as u64;
    let dropped_even = scenario
        .capacity
        .filter(|_| experts > 0)
        .and_then(|capacity| drops_by_chance(&seen, k, experts, capacity));
    let sets = Sets::of(&slots, k, experts);
    let counts = assignments(&slots, experts);
    let total: u64 = counts.iter().sum();
    let kept = recorded.dropped.chunks(recorded.top_k).flat_map(|row| row.iter().take(k));
    let empty = |row: &&usize| slots[**row * k..][..k].iter().all(|id| *id == EMPTY);
    let cost = scenario.ranks.as_ref().map(|ranks| {
        let placement = match ranks.placements.get(&layer.number) {
            Some(placement) => placement.clone(),
            None => Placement::contiguous(experts, ranks.ranks)?,
        };
        check_length(&placement, experts)?;
        Ok(cost_of(&sets, &layer.seen, experts, &homes(texts, n, ranks.ranks), &placement))
    });
    let cache = scenario.cache.map(|size| {
        let hits = lru(&sets, decoded(layer, texts, n).into_iter(), experts);
        let hits = size.min(experts).checked_sub(1).and_then(|at| hits.get(at)).copied().unwrap_or(0);
        let requests = sets.total() as u64;
        let chance = ratio(size.min(experts) as f64, experts as f64);
        Hits { size, requests, hits, rate: Figure::new(share(hits, requests), chance, None) }
    });
    let mean = total as f64 / experts as f64;
    // Experts that a token has, on average: fewer than slots where the router gives as many as it likes.
    let p = ratio(sets.total() as f64, layer.seen.len() as f64 * experts as f64).map(|p| p.min(1.0));
    let cv = p.and_then(|p| ratio(((1.0 - p) / p).sqrt(), (layer.seen.len() as f64).sqrt()));
    Ok(Replayed {
        layer: layer.number,
        name: recorded.name.clone(),
        experts,
        top_k: k,
        tokens: layer.seen.len() as u64,
        assignments: total,
        idle: filled(&slots) - total,
        dropped_before: kept.filter(|dropped| **dropped == 1).count() as u64,
        dropped,
        dropped_rate: Figure::new(share(dropped, before), dropped_even, None),
        without: layer.seen.iter().filter(empty).count() as u64,
        max_over_mean: Figure::new(
            ratio(counts.iter().copied().max().unwrap_or(0) as f64, mean),
            cv.map(|cv| 1.0 + cv * expected_greatest(experts)),
            None,
        ),
        counts,
        ranks: cost.transpose()?,
        cache,
    })
}

/// The share of assignments that a capacity drops by chance.
fn drops_by_chance(seen: &[bool], k: usize, experts: usize, capacity: Capacity) -> Option<f64> {
    let batch = if capacity.batch == 0 { seen.len().max(1) } else { capacity.batch };
    let mut sizes: BTreeMap<usize, u64> = BTreeMap::new();
    for batch in seen.chunks(batch) {
        *sizes.entry(batch.iter().filter(|seen| **seen).count()).or_insert(0) += 1;
    }
    let p = (k as f64 / experts as f64).min(1.0);
    let tokens: f64 = sizes.iter().map(|(t, times)| *t as f64 * *times as f64).sum();
    let over = |(t, times): (&usize, &u64)| {
        let c = places(capacity.factor, k, *t, experts, 0);
        *times as f64 * experts as f64 * overflow(*t, p, c)
    };
    ratio(sizes.iter().map(over).sum(), p * experts as f64 * tokens)
}

/// The mean of max(0, X - c), X binomial: `n` trials of probability `p`.
fn overflow(n: usize, p: f64, c: usize) -> f64 {
    if p >= 1.0 {
        return n.saturating_sub(c) as f64;
    }
    let (mut ln, odds, mut sum) = (n as f64 * (-p).ln_1p(), (p / (1.0 - p)).ln(), 0.0);
    for x in 0..=n {
        if x > c {
            sum += (x - c) as f64 * ln.exp();
        }
        ln += ((n - x) as f64 / (x + 1) as f64).ln() + odds;
    }
    sum
}

/// Experts of `n` tokens with K of them each, and what ranks them: \[N, K\] both.
fn choices(layer: &Layer, n: usize, k: usize) -> Result<(Vec<u16>, Vec<f32>)> {
    let (recorded, experts) = (layer.trace, layer.experts);
    let width = recorded.top_k;
    if k <= width {
        fn first<T: Copy>(values: &[T], width: usize, k: usize) -> Vec<T> {
            values.chunks(width).flat_map(|row| &row[..k]).copied().collect()
        }
        return Ok((first(&recorded.experts, width, k), first(&recorded.weights, width, k)));
    }
    let refuse = |what: String| Err(InsightError::tensor(&name("logits", layer.number), what));
    let Some(logits) = &recorded.logits else {
        return refuse(format!("is missing: {k} experts per token need it, the trace has {width}"));
    };
    if k > experts {
        return refuse(format!("has {experts} experts, {k} per token were asked for"));
    }
    // Tokens that the layer did not see get no experts.
    let (mut slots, mut ranks) = (vec![EMPTY; n * k], vec![0.0; n * k]);
    for row in &layer.seen {
        let (slots, ranks) = (&mut slots[row * k..][..k], &mut ranks[row * k..][..k]);
        slots[..width].copy_from_slice(&recorded.experts[row * width..][..width]);
        let logits = &logits[row * experts..][..experts];
        let Some(p) = softmax(logits) else { continue };
        let mut order: Vec<usize> = (0..experts).filter(|e| p[*e] > 0.0).collect();
        // Stable: of two as great the lowest.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        order.retain(|e| !slots[..width].contains(&(*e as u16)));
        slots[width..].iter_mut().zip(&order).for_each(|(slot, e)| *slot = *e as u16);
        for (rank, id) in ranks.iter_mut().zip(&*slots) {
            *rank = p.get(usize::from(*id)).map_or(0.0, |p| *p as f32);
        }
    }
    Ok((slots, ranks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overflows_by_chance_is_what_a_binomial_says() {
        // Four trials of 1/2: 3 with probability 4/16, 4 with 1/16.
        assert!((overflow(4, 0.5, 2) - 6.0 / 16.0).abs() < 1e-12);
        assert!((overflow(4, 0.5, 0) - 2.0).abs() < 1e-12);
        assert_eq!(overflow(4, 1.0, 3), 1.0);
        assert_eq!(overflow(0, 0.5, 0), 0.0);
        // All of a great number, without running out of exponents.
        assert!((overflow(100_000, 0.25, 0) / 25_000.0 - 1.0).abs() < 1e-9);
    }
}
