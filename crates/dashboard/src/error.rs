//! What can go wrong with a live view.

use std::net::SocketAddr;

use thiserror::Error;

/// Results of this crate.
pub type Result<T, E = DashboardError> = std::result::Result<T, E>;

/// What can go wrong with a live view.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DashboardError {
    /// It is no address.
    #[error(
        "--dashboard expects PORT, HOST:PORT or [HOST]:PORT with a host of this machine (127.0.0.1, localhost, [::1]), found {0:?}"
    )]
    Address(String),
    /// Others could reach it.
    #[error(
        "--dashboard: the live view is for this machine alone, and {0} can be reached from others; give a port only, and from elsewhere go \
         through ssh -L PORT:127.0.0.1:PORT"
    )]
    Exposed(SocketAddr),
    /// It cannot be had.
    #[error(
        "--dashboard: cannot serve the live view on {address}: {error}; give another port, or 0 for any that is free"
    )]
    Taken {
        /// Where it was to be.
        address: SocketAddr,
        /// What the system says.
        error: std::io::Error,
    },
    /// No thread for it.
    #[error("--dashboard: cannot start the live view: {0}")]
    Start(std::io::Error),
}

impl DashboardError {
    /// Whether the user can put it right.
    pub fn is_users_mistake(&self) -> bool {
        !matches!(self, Self::Start(_))
    }
}
