//! Running text with emphasis. It is made of pieces, not of markup, so that a name in it can never change how it looks.

use serde::{Deserialize, Serialize};

use crate::html::push_text;

/// A paragraph, made of pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rich(pub Vec<Span>);

/// A piece of a paragraph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Span {
    /// Text as it is.
    Plain(String),
    /// Text that must not be missed.
    Strong(String),
    /// Text that is stressed.
    Emphasis(String),
    /// A name, a key, a command, a token.
    Code(String),
    /// Words that lead to a section or block of the same page.
    Link {
        /// The words.
        text: String,
        /// The section's or block's identifier.
        to: String,
    },
}

impl Rich {
    /// An empty paragraph, to add to.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds text as it is.
    #[must_use]
    pub fn text(self, text: impl Into<String>) -> Self {
        self.with(Span::Plain(text.into()))
    }

    /// Adds text that must not be missed.
    #[must_use]
    pub fn strong(self, text: impl Into<String>) -> Self {
        self.with(Span::Strong(text.into()))
    }

    /// Adds stressed text.
    #[must_use]
    pub fn emphasis(self, text: impl Into<String>) -> Self {
        self.with(Span::Emphasis(text.into()))
    }

    /// Adds a name, a key, a command or a token.
    #[must_use]
    pub fn code(self, text: impl Into<String>) -> Self {
        self.with(Span::Code(text.into()))
    }

    /// Adds words that lead to the section or block `to`.
    #[must_use]
    pub fn link(self, text: impl Into<String>, to: impl Into<String>) -> Self {
        self.with(Span::Link { text: text.into(), to: to.into() })
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn with(mut self, span: Span) -> Self {
        self.0.push(span);
        self
    }

    pub(crate) fn push_html(&self, out: &mut String) {
        let tagged = |out: &mut String, tag: &str, text: &str| {
            out.push_str(&format!("<{tag}>"));
            push_text(out, text);
            out.push_str(&format!("</{tag}>"));
        };
        for span in &self.0 {
            match span {
                Span::Plain(text) => push_text(out, text),
                Span::Strong(text) => tagged(out, "strong", text),
                Span::Emphasis(text) => tagged(out, "em", text),
                Span::Code(text) => tagged(out, "code", text),
                Span::Link { text, to } => {
                    out.push_str("<a href=\"#");
                    push_text(out, to);
                    out.push_str("\">");
                    push_text(out, text);
                    out.push_str("</a>");
                }
            }
        }
    }

    /// The paragraph as `<p class="CLASS">`; nothing where it is empty.
    pub(crate) fn push_paragraph(&self, out: &mut String, class: &str) {
        if self.is_empty() {
            return;
        }
        out.push_str("<p");
        if !class.is_empty() {
            out.push_str(&format!(" class=\"{class}\""));
        }
        out.push('>');
        self.push_html(out);
        out.push_str("</p>\n");
    }
}

impl From<&str> for Rich {
    fn from(text: &str) -> Self {
        Self::new().text(text)
    }
}

impl From<String> for Rich {
    fn from(text: String) -> Self {
        Self::new().text(text)
    }
}
