//! Confidence: how sure a router is of its first choice, and how near to another choice it was.

use super::numbers::{Distribution, Figure};
use super::view::Layer;
use serde::{Deserialize, Serialize};

/// How sure a layer's router is. What needs logits is None where a trace has none.
///
/// Probabilities are the softmax of a token's logits over the experts, whatever the router makes of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Confidence {
    /// The greatest weight of a token.
    pub weight: Option<Distribution>,
    /// Its mean. By chance: the mean weight of a token's slots, which is what it would be if all were alike.
    pub mean_weight: Figure,
    /// The greatest probability of a token.
    pub probability: Option<Distribution>,
    /// Its mean. By chance: 1/E.
    pub mean_probability: Figure,
    /// With logits: the K-th greatest probability less the next, K the slots of the token that are not empty or lost theirs to
    /// a capacity. Without: the greatest weight less the second. 0 if all are alike.
    pub margin: Option<Distribution>,
    /// Its mean. By chance: 0.
    pub mean_margin: Figure,
    /// The entropy of a token's probabilities over ln E.
    pub entropy: Option<Distribution>,
    /// Its mean. By chance: 1.
    pub mean_entropy: Figure,
}

/// The softmax of a row of logits: \[E\]. None where one of them is NaN, or none is finite; -∞ is a probability of 0.
pub(crate) fn softmax(logits: &[f32]) -> Option<Vec<f64>> {
    let greatest = logits.iter().fold(f64::NEG_INFINITY, |m, x| m.max(f64::from(*x)));
    if !greatest.is_finite() || logits.iter().any(|x| x.is_nan()) {
        return None;
    }
    let mut p: Vec<f64> = logits.iter().map(|x| (f64::from(*x) - greatest).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
    Some(p)
}

/// The confidence of a layer's router.
pub(crate) fn of(layer: &Layer) -> Confidence {
    let (k, trace, experts) = (layer.trace.top_k, layer.trace, layer.experts);
    let (mut greatest, mut alike, mut between) = (Vec::new(), Vec::new(), Vec::new());
    let (mut probabilities, mut margins, mut entropies) = (Vec::new(), Vec::new(), Vec::new());
    for row in &layer.seen {
        let slots = row * k..(row + 1) * k;
        let ids = &trace.experts[slots.clone()];
        let mut weights: Vec<f64> = ids
            .iter()
            .zip(&trace.weights[slots.clone()])
            .filter(|(id, _)| **id != crate::EMPTY)
            .map(|(_, weight)| f64::from(*weight))
            .collect();
        weights.sort_by(|a, b| b.total_cmp(a));
        if let Some(first) = weights.first() {
            greatest.push(*first);
            alike.push(weights.iter().sum::<f64>() / weights.len() as f64);
        }
        if let [first, second, ..] = weights[..] {
            between.push(first - second);
        }
        let logits = trace.logits.as_ref().and_then(|logits| logits.get(row * experts..(row + 1) * experts));
        let Some(mut p) = logits.and_then(softmax) else { continue };
        if experts > 1 {
            let nats: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            entropies.push(nats / (experts as f64).ln());
        }
        p.sort_by(|a, b| b.total_cmp(a));
        probabilities.push(p[0]);
        let dropped = trace.dropped[slots].iter().filter(|dropped| **dropped == 1).count();
        let picked = weights.len() + dropped;
        if let (Some(last), Some(next)) = (picked.checked_sub(1).and_then(|at| p.get(at)), p.get(picked)) {
            margins.push(last - next);
        }
    }
    let mean = |values: &Option<Distribution>| values.map(|values| values.mean);
    let weight = Distribution::of(greatest);
    let probability = Distribution::of(probabilities);
    let margin = Distribution::of(if trace.logits.is_some() { margins } else { between });
    let entropy = Distribution::of(entropies);
    let only = |value: Option<f64>, chance: f64| Figure::new(value, value.map(|_| chance), None);
    Confidence {
        mean_weight: Figure::new(mean(&weight), mean(&Distribution::of(alike)), None),
        mean_probability: only(mean(&probability), 1.0 / experts.max(1) as f64),
        mean_margin: only(mean(&margin), 0.0),
        mean_entropy: only(mean(&entropy), 1.0),
        weight,
        probability,
        margin,
        entropy,
    }
}
