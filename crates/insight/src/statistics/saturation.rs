//! Saturation: how early in a run the routing is what it is at its end.

use super::numbers::{Figure, apart, ratio, share};
use super::view::{Layer, layers};
use crate::error::{InsightError, Result};
use crate::trace::{Trace, name};
use serde::{Deserialize, Serialize};

/// How far a layer's routing at one moment of a run is that of its end (OLMoE 2409.02060, section 5.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Saturation {
    /// The layer, by number.
    pub layer: usize,
    /// Tokens with an expert in both traces.
    pub tokens: u64,
    /// The mean of |A ∩ B| / |B|, A and B the experts of a token then and at the end. By chance: |A|/E. By load: Σ_{e in B} a_e / |B|, a_e
    /// the share of the tokens that had expert e then.
    pub experts: Figure,
    /// The share of tokens with the same first choice. By chance: 1/E. By load: Σ_e a_e·b_e, the shares of the expert among
    /// first choices then and at the end.
    pub first: Figure,
}

/// How far the routing in `then` is that in `end`: two traces of the same tokens, by the same model at two moments of a run.
pub fn saturation(then: &Trace, end: &Trace) -> Result<Vec<Saturation>> {
    let (a, b) = (layers(then)?, layers(end)?);
    for (column, same) in [
        ("tokens", then.tokens == end.tokens),
        ("sequence", then.sequence == end.sequence),
        ("position", then.position == end.position),
    ] {
        if !same {
            return Err(InsightError::tensor(column, "differs: the two traces are not of the same tokens"));
        }
    }
    let numbers = |layers: &[Layer]| layers.iter().map(|layer| layer.number).collect::<Vec<_>>();
    if numbers(&a) != numbers(&b) {
        let what =
            format!("layers {:?} and {:?}: expected the same in both traces", numbers(&a), numbers(&b));
        return Err(InsightError::trace(what));
    }
    a.iter().zip(&b).map(|(a, b)| of(a, b)).collect()
}

/// The saturation of a layer.
fn of(then: &Layer, end: &Layer) -> Result<Saturation> {
    let experts = then.experts.max(end.experts);
    if let (Some(a), Some(b)) = (then.trace.count, end.trace.count)
        && a != b
    {
        let what = format!("has {a} experts in one trace and {b} in the other");
        return Err(InsightError::tensor(&name("experts", then.number), what));
    }
    let both = |row: &&usize| !then.sets.get(**row).is_empty() && !end.sets.get(**row).is_empty();
    let rows: Vec<usize> = then.seen.iter().filter(both).copied().collect();
    let mut shares = vec![0u64; experts];
    let (mut left, mut right) = (vec![0u64; experts], vec![0u64; experts]);
    let (mut same, mut same_first, mut even) = (0.0, 0, 0.0);
    for row in &rows {
        let (a, b) = (then.sets.get(*row), end.sets.get(*row));
        a.iter().for_each(|id| shares[usize::from(*id)] += 1);
        same += b.iter().filter(|id| a.contains(id)).count() as f64 / b.len() as f64;
        // |A|/E, of which apart(E, 1, |A|) is the complement.
        even += 1.0 - apart(experts, 1, a.len());
        left[usize::from(a[0])] += 1;
        right[usize::from(b[0])] += 1;
        same_first += u64::from(a[0] == b[0]);
    }
    let n = rows.len() as f64;
    let by_load: f64 = rows
        .iter()
        .map(|row| {
            let b = end.sets.get(*row);
            b.iter().map(|id| shares[usize::from(*id)] as f64 / n).sum::<f64>() / b.len() as f64
        })
        .sum();
    let met: f64 = left.iter().zip(&right).map(|(a, b)| *a as f64 / n * (*b as f64 / n)).sum();
    let some = !rows.is_empty();
    Ok(Saturation {
        layer: then.number,
        tokens: rows.len() as u64,
        experts: Figure::new(ratio(same, n), ratio(even, n), ratio(by_load, n)),
        first: Figure::new(
            share(same_first, rows.len() as u64),
            some.then(|| 1.0 / experts as f64),
            some.then_some(met),
        ),
    })
}
