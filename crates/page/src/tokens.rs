//! Text coloured by category: tokens by the expert that a layer's gate gave them to.

use serde::{Deserialize, Serialize};

use crate::embed::numbers;
use crate::error::{Result, invalid, same_count};
use crate::format::Format;
use crate::html::{push_caption, push_text};
use crate::page::Show;
use crate::rich::Rich;
use crate::table::{Cell, Column, Table};

/// Text coloured by category. The categories that are most frequent in a layer have colours of their own; all others share
/// none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tokens {
    /// What is shown.
    pub title: String,
    /// A paragraph below the title; may be empty.
    #[serde(default)]
    pub note: Rich,
    /// What is seen, in a sentence or two, for readers who cannot. Where it is empty, the page says what is most frequent.
    #[serde(default)]
    pub summary: String,
    /// What a category is: "expert".
    pub category: String,
    /// Names of the categories. Those without one have their number.
    #[serde(default)]
    pub names: Vec<String>,
    /// The tokens, T of them.
    pub tokens: Vec<String>,
    /// Categories of a token in a layer, K of them, the first being its colour.
    pub slots: usize,
    /// The layers. One is shown, and chosen by the reader.
    pub layers: Vec<TokenLayer>,
    /// The layer that is shown at first.
    #[serde(default)]
    pub chosen: usize,
}

/// The categories of all tokens in one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenLayer {
    /// Its name.
    pub label: String,
    /// Categories of each token, the greatest weight first: \[T, K\]. A negative number is an empty slot.
    pub picks: Vec<i64>,
    /// Their weights: \[T, K\], or none at all. Three digits are kept.
    #[serde(default, with = "numbers")]
    pub weights: Vec<f64>,
}

impl TokenLayer {
    /// A layer: categories and their weights, both \[T, K\].
    pub fn new(
        label: impl Into<String>,
        picks: impl IntoIterator<Item = i64>,
        weights: impl IntoIterator<Item = f64>,
    ) -> Self {
        Self {
            label: label.into(),
            picks: picks.into_iter().collect(),
            weights: weights.into_iter().collect(),
        }
    }
}

impl Tokens {
    /// Tokens without layers; `slots` is the number of categories that each has in each layer.
    pub fn new(
        title: impl Into<String>,
        category: impl Into<String>,
        tokens: impl IntoIterator<Item = impl Into<String>>,
        slots: usize,
    ) -> Self {
        Self {
            title: title.into(),
            category: category.into(),
            tokens: tokens.into_iter().map(Into::into).collect(),
            slots,
            ..Self::default()
        }
    }

    /// With a paragraph below the title.
    #[must_use]
    pub fn note(mut self, note: impl Into<Rich>) -> Self {
        self.note = note.into();
        self
    }

    /// Adds a layer.
    #[must_use]
    pub fn layer(mut self, layer: TokenLayer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Shows the layer at `place` at first.
    #[must_use]
    pub fn chosen(mut self, place: usize) -> Self {
        self.chosen = place;
        self
    }

    fn name(&self, category: i64) -> String {
        let name = usize::try_from(category).ok().and_then(|place| self.names.get(place));
        name.cloned().unwrap_or_else(|| category.to_string())
    }

    /// First categories of a layer and how many tokens have them, the most frequent first.
    fn counts(&self, layer: &TokenLayer) -> Vec<(i64, usize)> {
        let mut firsts: Vec<i64> = layer.picks.iter().copied().step_by(self.slots.max(1)).collect();
        firsts.retain(|pick| *pick >= 0);
        firsts.sort_unstable();
        let mut counts: Vec<_> = firsts.chunk_by(|a, b| a == b).map(|same| (same[0], same.len())).collect();
        counts.sort_by_key(|(category, count)| (usize::MAX - count, *category));
        counts
    }

    fn table(&self) -> Table {
        let share = Format::percent(1);
        let columns = [
            Column::text("layer"),
            Column::number(format!("distinct: {}", self.category), Format::integer()),
            Column::text(format!("most frequent: {}", self.category)),
            Column::number("its share of tokens", share),
        ];
        let rows = self.layers.iter().map(|layer| {
            let counts = self.counts(layer);
            let first = counts.first();
            [
                Cell::from(layer.label.as_str()),
                Cell::from(counts.len()),
                Cell::from(first.map(|(category, _)| self.name(*category))),
                Cell::from(first.map(|(_, count)| *count as f64 / self.tokens.len() as f64)),
            ]
        });
        Table::new(format!("{}: first choices by layer", self.title), columns).rows(rows)
    }
}

impl Show for Tokens {
    fn prepare(&mut self) {
        for layer in &mut self.layers {
            for weight in &mut layer.weights {
                *weight = (*weight * 1000.0).round() / 1000.0;
            }
        }
        if !self.summary.is_empty() {
            return;
        }
        let (tokens, layers) = (self.tokens.len(), self.layers.len());
        let mut summary = format!("{tokens} tokens, coloured by {}, in {layers} layers.", self.category);
        if let Some(layer) = self.layers.get(self.chosen)
            && let Some((category, count)) = self.counts(layer).first()
        {
            let name = self.name(*category);
            let (label, what) = (&layer.label, &self.category);
            summary.push_str(&format!(" In layer {label}, {what} {name} is most frequent: {count} tokens."));
        }
        self.summary = summary;
    }

    fn check(&self, at: &str) -> Result<()> {
        if self.slots == 0 {
            return Err(invalid(at, "expected at least one slot for each token, found 0"));
        }
        let count = self.tokens.len().saturating_mul(self.slots);
        for layer in &self.layers {
            same_count(at, &format!("categories of layer {:?}", layer.label), count, layer.picks.len())?;
            let weights = if layer.weights.is_empty() { 0 } else { count };
            same_count(at, &format!("weights of layer {:?}", layer.label), weights, layer.weights.len())?;
        }
        if self.chosen >= self.layers.len().max(1) {
            let what = format!("layer {} is to be shown, there are {}", self.chosen, self.layers.len());
            return Err(invalid(at, what));
        }
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        push_caption(out, &self.title, &self.note, &self.summary);
        out.push_str("<p class=\"tokens\">");
        for token in &self.tokens {
            push_text(out, token);
        }
        out.push_str("</p>\n");
        self.table().push_table(out);
    }
}
