//! Paths: which first choices follow each other from layer to layer.

use super::Options;
use super::numbers::{Figure, Information, ratio, share};
use super::view::Layer;
use crate::trace::Trace;
use serde::{Deserialize, Serialize};

/// The first choices of tokens in one layer against those in the next.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Transition {
    /// The two layers, by number.
    pub layers: (usize, usize),
    /// Tokens with a first choice in both.
    pub tokens: u64,
    /// Tokens by first choice there and here: \[E, E'\]. None where either has more experts than [`Options::matrices_up_to`].
    pub counts: Option<Vec<Vec<u64>>>,
    /// P(here | there), the same over the sums of its rows: \[E, E'\].
    pub shares: Option<Vec<Vec<Option<f64>>>>,
    /// What `shares` are if the layers know nothing of each other: the share of each first choice here, \[E'\].
    pub by_load: Vec<Option<f64>>,
    /// What the first choice there tells of that here.
    pub information: Information,
    /// How often the likeliest expert here, given that there, is the one: what reading experts ahead could reach, on the same
    /// tokens. By chance: 1/E'. By load: the greatest share here.
    pub guess: Figure,
    /// The same where the likeliest expert is found in one half of the documents, and tried on the other: what reading ahead would reach on
    /// new text. By load: the greatest share there.
    pub guess_elsewhere: Figure,
}

/// The frequent paths through some layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Paths {
    /// The layers, by number.
    pub layers: Vec<usize>,
    /// Tokens with a first choice in all of them.
    pub tokens: u64,
    /// Paths that at least one token takes.
    pub distinct: u64,
    /// The most frequent, most frequent first; of equally frequent ones the lowest experts.
    pub frequent: Vec<Path>,
}

/// A path: the first choices of a token in layers that follow each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Path {
    /// The experts, one for each layer.
    pub experts: Vec<u16>,
    /// Tokens that take it.
    pub tokens: u64,
    /// The same over all tokens. By chance: Π 1/E. By load: the product of the shares of the experts in their layers, over the same
    /// tokens.
    pub share: Figure,
}

/// The transition from one layer to another.
pub(crate) fn transition(trace: &Trace, from: &Layer, to: &Layer, options: &Options) -> Transition {
    let (rows, columns) = (from.experts, to.experts);
    // Those of documents of even and of odd numbers.
    let mut halves = [vec![0u64; rows * columns], vec![0u64; rows * columns]];
    for row in &from.seen {
        if let (Some(a), Some(b)) = (from.sets.first(*row), to.sets.first(*row)) {
            halves[trace.document(*row) as usize % 2][a * columns + b] += 1;
        }
    }
    let table: Vec<u64> = halves[0].iter().zip(&halves[1]).map(|(a, b)| a + b).collect();
    let tokens: u64 = table.iter().sum();
    let mut here = vec![0u64; columns];
    table.chunks(columns.max(1)).for_each(|row| here.iter_mut().zip(row).for_each(|(sum, n)| *sum += n));
    let guessed: u64 = table.chunks(columns.max(1)).filter_map(|row| row.iter().max()).sum();
    let whole = rows.max(columns) <= options.matrices_up_to;
    let shares = |row: &[u64]| {
        let sum = row.iter().sum();
        row.iter().map(|n| share(*n, sum)).collect::<Vec<_>>()
    };
    Transition {
        layers: (from.number, to.number),
        tokens,
        counts: whole.then(|| table.chunks(columns.max(1)).map(<[u64]>::to_vec).collect()),
        shares: whole.then(|| table.chunks(columns.max(1)).map(shares).collect()),
        by_load: here.iter().map(|n| share(*n, tokens)).collect(),
        information: Information::of(&table, columns, 1.0),
        guess: Figure::new(
            share(guessed, tokens),
            (tokens > 0).then(|| 1.0 / columns as f64),
            share(here.iter().copied().max().unwrap_or(0), tokens),
        ),
        guess_elsewhere: elsewhere(&halves[0], &halves[1], columns),
    }
}

