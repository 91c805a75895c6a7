//! Everything that can be wrong with a trace, one clear line each.

use std::path::PathBuf;

/// An error of this crate. Names come from the file, and are shown short and without control characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InsightError {
    /// A trace whose parts do not make one.
    #[error("{what}")]
    Trace {
        /// What was found and what was expected.
        what: String,
    },
    /// A tensor of a trace.
    #[error("tensor {tensor}: {what}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A file that holds no sound trace.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<InsightError>,
    },
    /// A file that cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, InsightError>;

impl InsightError {
    /// True if the user can put it right: the binary ends with 2 for these.
    pub fn is_users_mistake(&self) -> bool {
        matches!(self, InsightError::File { .. } | InsightError::Io { .. })
    }

    pub(crate) fn trace(what: impl Into<String>) -> Self {
        InsightError::Trace { what: what.into() }
    }

    pub(crate) fn tensor(tensor: &str, what: impl Into<String>) -> Self {
        InsightError::Tensor { tensor: shown(tensor), what: what.into() }
    }
}

/// A text from a file in one line, however long and whatever is in it.
pub(crate) fn shown(text: &str) -> String {
    const MOST: usize = 120;
    let some: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() { some + "..." } else { some }
}
