//! What can go wrong in a layer.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MoeError {
    /// A router kind that does not exist.
    #[error("router.kind = \"{found}\" is not known; the kinds are {known}")]
    UnknownKind {
        /// What was asked for.
        found: String,
        /// The names of all kinds.
        known: String,
    },
    /// A value that does not fit the others.
    #[error("{what}")]
    Config {
        /// The keys, their values, and what would fit.
        what: String,
    },
    /// A tensor of the wrong shape.
    #[error("{what} has shape {found:?}, expected {expected}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// What was expected.
        expected: String,
    },
    /// From the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, MoeError>;
