//! How the crate tells about long work, and how it is told to stop: it never prints.

/// What a caller plugs in to see the stages of opening a data set and to cancel them.
///
/// Calls come from several threads at once.
pub trait Progress: Send + Sync {
    /// A stage begins; `total` is its length in the units of [`Progress::advance`] (files or bytes,
    /// as the name says), where it is known.
    fn stage(&self, name: &str, total: Option<u64>);
    /// `n` more units of the current stage are done.
    fn advance(&self, n: u64);
    /// True if the work should end early with [`crate::DataError::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Shows nothing and never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn stage(&self, _name: &str, _total: Option<u64>) {}
    fn advance(&self, _n: u64) {}
}
