//! Windows for evaluation, each from one domain.

use std::path::PathBuf;

use crate::config::DomainRule;
use crate::error::{DataError, Result};
use crate::progress::Progress;
use crate::report::Report;
use crate::tokenizer::TextTokenizer;

/// One window of evaluation text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalSequence {
    /// [S + 1]: inputs are the first S, targets the last S.
    pub tokens: Vec<u32>,
    /// The domain of all of them.
    pub domain: u16,
}

/// Everything under some paths, as windows for evaluation.
#[derive(Clone, Debug)]
pub struct EvalSet {
    /// The windows, domain after domain.
    pub sequences: Vec<EvalSequence>,
    /// Domain names; the position is the id.
    pub domains: Vec<String>,
    /// What was found.
    pub report: Report,
}

impl EvalSet {
    /// Reads all text under `paths`, without any split, and cuts windows of S + 1 tokens.
    pub fn from_paths(
        _paths: &[PathBuf],
        _domains: &DomainRule,
        _column: &str,
        _tokenizer: &TextTokenizer,
        _sequence: usize,
        _max_tokens_total: Option<usize>,
        _progress: &dyn Progress,
    ) -> Result<EvalSet> {
        Err(DataError::NoPaths)
    }
}
