//! Vocabulary specialisation: how far a token's id alone says which experts it has.

use super::Options;
use super::numbers::{Figure, ratio, shuffled};
use super::view::Layer;
use crate::trace::{NONE, Trace};
use senmon_moe::rng::Stream;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How far ids say which experts tokens have (OLMoE 2409.02060, section 5.4): the id of the token itself, of the one that
/// followed, and of the one that the model held likeliest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Vocabulary {
    /// By the token itself.
    pub input: ByIds,
    /// By the token that followed.
    pub target: ByIds,
    /// By the token that the model held likeliest.
    pub predicted: ByIds,
}

/// How far ids say which experts tokens have. Only ids count that occur often enough ([`Options::min_occurrences`]). Chance is
/// the mean over seeded shuffles of the ids over the tokens: the favourite of few occurrences always looks like one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ByIds {
    /// Ids that occur often enough.
    pub ids: u64,
    /// Their occurrences in tokens that the layer saw.
    pub occurrences: u64,
    /// The share of an id's occurrences that have its favourite expert; the mean over ids. 1: always.
    pub favourite: Figure,
    /// The same over occurrences: frequent ids count for more.
    pub favourite_by_occurrence: Figure,
    /// The share of an id's assignments that go to its K favourite experts, K the mean experts of a token, rounded; the mean
    /// over ids. 1: the id decides.
    pub favourites: Figure,
}

/// Sums over ids of the three shares.
#[derive(Clone, Copy, Default)]
struct Sums([f64; 3]);

/// One kind of ids against the experts of a layer; `kind` is the number of the kind in the seeds.
fn by_ids(layer: &Layer, ids: &[u32], kind: u64, options: &Options) -> ByIds {
    // Where each id occurs.
    let mut places: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for row in &layer.seen {
        if ids[*row] != NONE {
            places.entry(ids[*row]).or_default().push(*row);
        }
    }
    let rows: Vec<usize> = places.values().flatten().copied().collect();
    let lengths: Vec<usize> = places.values().map(Vec::len).collect();
    let least = options.min_occurrences.max(1) as usize;
    let enough = || lengths.iter().filter(|n| **n >= least);
    let (count, occurrences) = (enough().count(), enough().sum::<usize>());
    if count == 0 {
        return ByIds::default();
    }
    let k = (layer.mean_k().round() as usize).max(1);
    let mut counts = vec![0u64; layer.experts];
    // With the tokens of the ids in this order.
    let mut sums = |rows: &dyn Fn(usize) -> usize| {
        let (mut sums, mut start) = (Sums::default(), 0);
        for n in &lengths {
            let mine = start..start + n;
            start += n;
            if *n < least {
                continue;
            }
            let mut used: Vec<usize> = Vec::new();
            for at in mine {
                for e in layer.sets.each(rows(at)) {
                    if counts[e] == 0 {
                        used.push(e);
                    }
                    counts[e] += 1;
                }
            }
            let mut found: Vec<u64> = used.iter().map(|e| std::mem::take(&mut counts[*e])).collect();
            found.sort_unstable_by(|a, b| b.cmp(a));
            let first = found.first().copied().unwrap_or(0) as f64;
            let (top, all) = (found.iter().take(k).sum::<u64>(), found.iter().sum::<u64>());
            let [favourite, by_occurrence, favourites] = &mut sums.0;
            *favourite += first / *n as f64;
            *by_occurrence += first;
            *favourites += if all == 0 { 0.0 } else { top as f64 / all as f64 };
        }
        sums
    };
    let found = sums(&|at| rows[at]);
    let mut chance = Sums::default();
    for round in 0..options.shuffles as u64 {
        let stream = Stream::new(&[options.seed, 0x766f_6361, layer.number as u64, kind, round]);
        let order = shuffled(stream, rows.len());
        let drawn = sums(&|at| rows[order[at]]);
        chance.0.iter_mut().zip(drawn.0).for_each(|(sum, x)| *sum += x);
    }
    let figure = |at: usize, over: usize| {
        let rounds = options.shuffles as f64 * over as f64;
        Figure::new(ratio(found.0[at], over as f64), ratio(chance.0[at], rounds), None)
    };
    ByIds {
        ids: count as u64,
        occurrences: occurrences as u64,
        favourite: figure(0, count),
        favourite_by_occurrence: figure(1, occurrences),
        favourites: figure(2, count),
    }
}

/// The ids of a trace against the experts of a layer.
pub(crate) fn of(trace: &Trace, layer: &Layer, options: &Options) -> Vocabulary {
    Vocabulary {
        input: by_ids(layer, &trace.tokens, 0, options),
        target: by_ids(layer, &trace.targets, 1, options),
        predicted: by_ids(layer, &trace.predicted, 2, options),
    }
}
