//! Words for experts: what each has to do with domains, tokens and places, as lists, as a label with its evidence, and as a sentence.
//!
//! A label says what an expert's tokens have in common, not what the expert does for them. Whether it does anything is a
//! question to the model: switch the expert off and see whether that hurts where the label says ([`confirm`]).

mod ablation;
mod checked;
mod label;
mod sentence;

pub use ablation::{Ablation, Confirmation, Delta, LEVEL, Verdict, confirm};
pub use checked::{Checked, MARGIN, Standing, Tally};
pub use label::{Label, LabelKind};

use crate::error::{InsightError, Result};
use crate::statistics::numbers::share;
use crate::statistics::specialization::{stretch, stretch_end, stretch_start};
use crate::statistics::view::{Layer, layers};
use crate::trace::{NONE, Trace};
use label::Evidence;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How words are found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WordOptions {
    /// Tokens of an id that an expert must have before the id is a word of it.
    pub min_count: u64,
    /// Words in each list.
    pub words: usize,
    /// Contexts of each expert.
    pub contexts: usize,
    /// Tokens of a context before and after its own.
    pub around: usize,
    /// The probability of a label by chance, over all experts and labels together, below which it is given.
    pub level: f64,
    /// How many times chance the share of a label must be.
    pub lift: f64,
}

impl Default for WordOptions {
    fn default() -> Self {
        Self { min_count: 5, words: 10, contexts: 5, around: 8, level: 0.01, lift: 1.5 }
    }
}

/// Words for the experts of a layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerWords {
    /// Its number.
    pub layer: usize,
    /// What it is called, where that is not its number.
    pub name: Option<String>,
    /// Each expert: \[E\].
    pub experts: Vec<ExpertWords>,
}

/// Words for an expert.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertWords {
    /// Its number.
    pub expert: u16,
    /// Its tokens.
    pub tokens: u64,
    /// The label and the lists, in a sentence.
    pub sentence: String,
    /// What its tokens have in common most of all.
    pub label: Label,
    /// Ids of its tokens, greatest lift first; only such that it has [`WordOptions::min_count`] times.
    pub input: Vec<Word>,
    /// Ids of the tokens that followed, in the same way.
    pub target: Vec<Word>,
    /// Domains of its tokens, greatest lift first.
    pub domains: Vec<Word>,
    /// Places of its tokens, in texts: each twice as long as the one before it, in their order.
    pub positions: Vec<Word>,
    /// The tokens that it has the greatest weight for, no two near each other in a text.
    pub contexts: Vec<Context>,
}

/// Something that an expert's tokens have in common.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Word {
    /// The id of a token, the index of a domain, the first position of a place.
    pub id: u32,
    /// Its text or name.
    pub text: String,
    /// Tokens of the expert that have it.
    pub count: u64,
    /// The share of the expert's tokens that have it.
    pub share: Option<f64>,
    /// The share of all tokens that have it: what `share` is by chance.
    pub chance: Option<f64>,
    /// The one over the other.
    pub lift: Option<f64>,
}

/// A token that an expert has a great weight for, and what is around it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Context {
    /// Its row in the trace.
    pub row: usize,
    /// Its text.
    pub sequence: u32,
    /// Its place there.
    pub position: u32,
    /// The expert's weight.
    pub weight: f32,
    /// The text before it.
    pub before: String,
    /// Its own text.
    pub token: String,
    /// The text after it.
    pub after: String,
}

/// Words for all experts of a trace; `text` gives the text of a token's id.
pub fn of(
    trace: &Trace,
    options: &WordOptions,
    text: &(dyn Fn(u32) -> String + Sync),
) -> Result<Vec<LayerWords>> {
    if !(options.level > 0.0 && options.level < 1.0) {
        return Err(InsightError::trace(format!("level = {}: expected between 0 and 1", options.level)));
    }
    if !options.lift.is_finite() {
        return Err(InsightError::trace(format!("lift = {}: expected a number", options.lift)));
    }
    let layers = layers(trace)?;
    let evidence: Vec<Evidence> =
        layers.par_iter().map(|layer| Evidence::of(trace, layer, options)).collect();
    // Each label of each expert of each layer is a chance to be wrong.
    let tests: usize = layers.iter().zip(&evidence).map(|(layer, of)| layer.experts * of.labels).sum();
    let rows: BTreeMap<(u32, u32), usize> =
        (0..trace.len()).map(|row| ((trace.sequence[row], trace.position[row]), row)).collect();
    let expert = |layer: &Layer, evidence: &Evidence, e: usize| {
        let notable = evidence.notable(trace, layer, e, tests, options);
        let mut words = ExpertWords {
            expert: e as u16,
            tokens: layer.counts[e],
            label: label::choose(trace, &evidence.rows[e], &notable, text),
            input: ids(layer, e, &evidence.input[e], &evidence.inputs, options, text),
            target: ids(layer, e, &evidence.target[e], &evidence.targets, options, text),
            domains: domains(trace, layer, evidence, e),
            positions: positions(layer, evidence, e),
            contexts: contexts(trace, &evidence.rows[e], &rows, options, text),
            sentence: String::new(),
        };
        words.sentence = sentence::of(&words, &notable, text);
        words
    };
    let one = |(layer, evidence): (&Layer, &Evidence)| LayerWords {
        layer: layer.number,
        name: layer.trace.name.clone(),
        experts: (0..layer.experts).map(|e| expert(layer, evidence, e)).collect(),
    };
    Ok(layers.par_iter().zip(&evidence).map(one).collect())
}

