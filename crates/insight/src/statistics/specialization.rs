//! Specialisation: what experts have to do with the classes of tokens, which are domains or places in a text.

use super::Options;
use super::numbers::{Entropies, Information, share, shuffled};
use super::view::Layer;
use crate::trace::Trace;
use senmon_moe::rng::Stream;
use serde::{Deserialize, Serialize};

/// What experts have to do with classes of tokens. C classes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Specialization {
    /// Tokens of each class that the layer saw: \[C\].
    pub tokens: Vec<u64>,
    /// Tokens of each class at each expert: \[E, C\].
    pub counts: Vec<Vec<u64>>,
    /// The share of a class's tokens that have the expert: \[E, C\] (OLMoE 2409.02060, section 5.3).
    pub of_class: Vec<Vec<Option<f64>>>,
    /// What `of_class` is if all experts are alike: k/E.
    pub even: Option<f64>,
    /// What `of_class` is if no class differs from another: the share of all tokens that have the expert: \[E\].
    pub by_load: Vec<Option<f64>>,
    /// The share of an expert's tokens that are of the class: \[E, C\].
    pub of_expert: Vec<Vec<Option<f64>>>,
    /// What `of_expert` is if no expert differs from another: the share of all tokens that are of the class: \[C\].
    pub by_size: Vec<Option<f64>>,
    /// What an expert of a token tells of its class.
    pub information: Information,
}

/// The classes of tokens, told by row, against the experts of a layer.
fn of(layer: &Layer, classes: usize, class: impl Fn(usize) -> usize) -> Specialization {
    let e = layer.experts;
    let mut tokens = vec![0u64; classes];
    layer.seen.iter().for_each(|row| tokens[class(*row)] += 1);
    let table = table(layer, classes, class);
    let seen = layer.seen.len() as u64;
    let rows = |cell: &dyn Fn(usize, usize) -> Option<f64>| -> Vec<Vec<Option<f64>>> {
        (0..e).map(|i| (0..classes).map(|c| cell(i, c)).collect()).collect()
    };
    Specialization {
        counts: table.chunks(classes.max(1)).map(<[u64]>::to_vec).collect(),
        of_class: rows(&|i, c| share(table[i * classes + c], tokens[c])),
        even: layer.even(),
        by_load: layer.counts.iter().map(|n| share(*n, seen)).collect(),
        of_expert: rows(&|i, c| share(table[i * classes + c], layer.counts[i])),
        by_size: tokens.iter().map(|n| share(*n, seen)).collect(),
        information: Information::of(&table, classes, layer.mean_k()),
        tokens,
    }
}

/// Tokens of each class at each expert: \[E, C\].
fn table(layer: &Layer, classes: usize, class: impl Fn(usize) -> usize) -> Vec<u64> {
    let mut table = vec![0u64; layer.experts * classes];
    for row in &layer.seen {
        let class = class(*row);
        layer.sets.each(*row).for_each(|e| table[e * classes + class] += 1);
    }
    table
}

/// Rows that keep their domain together when domains are shuffled: those of one domain that follow each other in a document.
pub(crate) fn blocks(trace: &Trace, texts: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let rows: Vec<usize> = texts.iter().flatten().copied().collect();
    let kind = |row: usize| (trace.document(row), trace.domains[row]);
    rows.chunk_by(|a, b| kind(*a) == kind(*b)).map(<[usize]>::to_vec).collect()
}

/// Domains against the experts of a layer. `blocks` are whole texts, or parts of one domain ([`blocks`]).
pub(crate) fn of_domains(
    trace: &Trace,
    layer: &Layer,
    blocks: &[Vec<usize>],
    options: &Options,
) -> Specialization {
    let classes = trace.about.domains.len();
    let mut found = of(layer, classes, |row| usize::from(trace.domains[row]));
    let (mut nats, mut normalized) = (Vec::new(), Vec::new());
    for round in 0..options.shuffles as u64 {
        // The same for all layers.
        let order = shuffled(Stream::new(&[options.seed, 0x646f_6d61, round]), blocks.len());
        let mut domains = vec![0u16; trace.len()];
        for (rows, from) in blocks.iter().zip(order) {
            let domain = blocks[from].first().map_or(0, |row| trace.domains[*row]);
            rows.iter().for_each(|row| domains[*row] = domain);
        }
        let entropies = Entropies::of(&table(layer, classes, |row| usize::from(domains[row])), classes);
        nats.push(entropies.nats());
        normalized.extend(entropies.normalized());
    }
    let mean = |values: &[f64]| super::numbers::ratio(values.iter().sum::<f64>(), values.len() as f64);
    found.information.shuffled = mean(&nats);
    found.information.shuffled_normalized = mean(&normalized);
    found
}

/// The class of a position: 0; 1 and 2; 3 to 6; ... each twice as long as the one before.
pub(crate) fn stretch(position: u32) -> usize {
    (u64::from(position) + 1).ilog2() as usize
}

/// The first position of such a class.
pub(crate) fn stretch_start(class: usize) -> u32 {
    ((1u64 << class) - 1) as u32
}

/// The last position of such a class.
pub(crate) fn stretch_end(class: usize) -> u32 {
    u32::try_from((2u64 << class) - 2).unwrap_or(u32::MAX)
}

/// Places in texts against experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Positions {
    /// Where each class begins; it ends before the next: 0, 1, 3, 7, ...
    pub from: Vec<u32>,
    /// The classes against the experts. The information has no shuffles: every text has the same places.
    pub experts: Specialization,
}

/// Places in texts against the experts of a layer.
pub(crate) fn of_positions(trace: &Trace, layer: &Layer) -> Positions {
    let classes = trace.position.iter().map(|at| stretch(*at) + 1).max().unwrap_or(0);
    Positions {
        from: (0..classes).map(stretch_start).collect(),
        experts: of(layer, classes, |row| stretch(trace.position[row])),
    }
}
