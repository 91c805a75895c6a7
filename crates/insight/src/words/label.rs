//! Labels: of all that an expert's tokens may have in common, what tells most about whether a token is the expert's.

use super::{WordOptions, occurrences, place};
use crate::statistics::numbers::{ln_tail, ratio, share};
use crate::statistics::specialization::{stretch_end, stretch_start};
use crate::statistics::view::Layer;
use crate::trace::Trace;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// What a label is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelKind {
    /// The domain of the text.
    Domain,
    /// What the token is.
    Token,
    /// What follows the token.
    Next,
    /// Where in its text the token is.
    Position,
    /// Nothing stands out.
    #[default]
    None,
}

/// What an expert's tokens have in common.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// What it is about.
    pub kind: LabelKind,
    /// Its name: a domain, the texts of some tokens, positions.
    pub name: String,
    /// The domain.
    pub domain: Option<u16>,
    /// The ids of the tokens, or of those that follow; the more telling first.
    pub ids: Vec<u32>,
    /// The first and the last position.
    pub positions: Option<(u32, u32)>,
    /// The share of the expert's tokens that the label is true of.
    pub share: Option<f64>,
    /// The share of all tokens that it is true of: what `share` is by chance.
    pub chance: Option<f64>,
    /// The one over the other.
    pub lift: Option<f64>,
    /// The expert's tokens that it is true of.
    pub evidence: u64,
    /// The documents that those are from: one alone may be its own topic.
    pub texts: u64,
    /// The likelihood ratio G² of the two by two table of tokens by label and by expert, twice the mutual information times the
    /// number of tokens (Dunning 1993).
    pub g2: f64,
    /// ln of the probability of such a G² by chance, √G² being normal, times the number of labels, experts and layers that were tried
    /// (Bonferroni), at most 0. It takes tokens to be independent, which those of one text are not.
    pub ln_p: f64,
}

impl Label {
    /// Whether the label is true of tokens of a trace, by row.
    pub fn covering<'a>(&'a self, trace: &'a Trace) -> impl Fn(usize) -> bool + 'a {
        let ids: HashSet<u32> = self.ids.iter().copied().collect();
        move |row| {
            let holds = |column: &[u32]| column.get(row).is_some_and(|id| ids.contains(id));
            match self.kind {
                LabelKind::Domain => self.domain.is_some() && trace.domains.get(row).copied() == self.domain,
                LabelKind::Token => holds(&trace.tokens),
                LabelKind::Next => holds(&trace.targets),
                LabelKind::Position => {
                    let within = |(from, to): (u32, u32)| {
                        trace.position.get(row).is_some_and(|at| (from..=to).contains(at))
                    };
                    self.positions.is_some_and(within)
                }
                LabelKind::None => false,
            }
        }
    }
}

/// What tokens of a layer's experts have in common.
pub(super) struct Evidence {
    /// Labels that are tried with each expert.
    pub labels: usize,
    /// Tokens of each domain \[D\], and of each at each expert \[E, D\].
    pub domains: Vec<u64>,
    pub domain: Vec<Vec<u64>>,
    /// Tokens at each place \[C\], and at each place and expert \[E, C\].
    pub positions: Vec<u64>,
    pub position: Vec<Vec<u64>>,
    /// Tokens of each id that occurs often enough; ids of each expert that it has often enough, and how often.
    pub inputs: BTreeMap<u32, u64>,
    pub input: Vec<Vec<(u32, u64)>>,
    /// The same of the tokens that follow.
    pub targets: BTreeMap<u32, u64>,
    pub target: Vec<Vec<(u32, u64)>>,
    /// The tokens of each expert, by row, with its weight: \[E\], each in the order of the trace.
    pub rows: Vec<Vec<(usize, f32)>>,
}

