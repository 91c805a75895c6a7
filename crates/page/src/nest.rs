//! Blocks that hold blocks: folded away, or one variant of several.

use serde::{Deserialize, Serialize};

use crate::error::{Result, invalid};
use crate::html::{push_element, push_text};
use crate::page::{Block, Show};

/// Blocks that are folded away under a line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Details {
    /// The line that is always there.
    pub summary: String,
    /// What it opens.
    pub blocks: Vec<Block>,
}

impl Details {
    /// Nothing yet, under a line.
    pub fn new(summary: impl Into<String>) -> Self {
        Self { summary: summary.into(), blocks: Vec::new() }
    }

    /// Adds a block.
    #[must_use]
    pub fn block(mut self, block: impl Into<Block>) -> Self {
        self.blocks.push(block.into());
        self
    }
}

impl Show for Details {
    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        out.push_str("<details><summary>");
        push_text(out, &self.summary);
        out.push_str("</summary>\n<div class=\"blocks\">\n");
        for block in &self.blocks {
            block.push_html(out);
        }
        out.push_str("</div>\n</details>\n");
    }
}

/// Variants of which one is shown, such as the layers of a model. Without scripts all are shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Selector {
    /// What is chosen: "Layer".
    pub label: String,
    /// The variants.
    pub variants: Vec<Variant>,
    /// The one that is shown at first.
    #[serde(default)]
    pub chosen: usize,
}

/// One of several variants.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// Its name.
    pub label: String,
    /// What it shows.
    pub blocks: Vec<Block>,
}

impl Selector {
    /// No variants yet; `label` says what is chosen.
    pub fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    /// Adds a variant of one block.
    #[must_use]
    pub fn variant(self, label: impl Into<String>, block: impl Into<Block>) -> Self {
        self.blocks(label, [block.into()])
    }

    /// Adds a variant of several blocks.
    #[must_use]
    pub fn blocks(mut self, label: impl Into<String>, blocks: impl IntoIterator<Item = Block>) -> Self {
        self.variants.push(Variant { label: label.into(), blocks: blocks.into_iter().collect() });
        self
    }

    /// Shows the variant at `place` at first.
    #[must_use]
    pub fn chosen(mut self, place: usize) -> Self {
        self.chosen = place;
        self
    }
}

impl Show for Selector {
    fn check(&self, at: &str) -> Result<()> {
        if self.chosen < self.variants.len().max(1) {
            return Ok(());
        }
        let what = format!("variant {} is to be shown, there are {}", self.chosen, self.variants.len());
        Err(invalid(at, what))
    }

    fn push_static(&self, out: &mut String) {
        for variant in &self.variants {
            out.push_str("<div class=\"variant\">\n");
            push_element(out, "h3", "static", &format!("{} {}", self.label, variant.label));
            out.push_str("<div class=\"blocks\">\n");
            for block in &variant.blocks {
                block.push_html(out);
            }
            out.push_str("</div>\n</div>\n");
        }
    }
}