/// A word of an expert.
fn word(layer: &Layer, e: usize, id: u32, text: String, count: u64, all: u64) -> Word {
    let (mine, chance) = (share(count, layer.counts[e]), share(all, layer.seen.len() as u64));
    let lift = mine.zip(chance).and_then(|(mine, chance)| crate::statistics::numbers::ratio(mine, chance));
    Word { id, text, count, share: mine, chance, lift }
}

/// Greatest lift first, then the more frequent, then the lower id.
fn sort(words: &mut [Word]) {
    words.sort_by(|a, b| {
        let lift = |word: &Word| word.lift.unwrap_or(0.0);
        lift(b).total_cmp(&lift(a)).then(b.count.cmp(&a.count)).then(a.id.cmp(&b.id))
    });
}

/// Ids of an expert with their counts, as words.
fn ids(
    layer: &Layer,
    e: usize,
    counts: &[(u32, u64)],
    all: &BTreeMap<u32, u64>,
    options: &WordOptions,
    text: &(dyn Fn(u32) -> String + Sync),
) -> Vec<Word> {
    let one = |(id, count): &(u32, u64)| {
        word(layer, e, *id, String::new(), *count, all.get(id).copied().unwrap_or(0))
    };
    let mut words: Vec<Word> = counts.iter().map(one).collect();
    sort(&mut words);
    words.truncate(options.words);
    words.iter_mut().for_each(|word| word.text = text(word.id));
    words
}

/// Domains of an expert.
fn domains(trace: &Trace, layer: &Layer, evidence: &Evidence, e: usize) -> Vec<Word> {
    let each = trace.about.domains.iter().zip(&evidence.domain[e]).zip(&evidence.domains).enumerate();
    let mut words: Vec<Word> = each
        .filter(|(_, ((_, count), _))| **count > 0)
        .map(|(d, ((name, count), all))| word(layer, e, d as u32, name.clone(), *count, *all))
        .collect();
    sort(&mut words);
    words
}

/// Places of an expert's tokens.
fn positions(layer: &Layer, evidence: &Evidence, e: usize) -> Vec<Word> {
    let each = evidence.position[e].iter().zip(&evidence.positions).enumerate();
    each.map(|(class, (count, all))| {
        let (from, to) = (stretch_start(class), stretch_end(class));
        let text = if from == to { from.to_string() } else { format!("{from}–{to}") };
        word(layer, e, from, text, *count, *all)
    })
    .collect()
}

/// The tokens that an expert has the greatest weight for, the first of several; none is within another's context.
fn contexts(
    trace: &Trace,
    mine: &[(usize, f32)],
    rows: &BTreeMap<(u32, u32), usize>,
    options: &WordOptions,
    text: &(dyn Fn(u32) -> String + Sync),
) -> Vec<Context> {
    let mut mine = mine.to_vec();
    // Stable: of equals the first.
    mine.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut found: Vec<Context> = Vec::new();
    for (row, weight) in mine {
        if found.len() == options.contexts {
            break;
        }
        let (sequence, position) = (trace.sequence[row], trace.position[row]);
        let near = |other: &Context| {
            other.sequence == sequence && other.position.abs_diff(position) as usize <= options.around
        };
        if found.iter().any(near) {
            continue;
        }
        let at = |position: Option<u32>| rows.get(&(sequence, position?)).map(|row| text(trace.tokens[*row]));
        let around = u32::try_from(options.around).unwrap_or(u32::MAX);
        let before = (1..=around).map_while(|back| at(position.checked_sub(back)));
        let before: Vec<String> = before.collect();
        found.push(Context {
            row,
            sequence,
            position,
            weight,
            before: before.into_iter().rev().collect(),
            token: text(trace.tokens[row]),
            after: (1..=around).map_while(|on| at(position.checked_add(on))).collect(),
        });
    }
    found
}

/// How often each id occurs in tokens that a layer saw.
fn occurrences(layer: &Layer, ids: &[u32]) -> BTreeMap<u32, Vec<usize>> {
    let mut all: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for row in layer.seen.iter().filter(|row| ids[**row] != NONE) {
        all.entry(ids[*row]).or_default().push(*row);
    }
    all
}

/// The class of a position, for tables.
fn place(trace: &Trace, row: usize) -> usize {
    stretch(trace.position[row])
}
