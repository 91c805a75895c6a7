//! The data set: what [`Dataset::open`] makes of a configuration, and the batches cut from it.

use std::path::Path;

use crate::config::DataConfig;
use crate::error::{DataError, Result};
use crate::eval::EvalSequence;
use crate::progress::Progress;
use crate::report::Report;
use crate::tokenizer::TextTokenizer;

/// One micro-batch of windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// [B, S + 1], row after row: inputs are the first S of a row, targets the last S.
    pub tokens: Vec<u32>,
    /// [B], the domain that most targets of the row are from.
    pub domains: Vec<u16>,
}

/// Text with domains, split into a training and a held-out part, as tokens in a cache.
#[derive(Debug)]
pub struct Dataset {
    report: Report,
    tokenizer: TextTokenizer,
    domains: Vec<String>,
    key: String,
}

impl Dataset {
    /// Reads the sources, splits them, trains or reads the tokenizer. Tokens are made later, when they are needed.
    pub fn open(config: &DataConfig, _cache_dir: &Path, _progress: &dyn Progress) -> Result<Dataset> {
        config.validate()?;
        Err(DataError::NoPaths)
    }
    /// What was found.
    pub fn report(&self) -> &Report {
        &self.report
    }
    /// The tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }
    /// Domain names; the position is the id.
    pub fn domains(&self) -> &[String] {
        &self.domains
    }
    /// A hexadecimal key of all that batches depend on besides their seed: text, split, domains, tokenizer.
    pub fn key(&self) -> &str {
        &self.key
    }
    /// Micro-batch number `index` since the start of a run: B windows of S + 1 tokens.
    pub fn batch(&self, _index: u64, _batch: usize, sequence: usize, _seed: u64) -> Result<Batch> {
        Err(DataError::TooSmall { what: String::new(), tokens: 0, sequence, needed: sequence as u64 + 1 })
    }
    /// Held-out windows, in equal numbers by domain as far as there are.
    pub fn held_out(&self, sequence: usize, _max_tokens_total: Option<usize>) -> Result<Vec<EvalSequence>> {
        Err(DataError::TooSmall { what: String::new(), tokens: 0, sequence, needed: sequence as u64 + 1 })
    }
}
