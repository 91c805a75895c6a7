//! Everything that can go wrong in a comparison, one clear line each.

use std::path::PathBuf;

use senmon_page::PageError;
use senmon_train::TrainError;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// What was asked for cannot be compared, or not in this folder.
    #[error("{0}")]
    Mistake(String),
    /// A run of the comparison ended before its end.
    #[error("{name}: {source}")]
    Run {
        /// The run.
        name: String,
        /// Why.
        source: Box<TrainError>,
    },
    /// The user ended it; what is done is kept.
    #[error(
        "interrupted; {done} of {of} runs are done and the one under way is saved: say the same again to go on"
    )]
    Interrupted {
        /// Runs that are done.
        done: usize,
        /// Runs in all.
        of: usize,
    },
    /// The user ended it while the machine's speed was measured.
    #[error("interrupted while the speed was measured: nothing is kept, say the same again")]
    Unmeasured,
    /// A file or folder cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "read", "write" or "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the comparison is not one.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A configuration, a text or a model.
    #[error(transparent)]
    Train(Box<TrainError>),
    /// The page cannot be written.
    #[error(transparent)]
    Page(Box<PageError>),
}

impl CompareError {
    /// True if the user can put it right: the binary ends with 2 for these.
    pub fn is_users_mistake(&self) -> bool {
        match self {
            Self::Mistake(_) | Self::Io { .. } | Self::File { .. } => true,
            Self::Run { source, .. } | Self::Train(source) => source.is_users_mistake(),
            Self::Interrupted { .. } | Self::Unmeasured | Self::Page(_) => false,
        }
    }

    /// True if the user ended it.
    pub fn is_interruption(&self) -> bool {
        use senmon_data::DataError::Cancelled;
        match self {
            Self::Interrupted { .. } | Self::Unmeasured => true,
            Self::Run { source, .. } | Self::Train(source) => matches!(**source, TrainError::Data(Cancelled)),
            _ => false,
        }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

impl From<TrainError> for CompareError {
    fn from(error: TrainError) -> Self {
        Self::Train(Box::new(error))
    }
}

impl From<PageError> for CompareError {
    fn from(error: PageError) -> Self {
        Self::Page(Box::new(error))
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, CompareError>;