impl Evidence {
    pub fn of(trace: &Trace, layer: &Layer, options: &WordOptions) -> Self {
        let classes = |classes: usize, class: &dyn Fn(usize) -> usize| {
            let (mut all, mut each) = (vec![0; classes], vec![vec![0; classes]; layer.experts]);
            for row in &layer.seen {
                all[class(*row)] += 1;
                layer.sets.each(*row).for_each(|e| each[e][class(*row)] += 1);
            }
            (all, each)
        };
        let places = (0..trace.len()).map(|row| place(trace, row) + 1).max().unwrap_or(0);
        let (domains, domain) = classes(trace.about.domains.len(), &|row| usize::from(trace.domains[row]));
        let (positions, position) = classes(places, &|row| place(trace, row));
        let (inputs, input) = by_ids(layer, &trace.tokens, options);
        let (targets, target) = by_ids(layer, &trace.targets, options);
        // Places: each, and each with all before or after it.
        let labels = domains.len() + inputs.len() + targets.len() + 3 * positions.len();
        let (k, mut rows) = (layer.trace.top_k, vec![Vec::new(); layer.experts]);
        for (slot, (id, weight)) in layer.trace.experts.iter().zip(&layer.trace.weights).enumerate() {
            if let Some(rows) = rows.get_mut(usize::from(*id)) {
                rows.push((slot / k, *weight));
            }
        }
        Self { labels, domains, domain, positions, position, inputs, input, targets, target, rows }
    }

    /// What of an expert is beyond chance, of each kind: the domain, the tokens, those that follow, the place.
    pub fn notable(
        &self,
        trace: &Trace,
        layer: &Layer,
        e: usize,
        tests: usize,
        options: &WordOptions,
    ) -> Vec<Label> {
        let tester = Tester { tokens: layer.seen.len() as u64, mine: layer.counts[e], tests, options };
        let mut found = Vec::new();
        let domains = self.domain[e].iter().zip(&self.domains).enumerate();
        found.extend(best(domains.filter_map(|(d, (count, all))| {
            let label =
                Label { domain: Some(d as u16), name: trace.about.domains[d].clone(), ..Label::default() };
            tester.test(LabelKind::Domain, *count, *all, label)
        })));
        for (kind, counts, all) in [
            (LabelKind::Token, &self.input[e], &self.inputs),
            (LabelKind::Next, &self.target[e], &self.targets),
        ] {
            found.extend(tester.union(kind, counts, all));
        }
        found.extend(best(self.places(e).filter_map(|(from, to, count, all)| {
            let label = Label { positions: Some((from, to)), ..Label::default() };
            tester.test(LabelKind::Position, count, all, label)
        })));
        found
    }

    /// Places alone, with all before them, with all after them: first and last position, tokens of the expert and of all.
    fn places(&self, e: usize) -> impl Iterator<Item = (u32, u32, u64, u64)> + '_ {
        let n = self.positions.len();
        let spans = (0..n).flat_map(move |at| [(at, at), (0, at), (at, n - 1)]);
        spans.map(move |(first, last)| {
            let sum = |counts: &[u64]| counts[first..=last].iter().sum();
            let end = if last + 1 == n { u32::MAX } else { stretch_end(last) };
            (stretch_start(first), end, sum(&self.position[e]), sum(&self.positions))
        })
    }
}

/// Tokens of each id, and of each id at each expert.
fn by_ids(layer: &Layer, ids: &[u32], options: &WordOptions) -> (BTreeMap<u32, u64>, Vec<Vec<(u32, u64)>>) {
    let least = options.min_count.max(1);
    let (mut all, mut each) = (BTreeMap::new(), vec![Vec::new(); layer.experts]);
    let mut counts = vec![0u64; layer.experts];
    for (id, rows) in occurrences(layer, ids) {
        if (rows.len() as u64) < least {
            continue;
        }
        let mut used = Vec::new();
        for e in rows.iter().flat_map(|row| layer.sets.each(*row)) {
            if counts[e] == 0 {
                used.push(e);
            }
            counts[e] += 1;
        }
        for e in used {
            let count = std::mem::take(&mut counts[e]);
            if count >= least {
                each[e].push((id, count));
            }
        }
        all.insert(id, rows.len() as u64);
    }
    (all, each)
}

/// Tests what an expert's tokens have in common.
struct Tester<'a> {
    /// Tokens of the layer and of the expert.
    tokens: u64,
    mine: u64,
    tests: usize,
    options: &'a WordOptions,
}

