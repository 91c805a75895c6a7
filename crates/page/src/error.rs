//! What can be wrong with a page.

use std::fmt;

/// A page that cannot be written.
#[derive(Debug)]
#[non_exhaustive]
pub enum PageError {
    /// A block that contradicts itself, or an identifier that cannot be one.
    Invalid {
        /// The section and block.
        at: String,
        /// What was expected, and what was found.
        what: String,
    },
    /// The page could not be written to where it should go.
    Io(std::io::Error),
    /// The page could not be put into JSON.
    Json(serde_json::Error),
}

/// A result with [`PageError`].
pub type Result<T> = std::result::Result<T, PageError>;

impl fmt::Display for PageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { at, what } => write!(f, "{at}: {what}"),
            Self::Io(error) => write!(f, "the page cannot be written: {error}"),
            Self::Json(error) => write!(f, "the page cannot be put into JSON: {error}"),
        }
    }
}

impl std::error::Error for PageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Invalid { .. } => None,
            Self::Io(error) => Some(error),
            Self::Json(error) => Some(error),
        }
    }
}

impl From<std::io::Error> for PageError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<serde_json::Error> for PageError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

/// Refuses where `expected` and `found` differ; `what` names the thing that is counted.
pub(crate) fn same_count(at: &str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(invalid(at, format!("{what}: expected {expected}, found {found}")))
}

pub(crate) fn invalid(at: &str, what: impl Into<String>) -> PageError {
    PageError::Invalid { at: at.to_owned(), what: what.into() }
}
