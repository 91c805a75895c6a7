//! Co-activation: which experts tokens use together.

use super::Options;
use super::numbers::{Figure, share};
use super::view::Layer;
use serde::{Deserialize, Serialize};

/// Which experts a layer's tokens use together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Coactivation {
    /// N_ij, the tokens that have both experts; N_i, the tokens of expert i, where i = j: \[E, E\]. None for layers of more
    /// experts than [`Options::matrices_up_to`].
    pub counts: Option<Vec<Vec<u64>>>,
    /// N_ij / N_i, the share of expert i's tokens that have expert j too: \[E, E\], 1 where i = j (OLMoE 2409.02060, section 5.2).
    pub shares: Option<Vec<Vec<Option<f64>>>>,
    /// What `shares` are if all experts are alike: (K - 1)/(E - 1), K the mean experts of a token.
    pub even: Option<f64>,
    /// What `shares` are by the loads alone: (K_i - 1) · N_j / Σ_{m ≠ i} N_m, where K_i is the mean of the experts that the tokens of
    /// i have: \[E, E\]. As many partners as there are, drawn by load.
    pub by_load: Option<Vec<Vec<Option<f64>>>>,
    /// The pairs that are together more often than by their loads, by (N_ij - expected)/√expected, greatest first.
    pub pairs: Vec<Pair>,
}

/// Two experts that tokens use together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The two, lowest first.
    pub experts: (u16, u16),
    /// Tokens that have both. By load: the mean of what the loads of the one and of the other give.
    pub tokens: Figure,
    /// `tokens` over what the loads give.
    pub lift: Option<f64>,
}

/// Tokens that have both experts: \[E, E\].
pub(crate) fn together(layer: &Layer) -> Vec<u64> {
    let e = layer.experts;
    let mut counts = vec![0u64; e * e];
    for row in &layer.seen {
        let set = layer.sets.get(*row);
        for a in set {
            let of_a = &mut counts[usize::from(*a) * e..][..e];
            set.iter().for_each(|b| of_a[usize::from(*b)] += 1);
        }
    }
    counts
}

/// The co-activation of a layer's experts.
pub(crate) fn of(layer: &Layer, options: &Options) -> Coactivation {
    let e = layer.experts;
    let counts = together(layer);
    let at = |i: usize, j: usize| counts[i * e + j];
    let total: u64 = layer.counts.iter().sum();
    // What a partner's tokens are multiplied with: (K_i - 1) / Σ_{m ≠ i} N_m.
    let pull: Vec<Option<f64>> = (0..e)
        .map(|i| {
            let partners: u64 = counts[i * e..][..e].iter().sum::<u64>() - at(i, i);
            share(partners, at(i, i)).and_then(|k| super::numbers::ratio(k, (total - at(i, i)) as f64))
        })
        .collect();
    let by_load = |i: usize, j: usize| match i == j {
        true => (at(i, i) > 0).then_some(1.0),
        false => pull[i].map(|pull| pull * at(j, j) as f64),
    };
    let even = super::numbers::ratio(layer.mean_k() - 1.0, e as f64 - 1.0).map(|p| p.max(0.0));
    let mut pairs = Vec::new();
    for i in 0..e {
        for j in i + 1..e {
            let expected = |i: usize, j: usize| by_load(i, j).unwrap_or(0.0) * at(i, i) as f64;
            let expected = (expected(i, j) + expected(j, i)) / 2.0;
            let found = at(i, j) as f64;
            if expected > 0.0 && found > expected {
                pairs.push(((found - expected) / expected.sqrt(), (i, j), expected));
            }
        }
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    pairs.truncate(options.pairs);
    let even_tokens = even.zip(layer.even()).map(|(even, p)| even * p * layer.seen.len() as f64);
    let pair = |(_, (i, j), expected): (f64, (usize, usize), f64)| Pair {
        experts: (i as u16, j as u16),
        tokens: Figure::new(Some(at(i, j) as f64), even_tokens, Some(expected)),
        lift: super::numbers::ratio(at(i, j) as f64, expected),
    };
    let whole = e <= options.matrices_up_to;
    fn matrix<T>(e: usize, cell: impl Fn(usize, usize) -> T) -> Vec<Vec<T>> {
        (0..e).map(|i| (0..e).map(|j| cell(i, j)).collect()).collect()
    }
    Coactivation {
        counts: whole.then(|| matrix(e, at)),
        shares: whole.then(|| matrix(e, |i, j| share(at(i, j), at(i, i)))),
        even,
        by_load: whole.then(|| matrix(e, by_load)),
        pairs: pairs.into_iter().map(pair).collect(),
    }
}
