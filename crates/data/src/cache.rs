//! Files of the cache folder: written whole or not at all.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::error::{DataError, Result};

/// Creates a folder of the cache, and those above it.
pub(crate) fn folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|source| DataError::Cache {
        action: "create",
        path: path.to_owned(),
        source,
    })
}

/// Writes a file by `fill` under a temporary name in its own folder, syncs and renames it. Two processes may do so at
/// once: the content follows from the name, so whichever comes last changes nothing.
pub(crate) fn write_whole(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    senmon_files::write_whole(path, fill).map_err(|source| DataError::Cache {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        let error = write_whole(&path, |out| {
            out.write_all(&[1; 100])?;
            Err(std::io::Error::new(std::io::ErrorKind::StorageFull, "no space left on device"))
        })
        .unwrap_err();
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        write_whole(&path, |out| out.write_all(b"whole")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
