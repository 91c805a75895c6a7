//! Pages in one HTML file: sentences, figures, tables and charts, for reports that are sent around and for views of a run.
//!
//! A [`Page`] is plain data: sections of [`Block`]s. [`Page::to_html`] writes it as one file that fetches nothing; its policy
//! (CSP) forbids it to. Every block stands in it twice: as HTML written here (sentences and tables, for readers without
//! scripts), and as JSON, from which `page.js` draws. The same JSON is the page's own form: [`Page`] is `Serialize` and
//! `Deserialize`.
//!
//! A page may be kept up to date: `senmon.update(id, data)` in its script takes a block as [`Block::to_json`] writes it and
//! draws it again. [`Page::live`] makes it listen to events of the server that it came from; it can talk to nothing else.
//!
//! ```
//! use senmon_page::{Figure, Figures, Format, Heat, Page, Reference, Scale, Section};
//!
//! let load = Heat::new("Load of the experts", ["layer 0", "layer 1"], ["0", "1", "2"])
//!     .values([0.5, 0.3, 0.2, 0.3, 0.3, 0.4])
//!     .scale(Scale::diverging(0.0, 1.0 / 3.0, 1.0))
//!     .format(Format::percent(1));
//! let dead = Figure::new("experts without a token", 0.0).format(Format::integer());
//! let page = Page::new("Routing of tiny-moe")
//!     .section(Section::new("load", "Load").intro("Who gets the tokens.").block(Figures::new([dead])).block(load));
//! let html = page.to_html()?;
//! assert!(html.starts_with("<!doctype html>"));
//! # Ok::<(), senmon_page::PageError>(())
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bars;
mod embed;
mod error;
mod format;
mod heat;
mod html;
mod lines;
mod nest;
mod page;
mod rich;
mod table;
mod thin;
mod tokens;
mod words;

pub use bars::{BarSeries, Bars, Direction};
pub use error::{PageError, Result};
pub use format::{Format, Style};
pub use heat::{Heat, Scale};
pub use lines::{Axis, Line, Lines};
pub use nest::{Details, Selector, Variant};
pub use page::{Block, Content, Page, Reference, Section};
pub use rich::{Rich, Span};
pub use table::{Best, Cell, Column, Table};
pub use thin::spread;
pub use tokens::{TokenLayer, Tokens};
pub use words::{Figure, Figures, Text, Tone, Verdict};
