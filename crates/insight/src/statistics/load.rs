//! Load: how much each expert does, and how far from even that is.

use super::numbers::{Figure, entropy, expected_greatest, ratio, share};
use super::view::Layer;
use serde::{Deserialize, Serialize};

/// An expert with less than this share of an even load is dead.
pub const DEAD: f64 = 0.001;

/// The load of a layer's experts. Empty slots count nowhere; ids of E and above are experts that compute nothing and are counted
/// apart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Tokens that the layer saw.
    pub tokens: u64,
    /// Slots with an expert that computes.
    pub assignments: u64,
    /// Slots with an expert that computes nothing.
    pub idle: u64,
    /// Slots whose expert a capacity took away.
    pub dropped: u64,
    /// Experts that compute, of each token, on average.
    pub experts_per_token: Option<f64>,
    /// Assignments of each expert: \[E\].
    pub counts: Vec<u64>,
    /// The same over all assignments: \[E\]; 1/E where it is even.
    pub shares: Vec<Option<f64>>,
    /// The sum of each expert's weights, which Shazeer et al. (1701.06538) call its importance: \[E\]. A weight is what the
    /// expert's output is multiplied with; what weights of a token sum to is the router's own affair.
    pub importance: Vec<f64>,
    /// The mean weight of each expert where it is chosen: \[E\].
    pub mean_weights: Vec<Option<f64>>,
    /// Standard deviation over mean of `counts` (of the population). By chance: √((1 - p)/(T·p)), p = k/E.
    pub cv: Figure,
    /// The same of `importance`. Even weights would give the same chance as counts.
    pub importance_cv: Figure,
    /// The greatest of `counts` over their mean. By chance: 1 + cv · the expected greatest of E normal values.
    pub max_over_mean: Figure,
    /// Entropy of the shares over ln E: 1 where all are even. By chance: 1 - cv²/(2·ln E).
    pub entropy: Figure,
    /// Experts with less than [`DEAD`] of an even load, by number.
    pub dead: Vec<u16>,
    /// How many those are. By chance: E·(1 - p)^T, the experts that no token happens to choose.
    pub dead_count: Figure,
}

/// The coefficient of variation, of the population.
pub(crate) fn cv(values: impl Iterator<Item = f64> + Clone) -> Option<f64> {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let variance = values.map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    ratio(variance.sqrt(), mean)
}

/// Assignments of each expert among slots; what has no expert that computes is passed over.
pub(crate) fn assignments(slots: &[u16], experts: usize) -> Vec<u64> {
    let mut counts = vec![0; experts];
    for id in slots {
        if let Some(count) = counts.get_mut(usize::from(*id)) {
            *count += 1;
        }
    }
    counts
}

/// The load of a layer.
pub(crate) fn of(layer: &Layer) -> Load {
    let (experts, trace) = (layer.experts, layer.trace);
    let counts = assignments(&trace.experts, experts);
    let mut importance = vec![0.0; experts];
    for (id, weight) in trace.experts.iter().zip(&trace.weights) {
        if let Some(sum) = importance.get_mut(usize::from(*id)) {
            *sum += f64::from(*weight);
        }
    }
    let total: u64 = counts.iter().sum();
    let filled = trace.experts.iter().filter(|id| **id != crate::EMPTY).count() as u64;
    let (tokens, p) = (layer.seen.len() as f64, layer.even());
    let chance = p.and_then(|p| ratio(((1.0 - p) / p).max(0.0).sqrt(), tokens.sqrt()));
    let ln = (experts > 1).then(|| (experts as f64).ln());
    let even = ratio(total as f64, experts as f64);
    let dead: Vec<u16> = match even {
        Some(even) if total > 0 => {
            (0..experts).filter(|e| (counts[*e] as f64) < DEAD * even).map(|e| e as u16).collect()
        }
        _ => Vec::new(),
    };
    let max = counts.iter().copied().max().unwrap_or(0) as f64;
    let dead_chance = p.filter(|_| total > 0).map(|p| experts as f64 * (1.0 - p).max(0.0).powf(tokens));
    let entropies = ln.filter(|_| total > 0).map(|ln| entropy(&counts) / ln);
    Load {
        tokens: layer.seen.len() as u64,
        assignments: total,
        idle: filled - total,
        dropped: trace.dropped.iter().filter(|dropped| **dropped == 1).count() as u64,
        experts_per_token: ratio(total as f64, tokens),
        shares: counts.iter().map(|n| share(*n, total)).collect(),
        mean_weights: importance.iter().zip(&counts).map(|(sum, n)| ratio(*sum, *n as f64)).collect(),
        cv: Figure::new(cv(counts.iter().map(|n| *n as f64)), chance, None),
        importance_cv: Figure::new(cv(importance.iter().copied()), chance, None),
        max_over_mean: Figure::new(
            even.and_then(|even| ratio(max, even)),
            chance.map(|cv| 1.0 + cv * expected_greatest(experts)),
            None,
        ),
        entropy: Figure::new(
            entropies,
            ln.zip(chance).map(|(ln, cv)| (1.0 - cv * cv / (2.0 * ln)).max(0.0)),
            None,
        ),
        dead_count: Figure::new((total > 0).then_some(dead.len() as f64), dead_chance, None),
        dead,
        importance,
        counts,
    }
}