impl Tester<'_> {
    /// The label with its figures, where it is beyond chance: `count` of the expert's tokens have it, `all` of all.
    fn test(&self, kind: LabelKind, count: u64, all: u64, label: Label) -> Option<Label> {
        let (share, chance) = (share(count, self.mine)?, share(all, self.tokens)?);
        let lift = ratio(share, chance)?;
        let g2 = g2(count, self.mine, all, self.tokens);
        // One side only: a share below chance is no label.
        let ln_p = (ln_tail(g2.sqrt()) + (self.tests.max(1) as f64).ln()).min(0.0);
        let stands_out = lift >= self.options.lift && share > chance && ln_p < self.options.level.ln();
        stands_out.then_some(Label {
            kind,
            share: Some(share),
            chance: Some(chance),
            lift: Some(lift),
            evidence: count,
            g2,
            ln_p,
            ..label
        })
    }

    /// All ids that are beyond chance, as one label.
    fn union(&self, kind: LabelKind, counts: &[(u32, u64)], all: &BTreeMap<u32, u64>) -> Option<Label> {
        let of_all = |id: &u32| all.get(id).copied().unwrap_or(0);
        let each = counts.iter().filter_map(|(id, count)| {
            let label = self.test(kind, *count, of_all(id), Label::default())?;
            Some((label.g2, *id, *count))
        });
        let mut each: Vec<(f64, u32, u64)> = each.collect();
        each.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let count = each.iter().map(|(_, _, count)| count).sum();
        let sum = each.iter().map(|(_, id, _)| of_all(id)).sum();
        let ids = each.into_iter().map(|(_, id, _)| id).collect();
        self.test(kind, count, sum, Label { ids, ..Label::default() })
    }
}

/// The label of the greatest G², the first of several.
fn best(labels: impl Iterator<Item = Label>) -> Option<Label> {
    labels.fold(None, |best: Option<Label>, label| match best {
        Some(best) if best.g2 >= label.g2 => Some(best),
        _ => Some(label),
    })
}

/// What tells most about an expert's tokens, which are `rows`; of equals a domain before tokens, these before what follows, this
/// before a place.
pub(super) fn choose(
    trace: &Trace,
    rows: &[(usize, f32)],
    labels: &[Label],
    text: &(dyn Fn(u32) -> String + Sync),
) -> Label {
    let mut label = best(labels.iter().cloned()).unwrap_or_default();
    let covers = label.covering(trace);
    let covered = rows.iter().filter(|(row, _)| covers(*row));
    let texts: BTreeSet<u32> = covered.map(|(row, _)| trace.document(*row)).collect();
    drop(covers);
    label.texts = texts.len() as u64;
    match label.kind {
        LabelKind::Token | LabelKind::Next => {
            let names: Vec<String> = label.ids.iter().take(3).map(|id| text(*id)).collect();
            label.name = names.join(" ");
        }
        LabelKind::Position => {
            label.name = match label.positions {
                Some((from, to)) if from == to => from.to_string(),
                Some((from, u32::MAX)) => format!("{from}–"),
                Some((from, to)) => format!("{from}–{to}"),
                None => String::new(),
            };
        }
        LabelKind::Domain | LabelKind::None => {}
    }
    label
}

/// The likelihood ratio of the table of `n` tokens by whether they are of the expert (`mine`) and have the label (`all`), `count` both.
fn g2(count: u64, mine: u64, all: u64, n: u64) -> f64 {
    let cell = |found: u64, row: u64, column: u64| {
        let expected = row as f64 * (column as f64 / n as f64);
        if found == 0 { 0.0 } else { found as f64 * (found as f64 / expected).ln() }
    };
    let (others, without) = (n - mine, n - all);
    let sum = cell(count, mine, all)
        + cell(mine - count, mine, without)
        + cell(all - count, others, all)
        + cell(others + count - all, others, without);
    (2.0 * sum).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_likelihood_ratio_is_twice_the_information_of_its_table() {
        assert!(g2(20, 40, 50, 100).abs() < 1e-9);
        // All of the expert's tokens have the label, and no other: ln 2 for each of 100 tokens, twice.
        assert!((g2(50, 50, 50, 100) - 200.0 * 2f64.ln()).abs() < 1e-9);
        assert!((g2(0, 50, 0, 100)).abs() < 1e-9);
    }
}
