//! Repeats: whether a token has the experts of the token before it.

use super::Options;
use super::numbers::{Figure, apart, ratio, share, shuffled};
use super::view::Layer;
use crate::trace::Trace;
use senmon_moe::rng::Stream;
use serde::{Deserialize, Serialize};

/// How often tokens have the experts of the token before them in their text (Mixtral 2401.04088, table 5).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Repeats {
    /// Over all texts.
    pub all: Repeat,
    /// By the domain of the first of the two: \[D\].
    pub domains: Vec<Repeat>,
}

/// How often tokens have the experts of the token before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Repeat {
    /// Pairs of tokens that follow each other in a text, both seen by the layer.
    pub pairs: u64,
    /// Pairs with the same first choice.
    pub same_first: u64,
    /// Pairs with at least one expert in common.
    pub common: u64,
    /// The share with the same first choice. By chance: 1/E. By load: Σ_e a_e·b_e, the shares of the expert among the first
    /// choices of the first and of the second tokens.
    pub first_rate: Figure,
    /// The share with an expert in common. By chance: 1 - C(E-a, b)/C(E, b) for a and b experts, the mean over pairs. By load: the same
    /// share after the second tokens were shuffled, the mean over seeded shuffles.
    pub common_rate: Figure,
}

/// How often the pairs repeat; `salt` parts the shuffles of one selection of pairs from those of another.
fn repeat(layer: &Layer, pairs: &[(usize, usize)], salt: u64, options: &Options) -> Repeat {
    let (sets, experts) = (&layer.sets, layer.experts);
    let common = |a: usize, b: usize| sets.get(a).iter().any(|id| sets.get(b).contains(id));
    let (mut same_first, mut shared) = (0, 0);
    let (mut left, mut right) = (vec![0u64; experts], vec![0u64; experts]);
    let mut sizes = std::collections::BTreeMap::new();
    for (a, b) in pairs {
        same_first += u64::from(sets.first(*a).is_some() && sets.first(*a) == sets.first(*b));
        shared += u64::from(common(*a, *b));
        for (first, side) in [(sets.first(*a), &mut left), (sets.first(*b), &mut right)] {
            if let Some(first) = first {
                side[first] += 1;
            }
        }
        *sizes.entry((sets.get(*a).len(), sets.get(*b).len())).or_insert(0u64) += 1;
    }
    let n = pairs.len() as f64;
    let met: u64 = left.iter().zip(&right).map(|(a, b)| a * b).sum();
    let apart: f64 = sizes.iter().map(|((a, b), times)| *times as f64 * apart(experts, *a, *b)).sum();
    let mut drawn = 0u64;
    for round in 0..options.shuffles as u64 {
        let stream = Stream::new(&[options.seed, 0x7265_7065, layer.number as u64, salt, round]);
        let order = shuffled(stream, pairs.len());
        drawn += pairs.iter().zip(order).filter(|((a, _), to)| common(*a, pairs[*to].1)).count() as u64;
    }
    let even = (!pairs.is_empty()).then(|| 1.0 / experts.max(1) as f64);
    Repeat {
        pairs: pairs.len() as u64,
        same_first,
        common: shared,
        first_rate: Figure::new(share(same_first, pairs.len() as u64), even, ratio(met as f64, n * n)),
        common_rate: Figure::new(
            share(shared, pairs.len() as u64),
            ratio(n - apart, n),
            ratio(drawn as f64, n * options.shuffles as f64),
        ),
    }
}

/// The repeats of a layer; `neighbours` are rows that follow each other in a text.
pub(crate) fn of(trace: &Trace, layer: &Layer, neighbours: &[(usize, usize)], options: &Options) -> Repeats {
    let mut seen = vec![false; trace.len()];
    layer.seen.iter().for_each(|row| seen[*row] = true);
    let pairs: Vec<(usize, usize)> =
        neighbours.iter().copied().filter(|(a, b)| seen[*a] && seen[*b]).collect();
    let mut by_domain = vec![Vec::new(); trace.about.domains.len()];
    pairs.iter().for_each(|pair| by_domain[usize::from(trace.domains[pair.0])].push(*pair));
    let domain = |(d, pairs): (usize, &Vec<_>)| repeat(layer, pairs, d as u64 + 1, options);
    Repeats {
        all: repeat(layer, &pairs, 0, options),
        domains: by_domain.iter().enumerate().map(domain).collect(),
    }
}
