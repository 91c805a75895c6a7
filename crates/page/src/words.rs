//! Blocks of words and single numbers: paragraphs, figures, verdicts.

use serde::{Deserialize, Serialize};

use crate::embed::number;
use crate::error::Result;
use crate::format::Format;
use crate::html::{push_element, push_text};
use crate::page::{Reference, Show};
use crate::rich::Rich;

/// Paragraphs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// The paragraphs.
    pub paragraphs: Vec<Rich>,
}

impl Text {
    /// One paragraph.
    pub fn new(paragraph: impl Into<Rich>) -> Self {
        Self { paragraphs: vec![paragraph.into()] }
    }

    /// Adds a paragraph.
    #[must_use]
    pub fn paragraph(mut self, paragraph: impl Into<Rich>) -> Self {
        self.paragraphs.push(paragraph.into());
        self
    }
}

impl Show for Text {
    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        for paragraph in &self.paragraphs {
            paragraph.push_paragraph(out, "");
        }
    }
}

/// Large numbers, side by side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The numbers.
    pub figures: Vec<Figure>,
}

/// A large number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What the number is.
    pub caption: String,
    /// The number; one that is not finite is shown as missing.
    #[serde(with = "number")]
    pub value: f64,
    /// How it is written.
    #[serde(default)]
    pub format: Format,
    /// What it is held against, mostly the level of chance.
    #[serde(default)]
    pub reference: Option<Reference>,
}

impl Figure {
    /// A number with its caption.
    pub fn new(caption: impl Into<String>, value: f64) -> Self {
        Self { caption: caption.into(), value, format: Format::auto(), reference: None }
    }

    /// Written so.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// With the value that chance would give.
    #[must_use]
    pub fn chance(self, value: f64) -> Self {
        self.reference(Reference::chance(value))
    }

    /// With a value that it is held against.
    #[must_use]
    pub fn reference(mut self, reference: Reference) -> Self {
        self.reference = Some(reference);
        self
    }
}

impl Figures {
    /// Numbers from left to right.
    pub fn new(figures: impl IntoIterator<Item = Figure>) -> Self {
        Self { figures: figures.into_iter().collect() }
    }
}

impl Show for Figures {
    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        out.push_str("<dl class=\"figures\">\n");
        for figure in &self.figures {
            out.push_str("<div>");
            push_element(out, "dt", "", &figure.caption);
            push_element(out, "dd", "value", &figure.format.text(figure.value));
            if let Some(reference) = &figure.reference {
                push_element(out, "dd", "chance", &reference.text(&figure.format));
            }
            out.push_str("</div>\n");
        }
        out.push_str("</dl>\n");
    }
}

/// A sentence in a box: what a page comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// How it is meant, as a colour.
    #[serde(default)]
    pub tone: Tone,
    /// How it is meant, in a word or two; may be empty.
    #[serde(default)]
    pub label: String,
    /// The sentence.
    pub sentence: Rich,
    /// What it rests on; may be empty.
    #[serde(default)]
    pub note: Rich,
    /// Whether a screen reader says it when it changes.
    #[serde(default)]
    pub announced: bool,
}

/// How a verdict is meant. It is a colour only: the label says it in words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tone {
    /// Neither.
    #[default]
    Neutral,
    /// As hoped.
    Good,
    /// Not as hoped.
    Bad,
    /// The data do not say.
    Unclear,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Neutral => "neutral",
            Self::Good => "good",
            Self::Bad => "bad",
            Self::Unclear => "unclear",
        }
    }
}

impl Verdict {
    /// A sentence with a word for how it is meant.
    pub fn new(tone: Tone, label: impl Into<String>, sentence: impl Into<Rich>) -> Self {
        Self { tone, label: label.into(), sentence: sentence.into(), note: Rich::new(), announced: false }
    }

    /// Said by a screen reader when it changes.
    #[must_use]
    pub fn announced(mut self) -> Self {
        self.announced = true;
        self
    }

    /// With what it rests on.
    #[must_use]
    pub fn note(mut self, note: impl Into<Rich>) -> Self {
        self.note = note.into();
        self
    }
}

impl Show for Verdict {
    fn check(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        out.push_str(&format!("<div class=\"verdict {}\">\n", self.tone.class()));
        if !self.label.is_empty() {
            out.push_str("<p class=\"label\">");
            push_text(out, &self.label);
            out.push_str("</p>\n");
        }
        self.sentence.push_paragraph(out, "sentence");
        self.note.push_paragraph(out, "note");
        out.push_str("</div>\n");
    }
}
