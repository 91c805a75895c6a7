//! From a name to a model in the cache.

use crate::cache::Cached;
use crate::client::Client;
use crate::download::Download;
use crate::error::{HubError, Result};
use crate::name::Name;
use crate::settings::Settings;
use crate::wanted::{INDEX, Wanted, choose, shards};
use std::fs;
use std::path::{Path, PathBuf};

/// Told how far downloads are.
pub trait Progress {
    /// So many bytes of a file are there, of so many.
    fn at(&self, file: &str, done: u64, total: u64);
    /// Something that the user should know.
    fn note(&self, text: &str);
}

/// Finds models by their names.
pub struct Hub {
    settings: Settings,
    client: Client,
}

impl Hub {
    /// With these settings.
    pub fn new(settings: Settings) -> Self {
        Self { client: Client::new(&settings), settings }
    }

    /// The folder or `.gguf` file of a model, downloaded where it is not in the cache. Before the first byte of a folder's
    /// tensors, `accept` sees the folder with the configuration alone, and says why not where the model cannot be used.
    pub fn find(
        &self,
        name: &Name,
        progress: &dyn Progress,
        accept: &dyn Fn(&Path) -> std::result::Result<(), String>,
    ) -> Result<PathBuf> {
        let cached = Cached::new(&self.settings.cache, name);
        if self.settings.offline {
            return in_cache(name, &cached)
                .map_err(|what| HubError::Offline { name: name.to_string(), what });
        }
        let listing = self.client.listing(name);
        if let Err(HubError::Network { host, what, .. }) = &listing
            && let Ok(path) = in_cache(name, &cached)
        {
            progress.note(&format!("{host} cannot be reached ({what}): {name} is taken from the cache"));
            return Ok(path);
        }
        let (commit, listing) = listing?;
        let download = Download { client: &self.client, cached: &cached, name, commit: &commit, progress };
        let folder = cached.snapshot(&commit);
        let path = match choose(name, &listing)? {
            Wanted::Folder { beside, weights } => {
                for file in &beside {
                    download.file(file)?;
                }
                accept(&folder).map_err(|what| HubError::Repository { name: name.to_string(), what })?;
                download.file(&weights)?;
                if weights == INDEX {
                    for file in shards_of(name, &folder, &listing)? {
                        download.file(&file)?;
                    }
                }
                folder
            }
            Wanted::Gguf(files) => {
                for file in &files {
                    download.file(file)?;
                }
                folder.join(&files[0])
            }
        };
        // Only a commit that is whole becomes what the revision is without a network.
        cached.keep_commit(&commit)?;
        Ok(path)
    }
}

/// A model that is whole in the cache, or why it is not.
fn in_cache(name: &Name, cached: &Cached) -> std::result::Result<PathBuf, String> {
    let missing = || format!("there is no such path here, nor is it in {}", cached.folder().display());
    let commit = cached.commit().ok_or_else(missing)?;
    let files = cached.files(&commit);
    if files.is_empty() {
        return Err(missing());
    }
    let folder = cached.snapshot(&commit);
    let partly = |e: HubError| match e {
        HubError::Repository { what, .. } => {
            format!("{} has only a part of it, which {what}", folder.display())
        }
        e => e.to_string(),
    };
    match choose(name, &files).map_err(partly)? {
        Wanted::Folder { weights, .. } => {
            if weights == INDEX {
                shards_of(name, &folder, &files).map_err(partly)?;
            }
            Ok(folder)
        }
        Wanted::Gguf(files) => Ok(folder.join(&files[0])),
    }
}

/// The files that the index in a folder names.
fn shards_of(name: &Name, folder: &Path, listing: &[String]) -> Result<Vec<String>> {
    let path = folder.join(INDEX);
    let index = fs::read(&path).map_err(HubError::io("read", &path))?;
    shards(name, &index, listing)
}
