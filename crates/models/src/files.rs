//! Files written whole or not at all, with errors that name them.

use crate::error::{ModelError, Result};
use std::io::Write;
use std::path::Path;

/// True if a file is there; that it may not be looked at is an error, not an absence.
pub fn is_file(path: &Path) -> Result<bool> {
    senmon_files::is_file(path).map_err(ModelError::io("read", path))
}

/// Writes a file through `write`: into a temporary file beside it, to the disk, then renamed over it. When anything
/// fails, nothing is left and what was there stays.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    senmon_files::write_whole(path, write).map_err(ModelError::io("write", path))
}
