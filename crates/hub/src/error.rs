//! Everything that can go wrong between a name and a model, one clear line each.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A name that is none.
    #[error("{name} is not a model of the hub: {what}")]
    Name {
        /// The name as it was given.
        name: String,
        /// What is wrong with it, and how it should look.
        what: String,
    },
    /// An environment variable that cannot be used.
    #[error("{variable}: {what}")]
    Variable {
        /// Which.
        variable: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// No repository, or no revision, of this name.
    #[error(
        "{name}: there is no such path here, and no such model or revision at {endpoint}: check the name"
    )]
    NotFound {
        /// The name as it was given.
        name: String,
        /// The server.
        endpoint: String,
    },
    /// A repository that is gated, private, or not there: a server says no more to strangers.
    #[error("{name}: {endpoint} refuses it ({status}): {}", advice(*token))]
    Forbidden {
        /// The name as it was given.
        name: String,
        /// The server.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// A token was sent.
        token: bool,
    },
    /// The server cannot be reached.
    #[error("{name}: there is no such path here, and {host} cannot be reached: {what}")]
    Network {
        /// The name as it was given.
        name: String,
        /// The server.
        host: String,
        /// What the system said.
        what: String,
    },
    /// A download that broke off; what came of it is kept.
    #[error(
        "{name}: {file} broke off at byte {at} of {size}: {what}: run the command again to go on from there"
    )]
    Broken {
        /// The name as it was given.
        name: String,
        /// The file.
        file: String,
        /// The bytes that came.
        at: u64,
        /// Its bytes.
        size: u64,
        /// What the system said.
        what: String,
    },
    /// The server answers as it should not.
    #[error("{url}: {what}")]
    Server {
        /// What was asked for.
        url: String,
        /// What came of it.
        what: String,
    },
    /// Offline, and not in the cache.
    #[error("{name}: {what}, and HF_HUB_OFFLINE forbids to download it")]
    Offline {
        /// The name as it was given.
        name: String,
        /// What is missing, and where.
        what: String,
    },
    /// A repository whose files are no model that can be used, or that cannot be trusted.
    #[error("{name}: {what}")]
    Repository {
        /// The name as it was given.
        name: String,
        /// What was found, and what was expected.
        what: String,
    },
    /// A file of the cache that cannot be read or written (disk full, permissions).
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

fn advice(token: bool) -> &'static str {
    match token {
        true => {
            "the token is not valid, or the model is private or gated, and its licence must be accepted on its page first"
        }
        false => {
            "there is no such model, or it is private or gated: accept its licence on its page and set HF_TOKEN"
        }
    }
}

impl HubError {
    /// True if the user can put it right: the binary ends with 2 for these.
    pub fn is_users_mistake(&self) -> bool {
        !matches!(self, HubError::Network { .. } | HubError::Broken { .. } | HubError::Server { .. })
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| HubError::Io { action, path, source }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, HubError>;
