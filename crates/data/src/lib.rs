//! Text in, batches out.
//!
//! A newcomer's text lies in folders of files, not in token ids. This crate makes the one from the other in the order
//! that its files are listed: documents are found and hashed ([`DataConfig`]), named by domain, split by group into a
//! training and a held-out part, tokenized into memory-mapped shards, and cut into batches that depend on the seed
//! alone. It knows no model and never prints; [`Report`] says what it found.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod batches;
mod cache;
mod config;
pub mod domains;
mod error;
mod eval;
mod hash;
mod overlap;
mod progress;
mod report;
mod shards;
mod source;
mod split;
mod tokenizer;

pub use batches::{Batch, Dataset};
pub use config::{DataConfig, DomainRule, GroupRule};
pub use error::{DataError, Result};
pub use eval::{EvalSequence, EvalSet};
pub use progress::{Progress, Silent};
pub use report::{DomainReport, Report};
pub use tokenizer::{END_OF_TEXT, PAD, TextTokenizer};
