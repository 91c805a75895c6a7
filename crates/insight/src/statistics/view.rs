//! What statistics look at: the experts of each token in one layer, and the texts that tokens are from.

use crate::error::{InsightError, Result};
use crate::trace::{EMPTY, LayerTrace, Trace, name};
use std::collections::BTreeMap;

/// The most experts of a layer that there are statistics of: tables of pairs have the square of it.
pub const MOST_EXPERTS: usize = 4096;
/// The most cells of a table of experts by domains.
const MOST_CELLS: usize = 1 << 24;

/// A set of experts for each token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sets {
    /// Where the set of a token begins, and where that of the last ends: \[N + 1\].
    starts: Vec<usize>,
    /// The experts, of all tokens one after another.
    ids: Vec<u16>,
}

impl Sets {
    /// Those of slots \[N, K\], in the order of the slots, each expert once; ids of `experts` and above are in none.
    pub fn of(slots: &[u16], top_k: usize, experts: usize) -> Self {
        let mut sets = Self { starts: vec![0], ids: Vec::with_capacity(slots.len()) };
        for row in slots.chunks(top_k.max(1)) {
            let start = sets.ids.len();
            for id in row.iter().filter(|id| usize::from(**id) < experts) {
                if !sets.ids[start..].contains(id) {
                    sets.ids.push(*id);
                }
            }
            sets.starts.push(sets.ids.len());
        }
        sets
    }

    /// The experts of a token.
    pub fn get(&self, row: usize) -> &[u16] {
        &self.ids[self.starts[row]..self.starts[row + 1]]
    }

    /// The same as indices.
    pub fn each(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        self.get(row).iter().map(|id| usize::from(*id))
    }

    /// The first choice of a token.
    pub fn first(&self, row: usize) -> Option<usize> {
        self.get(row).first().map(|id| usize::from(*id))
    }

    /// Experts of all tokens.
    pub fn total(&self) -> usize {
        self.ids.len()
    }

    /// Tokens that have each expert: \[E\].
    pub fn counts(&self, experts: usize) -> Vec<u64> {
        let mut counts = vec![0; experts];
        self.ids.iter().for_each(|id| counts[usize::from(*id)] += 1);
        counts
    }
}

/// One layer of a trace.
pub(crate) struct Layer<'a> {
    pub number: usize,
    pub trace: &'a LayerTrace,
    /// E: as the trace says, or one more than the highest id.
    pub experts: usize,
    pub sets: Sets,
    /// Tokens that the layer saw: such as have an expert, one that computes nothing, or lost one to a capacity.
    pub seen: Vec<usize>,
    /// Tokens that have each expert: \[E\].
    pub counts: Vec<u64>,
}

impl<'a> Layer<'a> {
    pub fn new(number: usize, trace: &'a LayerTrace) -> Result<Self> {
        let highest = trace.experts.iter().filter(|id| **id != EMPTY).max();
        let experts = trace.count.unwrap_or(highest.map_or(0, |id| usize::from(*id) + 1));
        if experts > MOST_EXPERTS {
            let what = format!("{experts} experts; there are statistics of {MOST_EXPERTS} at most");
            return Err(InsightError::tensor(&name("experts", number), what));
        }
        let sets = Sets::of(&trace.experts, trace.top_k, experts);
        let used =
            |(ids, dropped): (&[u16], &[u8])| ids.iter().any(|id| *id != EMPTY) || dropped.contains(&1);
        let rows = trace.experts.chunks(trace.top_k.max(1)).zip(trace.dropped.chunks(trace.top_k.max(1)));
        let seen = rows.enumerate().filter(|(_, row)| used(*row)).map(|(at, _)| at).collect();
        let counts = sets.counts(experts);
        Ok(Self { number, trace, experts, sets, seen, counts })
    }

    /// Experts of a token that the layer saw, on average; K where each token has K. 0 where there are no tokens.
    pub fn mean_k(&self) -> f64 {
        if self.seen.is_empty() { 0.0 } else { self.sets.total() as f64 / self.seen.len() as f64 }
    }

    /// k/E: the share of tokens at an expert, if all experts are alike.
    pub fn even(&self) -> Option<f64> {
        super::numbers::ratio(self.mean_k(), self.experts as f64)
    }

    /// The share of the tokens that each expert has: \[E\].
    pub fn shares(&self) -> Vec<f64> {
        let tokens = self.seen.len().max(1) as f64;
        self.counts.iter().map(|n| *n as f64 / tokens).collect()
    }

    /// Refuses tables that would not fit into memory.
    fn check_domains(&self, domains: usize) -> Result<()> {
        if self.experts.saturating_mul(domains) > MOST_CELLS {
            let what = format!("{} experts by {domains} domains are more than {MOST_CELLS}", self.experts);
            return Err(InsightError::tensor(&name("experts", self.number), what));
        }
        Ok(())
    }
}

/// The layers of a trace that is sound.
pub(crate) fn layers(trace: &Trace) -> Result<Vec<Layer<'_>>> {
    trace.validate()?;
    let domains = trace.about.domains.len();
    let mut layers = Vec::with_capacity(trace.layers.len());
    for (l, layer) in &trace.layers {
        let layer = Layer::new(*l, layer)?;
        layer.check_domains(domains)?;
        layers.push(layer);
    }
    Ok(layers)
}

/// The rows of each text, by their number, each in the order of positions.
pub(crate) fn texts(trace: &Trace) -> Vec<Vec<usize>> {
    let mut texts: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (row, sequence) in trace.sequence.iter().enumerate() {
        texts.entry(*sequence).or_default().push(row);
    }
    let mut texts: Vec<Vec<usize>> = texts.into_values().collect();
    texts.iter_mut().for_each(|rows| rows.sort_by_key(|row| trace.position[*row]));
    texts
}

/// Rows that follow each other in a text.
pub(crate) fn neighbours<'a>(
    trace: &'a Trace,
    texts: &'a [Vec<usize>],
) -> impl Iterator<Item = (usize, usize)> + 'a {
    let follows = |a: usize, b: usize| trace.position[a].checked_add(1) == Some(trace.position[b]);
    texts
        .iter()
        .flat_map(|rows| rows.iter().zip(rows.iter().skip(1)))
        .map(|(a, b)| (*a, *b))
        .filter(move |(a, b)| follows(*a, *b))
}
