//! The cache, laid out as Python's `huggingface_hub` has it: contents in `blobs` by their hash, and for each commit a folder
//! in `snapshots` of links to them; `refs` says which commit a branch or a tag was when it was last asked for.

use crate::error::{HubError, Result};
use crate::name::{Name, is_commit};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// Folders within folders that are looked into: GGUF models may be in one each.
const MAX_DEPTH: usize = 3;

/// The part of a repository in the cache.
pub(crate) struct Cached {
    revision: String,
    folder: PathBuf,
    locks: PathBuf,
    paths: CacheRepo,
}

/// The repository at a revision, as addresses and folders are made of it.
pub(crate) fn repository(name: &Name, revision: &str) -> Repo {
    Repo::with_revision(name.repository.clone(), RepoType::Model, revision.to_owned())
}

impl Cached {
    pub fn new(cache: &Path, name: &Name) -> Self {
        let repository = repository(name, name.revision());
        let folder_name = repository.folder_name();
        Self {
            revision: name.revision().to_owned(),
            folder: cache.join(&folder_name),
            locks: cache.join(".locks").join(&folder_name),
            paths: Cache::new(cache.to_owned()).repo(repository),
        }
    }

    /// The folder of the repository.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn reference(&self) -> PathBuf {
        self.folder.join("refs").join(&self.revision)
    }

    /// The commit that the revision was when it was last asked for.
    pub fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let text = fs::read_to_string(self.reference()).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Keeps which commit the revision is.
    pub fn keep_commit(&self, commit: &str) -> Result<()> {
        let path = self.reference();
        if self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        make_parent(&path)?;
        senmon_files::write_whole(&path, |file| file.write_all(commit.as_bytes()))
            .map_err(HubError::io("write", &path))
    }

    /// The folder of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.paths.pointer_path(commit)
    }

    /// Where a content is, by its hash.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.paths.blob_path(etag)
    }

    /// The files of a commit that are there, by their names in the repository.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let mut found = Vec::new();
        collect(&self.snapshot(commit), "", MAX_DEPTH, &mut found);
        found.sort();
        found
    }

    /// Keeps other processes away from a content until the lock is dropped.
    pub fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        let lock = File::options().create(true).append(true).open(&path);
        let lock = lock.map_err(HubError::io("write", &path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                lock.lock().map_err(HubError::io("lock", &path))?;
            }
            Err(TryLockError::Error(e)) => return Err(HubError::io("lock", &path)(e)),
        }
        Ok(lock)
    }

    /// Makes a content the file of a commit.
    pub fn link(&self, etag: &str, commit: &str, file: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        make_parent(&path)?;
        if path.symlink_metadata().is_ok() {
            // It leads nowhere, or it would not be asked for.
            fs::remove_file(&path).map_err(HubError::io("write", &path))?;
        }
        point(&path, &self.blob(etag), etag, file).map_err(HubError::io("write", &path))
    }
}

/// A link that stays right when the whole cache is moved.
#[cfg(unix)]
fn point(path: &Path, _blob: &Path, etag: &str, file: &str) -> std::io::Result<()> {
    let up = "../".repeat(2 + file.matches('/').count());
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), path)
}

/// Links of Windows need a right that few users have.
#[cfg(not(unix))]
fn point(path: &Path, blob: &Path, _etag: &str, _file: &str) -> std::io::Result<()> {
    fs::hard_link(blob, path).or_else(|_| fs::copy(blob, path).map(drop))
}

/// Makes the folder that a file is to be in.
pub(crate) fn make_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(HubError::io("write", parent)),
        None => Ok(()),
    }
}

/// The files below a folder, with `prefix` before their names; links that lead nowhere are none.
fn collect(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        if path.is_file() {
            found.push(name);
        } else if depth > 0 && path.is_dir() {
            collect(&path, &format!("{name}/"), depth - 1, found);
        }
    }
}
