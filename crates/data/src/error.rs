//! Everything that can go wrong between a path and a batch, one clear line each.

use std::io;
use std::path::PathBuf;

/// An error of this crate. Each message says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// No path was given at all.
    #[error("no data given: name at least one file or folder (data.paths)")]
    NoPaths,
    /// A given path does not exist.
    #[error("no such file or folder: {} (check data.paths)", path.display())]
    NoSuchPath {
        /// The path as it was given.
        path: PathBuf,
    },
    /// A file that a key names does not exist.
    #[error("no such file: {} (check {key})", path.display())]
    NoSuchFile {
        /// The path as it was given.
        path: PathBuf,
        /// The key, with its table.
        key: &'static str,
    },
    /// A path that the user named cannot be read.
    #[error("cannot read {}: {source} (check its permissions)", path.display())]
    Unreadable {
        /// The path as it was given.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The paths exist and can be read, but hold no text.
    #[error("no text found in {paths} ({why}): give UTF-8 text, code, .jsonl or .parquet")]
    NoText {
        /// The given paths, joined by commas.
        paths: String,
        /// What was found instead, for people.
        why: String,
    },
    /// A `.jsonl` or `.parquet` file that the user named has no such text column.
    #[error("{} has no text column {column:?} (columns: {found}): set data.column", path.display())]
    NoColumn {
        /// The file.
        path: PathBuf,
        /// The column that was looked for.
        column: String,
        /// The names that are there, joined by commas.
        found: String,
    },
    /// A domain rule file cannot be used.
    #[error("domain rule file {}: {reason}", path.display())]
    RuleFile {
        /// The rule file.
        path: PathBuf,
        /// What is wrong in it, and where.
        reason: String,
    },
    /// A configuration value is out of its range.
    #[error("{key} = {value}: {expected}")]
    BadValue {
        /// The key, with its table.
        key: &'static str,
        /// The value found.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// A file is not a tokenizer.
    #[error("{} is not a tokenizer: {reason} (give a Hugging Face tokenizer.json)", path.display())]
    NotATokenizer {
        /// The file.
        path: PathBuf,
        /// What the `tokenizers` crate said.
        reason: String,
    },
    /// Training a tokenizer, or encoding or decoding with one, failed.
    #[error("the tokenizer failed: {reason}")]
    Tokenizer {
        /// What the `tokenizers` crate said.
        reason: String,
    },
    /// There is too little text for one window.
    #[error(
        "{what} has {tokens} tokens and a sequence of {sequence} needs at least {needed} tokens: \
         give more text or a shorter sequence"
    )]
    TooSmall {
        /// Which part of the data.
        what: String,
        /// Tokens found, in the longest run that a window may be cut from.
        tokens: u64,
        /// S, the sequence length asked for.
        sequence: usize,
        /// Tokens needed, S + 1.
        needed: u64,
    },
    /// No held-out part can be cut from the text.
    #[error("cannot hold out any text: {reason} (give more text, or set data.holdout = 0)")]
    CannotSplit {
        /// Why not.
        reason: String,
    },
    /// A source changed between the time it was first read and the time it was tokenized.
    #[error("{} changed while it was in use: start again", path.display())]
    Changed {
        /// The source file.
        path: PathBuf,
    },
    /// The cache cannot be read or written (disk full, permissions).
    #[error("cannot {action} {} in the data cache: {source}", path.display())]
    Cache {
        /// What was tried ("write", "read", "create").
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// [`crate::Progress::cancelled`] answered true.
    #[error("cancelled")]
    Cancelled,
}

impl DataError {
    /// True if the user can put it right by another argument or another file: the binary ends with 2
    /// for these, with 1 for the rest.
    pub fn is_users_mistake(&self) -> bool {
        !matches!(self, DataError::Cancelled | DataError::Tokenizer { .. })
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, DataError>;
