//! Everything that can go wrong in a training run, one clear line each.

use std::io;
use std::path::PathBuf;

/// An error of this crate. Each message says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A configuration has a table that does not exist.
    #[error("{origin}: unknown table [{table}]{hint}")]
    UnknownTable {
        /// The file, or the `--set` argument.
        origin: String,
        /// The table as it was written.
        table: String,
        /// "; did you mean …?", or what there is.
        hint: String,
    },
    /// A configuration has a key that its table does not have.
    #[error("{origin}: unknown key `{key}` in [{table}]{hint}")]
    UnknownKey {
        /// The file, or the `--set` argument.
        origin: String,
        /// The table.
        table: String,
        /// The key as it was written.
        key: String,
        /// "; did you mean …?", or what there is.
        hint: String,
    },
    /// A configuration is not TOML, or not of the form that a run configuration has.
    #[error("{origin}: {reason}")]
    Syntax {
        /// The file, or the `--set` argument.
        origin: String,
        /// What is wrong, and in which line.
        reason: String,
    },
    /// A value of the configuration is of the wrong type or out of its range.
    #[error("{key} = {value}: {expected}")]
    BadValue {
        /// `table.key`.
        key: String,
        /// The value found.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// Two values of the configuration do not go together.
    #[error("{0}")]
    Conflict(String),
    /// There is no preset of this name.
    #[error("no preset {name:?}: there are {known}")]
    NoSuchPreset {
        /// The name asked for.
        name: String,
        /// The names there are, joined by commas.
        known: String,
    },
    /// `out` already holds a run.
    #[error("{} already holds a run: go on with it by --resume, or choose another --out", path.display())]
    HoldsRun {
        /// The folder.
        path: PathBuf,
    },
    /// `out` holds files that are not of a run.
    #[error("{} is not empty (it holds {found:?}) and holds no run: choose another --out", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
        /// One of the files in it.
        found: String,
    },
    /// `out` is not a folder.
    #[error("{} is not a folder: choose another --out", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// There is no run to resume.
    #[error("{} holds no run to resume: {reason}", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The run to resume has nothing left to do.
    #[error("{} is done ({step} steps, {tokens} tokens): go further by --steps, --tokens or --minutes", path.display())]
    IsDone {
        /// The folder.
        path: PathBuf,
        /// Steps done.
        step: u64,
        /// Tokens trained on.
        tokens: u64,
    },
    /// A checkpoint could not be written; an earlier one is whole.
    #[error("{what}; step {step} is saved: go on from it by --resume when that is put right")]
    Unsaved {
        /// What went wrong.
        what: Box<TrainError>,
        /// The step of the newest whole checkpoint.
        step: u64,
    },
    /// Another process is training into the folder.
    #[error("{} is in use by another process: wait for it, or choose another --out", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// A saved state does not belong to the run that it should continue.
    #[error("{}: {reason}", path.display())]
    State {
        /// The file or folder.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A loss or a gradient is not finite.
    #[error("step {step}: {what} is not finite; {advice}")]
    NonFinite {
        /// The optimiser step, counted from 1.
        step: u64,
        /// The loss term, or the name of the tensor whose gradient it is.
        what: String,
        /// Where the last good checkpoint is, and what to try.
        advice: String,
    },
    /// A file or folder cannot be read or written (disk full, permissions).
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried ("write", "read", "create").
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The terminal, or whatever was plugged in as one, cannot be written to.
    #[error("cannot show progress: {0}")]
    Show(io::Error),
    /// The data could not be opened.
    #[error(transparent)]
    Data(#[from] senmon_data::DataError),
    /// An MoE layer cannot be built, or failed.
    #[error(transparent)]
    Moe(#[from] senmon_moe::MoeError),
    /// The model cannot be built, read or written.
    #[error(transparent)]
    Model(#[from] senmon_models::ModelError),
    /// A trace of routing is not sound, or cannot be read or written.
    #[error(transparent)]
    Insight(#[from] senmon_insight::InsightError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl TrainError {
    /// True if the user can put it right by another argument, another file or room on a disk: the binary
    /// ends with 2 for these, with 1 for the rest.
    pub fn is_users_mistake(&self) -> bool {
        match self {
            TrainError::Data(e) => e.is_users_mistake(),
            TrainError::Model(e) => e.is_users_mistake(),
            TrainError::Insight(e) => e.is_users_mistake(),
            TrainError::Unsaved { what, .. } => what.is_users_mistake(),
            TrainError::NonFinite { .. }
            | TrainError::Moe(_)
            | TrainError::Tensor(_)
            | TrainError::Show(_) => false,
            _ => true,
        }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| TrainError::Io { action, path, source }
    }

    pub(crate) fn bad(key: &str, value: impl ToString, expected: impl Into<String>) -> Self {
        TrainError::BadValue { key: key.to_owned(), value: value.to_string(), expected: expected.into() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, TrainError>;