/// How often the likeliest of a row of one table \[E, E'\] is right in another.
fn elsewhere(made: &[u64], tried: &[u64], columns: usize) -> Figure {
    let likeliest = |row: &[u64]| {
        let most = row.iter().enumerate().max_by_key(|(at, n)| (**n, std::cmp::Reverse(*at)));
        most.map_or(0, |(at, _)| at)
    };
    let sums = |table: &[u64]| {
        let mut sums = vec![0u64; columns];
        table.chunks(columns.max(1)).for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, n)| *sum += n));
        sums
    };
    let (made_of, tried_of) = (sums(made), sums(tried));
    let (known, tokens): (u64, u64) = (made_of.iter().sum(), tried_of.iter().sum());
    if known == 0 || tokens == 0 {
        return Figure::default();
    }
    // Where an expert was not seen, the guess is the expert that is busiest.
    let busiest = likeliest(&made_of);
    let rows = made.chunks(columns).zip(tried.chunks(columns));
    let right = rows.map(|(made, tried)| match made.iter().any(|n| *n > 0) {
        true => tried[likeliest(made)],
        false => tried[busiest],
    });
    Figure::new(share(right.sum(), tokens), Some(1.0 / columns as f64), share(tried_of[busiest], tokens))
}

/// The frequent paths through these layers.
pub(crate) fn through(layers: &[&Layer], options: &Options) -> Paths {
    let Some(first) = layers.first() else { return Paths::default() };
    let path = |row: &usize| -> Option<Vec<u16>> {
        layers.iter().map(|layer| layer.sets.first(*row).map(|e| e as u16)).collect()
    };
    let mut all: Vec<Vec<u16>> = first.seen.iter().filter_map(path).collect();
    all.sort_unstable();
    let tokens = all.len() as u64;
    let mut loads: Vec<Vec<u64>> = layers.iter().map(|layer| vec![0; layer.experts]).collect();
    for path in &all {
        loads.iter_mut().zip(path).for_each(|(load, e)| load[usize::from(*e)] += 1);
    }
    let even: f64 = layers.iter().map(|layer| 1.0 / layer.experts.max(1) as f64).product();
    let mut found: Vec<(u64, &Vec<u16>)> =
        all.chunk_by(|a, b| a == b).map(|same| (same.len() as u64, &same[0])).collect();
    let distinct = found.len() as u64;
    // Stable: the lowest of equally frequent ones stay before the others.
    found.sort_by_key(|(n, _)| std::cmp::Reverse(*n));
    found.truncate(options.paths);
    let path = |(n, experts): (u64, &Vec<u16>)| {
        let each = loads.iter().zip(experts).map(|(load, e)| load[usize::from(*e)] as f64 / tokens as f64);
        Path {
            experts: experts.clone(),
            tokens: n,
            share: Figure::new(ratio(n as f64, tokens as f64), Some(even), Some(each.product())),
        }
    };
    Paths {
        layers: layers.iter().map(|layer| layer.number).collect(),
        tokens,
        distinct,
        frequent: found.into_iter().map(path).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_is_tried_on_other_text() {
        // After 0 comes 1, after 1 comes 0; in the other half after 1 comes 1 half of the time, and 2 was not seen before.
        let made = [0, 4, 0, 3, 1, 0, 0, 0, 0];
        let tried = [1, 3, 0, 2, 2, 0, 1, 1, 0];
        let found = elsewhere(&made, &tried, 3);
        // 3 and 2 right, and of the unseen expert's followers those of the busiest, 1.
        assert_eq!(found.value, Some(6.0 / 10.0));
        assert_eq!(found.by_load, Some(6.0 / 10.0));
        assert_eq!(elsewhere(&made, &[0; 9], 3), Figure::default());
    }
}
