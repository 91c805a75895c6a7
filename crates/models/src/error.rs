//! Everything that can be wrong with a model, one clear line each.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A field of a specification that does not fit.
    #[error("{field} = {value}: {expected}")]
    Spec {
        /// Which field.
        field: String,
        /// Its value.
        value: String,
        /// What would fit.
        expected: String,
    },
    /// A `config.json` that cannot be used.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, what was found and what was expected.
        what: String,
    },
    /// A tensor of a checkpoint that is missing, left over, of the wrong shape or not sound.
    #[error("{}: tensor {tensor}: {what}", path.display())]
    Tensor {
        /// The file or folder.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A file that is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        what: String,
    },
    /// A file that cannot be read, written or removed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "read", "write" or "remove".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model that no layout of the kind asked for says exactly.
    #[error("the layout {family} cannot say this model: {what}")]
    Layout {
        /// The family.
        family: String,
        /// The field it has no word for.
        what: String,
    },
    /// An option of generation that does not fit.
    #[error("{what}")]
    Option {
        /// Which, and what would fit.
        what: String,
    },
    /// A mistake of the program.
    #[error("internal: {what}")]
    Internal {
        /// What should not have been.
        what: String,
    },
    /// From an MoE layer.
    #[error(transparent)]
    Moe(#[from] senmon_moe::MoeError),
    /// From the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl ModelError {
    /// True if the user can put it right: the binary ends with 2 for these.
    pub fn is_users_mistake(&self) -> bool {
        match self {
            ModelError::Internal { .. } | ModelError::Candle(_) => false,
            ModelError::Moe(e) => !matches!(e, senmon_moe::MoeError::Candle(_)),
            _ => true,
        }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| ModelError::Io { action, path, source }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;
