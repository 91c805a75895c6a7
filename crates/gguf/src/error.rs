//! Everything that can be wrong with a GGUF file, one clear line each.

use std::io;
use std::path::PathBuf;

/// An error of this crate. Names come from the file, and are shown short and without control characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file as a whole cannot be read.
    #[error("{what}")]
    File {
        /// What was found and what was expected.
        what: String,
    },
    /// A key of the metadata.
    #[error("key {key}: {what}")]
    Key {
        /// The key.
        key: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A tensor.
    #[error("tensor {tensor}: {what}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A file of a split model that is not there.
    #[error("no such file: {} (a model in {count} files needs all of them, in one folder)", path.display())]
    MissingPart {
        /// Where it should be.
        path: PathBuf,
        /// How many files there should be.
        count: usize,
    },
    /// The file cannot be written.
    #[error("cannot write: {source}")]
    Write {
        /// What the system said.
        #[from]
        source: io::Error,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, GgufError>;

impl GgufError {
    pub(crate) fn file(what: impl Into<String>) -> Self {
        GgufError::File { what: what.into() }
    }

    pub(crate) fn key(key: &str, what: impl Into<String>) -> Self {
        GgufError::Key { key: shown(key), what: what.into() }
    }

    pub(crate) fn tensor(tensor: &str, what: impl Into<String>) -> Self {
        GgufError::Tensor { tensor: shown(tensor), what: what.into() }
    }
}

/// A name in one line, however long and whatever is in it.
pub(crate) fn shown(name: &str) -> String {
    const MOST: usize = 80;
    let some: String = name.chars().take(MOST).flat_map(char::escape_debug).collect();
    match (name.is_empty(), name.chars().nth(MOST)) {
        (true, _) => "\"\"".to_owned(),
        (_, Some(_)) => some + "...",
        (_, None) => some,
    }
}
