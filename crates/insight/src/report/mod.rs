//! What there is to say of a model's routing, as a page for people: load, words for experts and whether they stand, domains, what is
//! together, text by expert, memory and machines.

mod alike;
mod compare;
mod domains;
mod experts;
mod load;
mod machines;
mod overview;
mod text;

pub use compare::{Side, compare};

use crate::statistics::{Alike, LayerStatistics, Saturation, Statistics};
use crate::trace::Trace;
use crate::words::{Checked, ExpertWords, Label, LabelKind, LayerWords};
pub use senmon_page::Page;
use senmon_page::{Block, Rich, Scale, Selector};
use std::collections::BTreeSet;

/// Layers of which matrices of experts by experts are shown, at most, spread over the model.
const MATRICES: usize = 8;

/// How a run went, where the model is one's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Training {
    /// Steps.
    pub steps: Vec<u64>,
    /// Each MoE layer, by number: the coefficient of variation of the load, and its entropy over ln E, at each step.
    pub layers: Vec<(usize, Vec<f64>, Vec<f64>)>,
    /// Routing of the same text at some steps against that at the last.
    pub saturation: Vec<(u64, Vec<Saturation>)>,
}

/// What a page is made of.
pub struct Report<'a> {
    /// What the model is called.
    pub model: &'a str,
    /// The routing.
    pub trace: &'a Trace,
    /// What it comes to.
    pub statistics: &'a Statistics,
    /// Words for the experts of each layer.
    pub words: &'a [LayerWords],
    /// What became of them when experts were switched off, layer by layer as `words`.
    pub checked: Option<&'a [Vec<Checked>]>,
    /// How alike the experts of each layer are, where that was looked at.
    pub alike: &'a [Alike],
    /// How the run went.
    pub training: Option<&'a Training>,
    /// The text of a token.
    pub token: &'a dyn Fn(u32) -> String,
}

impl Report<'_> {
    /// The page.
    pub fn page(&self) -> Page {
        let s = self.statistics;
        let mut page = Page::new(format!("What the experts of {} do", self.model))
            .subtitle("Which tokens the router sends to which expert, what the experts are for, and whether that is so.")
            .fact("Router", s.router.clone())
            .fact("Layers with experts", s.layers.len().to_string())
            .fact("Text", self.text())
            .fact("Model", s.model.chars().take(16).collect::<String>())
            .section(overview::section(self))
            .section(load::section(self))
            .section(experts::section(self))
            .section(domains::section(self))
            .section(domains::together(self));
        if let Some(alike) = alike::section(self) {
            page = page.section(alike);
        }
        page.section(domains::tokens(self))
            .section(text::section(self))
            .section(machines::section(self))
            .footer(
                Rich::new()
                    .text("Written by ")
                    .code("senmon inspect --report")
                    .text("; what each figure is, with formula and source, is in ")
                    .code("docs/insight.md")
                    .text("."),
            )
    }

    /// What was looked at.
    fn text(&self) -> String {
        let s = self.statistics;
        let documents: BTreeSet<u32> = (0..self.trace.len()).map(|row| self.trace.document(row)).collect();
        let texts = match self.trace.documents.is_empty() {
            true => format!("{} texts", s.texts),
            false => format!("{} windows from {} documents", s.texts, documents.len()),
        };
        format!("{} tokens in {texts} of {} domains", s.tokens, s.domains.len())
    }

    /// Every expert with its words and its check.
    fn experts(&self) -> impl Iterator<Item = (&LayerWords, &ExpertWords, Option<&Checked>)> {
        self.words.iter().enumerate().flat_map(move |(place, layer)| {
            layer.experts.iter().enumerate().map(move |(e, words)| {
                (layer, words, self.checked.and_then(|checked| checked.get(place)?.get(e)))
            })
        })
    }
}

/// Tokens that a label names, at most.
const NAMED: usize = 3;

/// A label in a few words; nothing where there is none.
fn label(report: &Report, label: &Label) -> String {
    let quoted = || {
        let each = label.ids.iter().take(NAMED).map(|id| {
            let text = (report.token)(*id).replace('\n', "\\n").replace('\t', "\\t");
            format!("“{text}”")
        });
        each.collect::<Vec<_>>().join(", ")
    };
    match label.kind {
        LabelKind::Domain => label.name.clone(),
        LabelKind::Token => quoted(),
        LabelKind::Next => format!("before {}", quoted()),
        LabelKind::Position => format!("places {}", label.name),
        LabelKind::None => String::new(),
    }
}

/// What a layer is called.
fn name(layer: &LayerStatistics) -> String {
    layer.name.clone().unwrap_or_else(|| layer.layer.to_string())
}

/// A number that may not be there.
fn or_none(value: Option<f64>) -> f64 {
    value.unwrap_or(f64::NAN)
}

/// Colours around the level of chance, up to the greatest value; from 0 alone where chance gives nothing.
fn around(chance: Option<f64>, values: &[f64]) -> Scale {
    let greatest = values.iter().copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
    match chance {
        Some(chance) if chance > 0.0 => Scale::diverging(0.0, chance, greatest.max(2.0 * chance)),
        _ => Scale::Sequential { low: 0.0, high: greatest.max(f64::MIN_POSITIVE) },
    }
}

/// Numbers as names.
fn numbers(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|number| number.to_string())
}

/// A choice of layers, each with blocks; nothing where there is none.
fn by_layer<'a>(
    layers: impl Iterator<Item = &'a LayerStatistics>,
    blocks: impl Fn(&LayerStatistics) -> Vec<Block>,
) -> Option<Selector> {
    let mut selector = Selector::new("Layer");
    let mut any = false;
    for layer in layers {
        let blocks = blocks(layer);
        if !blocks.is_empty() {
            selector = selector.blocks(name(layer), blocks);
            any = true;
        }
    }
    any.then_some(selector)
}

/// Some layers, spread from the first to the last.
fn spread(layers: &[LayerStatistics]) -> impl Iterator<Item = &LayerStatistics> {
    senmon_page::spread(layers.len(), MATRICES).map(|place| &layers[place])
}

#[cfg(test)]
mod tests;
