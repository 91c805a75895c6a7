//! One file, downloaded into the cache: gone on with where it broke off, and there only once it is whole.

use crate::cache::{Cached, make_parent};
use crate::client::{Client, Meta};
use crate::error::{HubError, Result};
use crate::find::Progress;
use crate::name::Name;
use ring::digest::{Context, SHA256};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

/// Times that a broken connection is made again without a byte in between.
const RETRIES: u32 = 3;
/// The wait before the first of them; it doubles.
const WAIT: Duration = Duration::from_millis(500);
/// Bytes at once.
const CHUNK: usize = 256 << 10;

/// Where a file comes from and goes to.
pub(crate) struct Download<'a> {
    pub client: &'a Client,
    pub cached: &'a Cached,
    pub name: &'a Name,
    pub commit: &'a str,
    pub progress: &'a dyn Progress,
}

/// A file that is not whole yet.
struct Partial<'a> {
    path: &'a Path,
    file: File,
    have: u64,
    hash: Context,
}

impl<'a> Partial<'a> {
    /// What an earlier download has left, or nothing.
    fn open(path: &'a Path) -> Result<Self> {
        make_parent(path)?;
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let file = file.map_err(HubError::io("write", path))?;
        let mut partial = Self { path, file, have: 0, hash: Context::new(&SHA256) };
        let mut chunk = vec![0; CHUNK];
        loop {
            match partial.file.read(&mut chunk).map_err(HubError::io("read", path))? {
                0 => return Ok(partial),
                n => {
                    partial.hash.update(&chunk[..n]);
                    partial.have += n as u64;
                }
            }
        }
    }

    /// Begins again.
    fn clear(&mut self) -> Result<()> {
        (self.have, self.hash) = (0, Context::new(&SHA256));
        let cleared = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cleared.map(drop).map_err(HubError::io("write", self.path))
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(HubError::io("write", self.path))?;
        self.hash.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }
}

impl Download<'_> {
    /// Makes a file of the repository be in the snapshot.
    pub fn file(&self, file: &str) -> Result<()> {
        if self.cached.snapshot(self.commit).join(file).is_file() {
            return Ok(());
        }
        let url = self.client.address(self.name, self.commit, file);
        let meta = self.client.meta(self.name, &url)?;
        let wait = || self.progress.note(&format!("{file} is being downloaded by another process: waiting"));
        let _lock = self.cached.lock(&meta.etag, wait)?;
        let blob = self.cached.blob(&meta.etag);
        // Another commit may have the same content.
        if !blob.metadata().is_ok_and(|found| found.len() == meta.size) {
            self.content(file, &url, &meta, &blob)?;
        }
        self.cached.link(&meta.etag, self.commit, file)
    }

    /// Downloads a content, and gives it its name when it is whole.
    fn content(&self, file: &str, url: &str, meta: &Meta, blob: &Path) -> Result<()> {
        let path = blob.with_file_name(format!("{}.incomplete", meta.etag));
        let mut partial = Partial::open(&path)?;
        if partial.have > meta.size {
            partial.clear()?;
        }
        let mut failures = 0;
        while partial.have < meta.size {
            let before = partial.have;
            let Err(error) = self.more(file, url, meta, &mut partial) else { continue };
            failures = if partial.have > before { 1 } else { failures + 1 };
            if !matches!(error, HubError::Network { .. } | HubError::Broken { .. }) || failures > RETRIES {
                return Err(error);
            }
            std::thread::sleep(WAIT * (1 << (failures - 1)));
        }
        let hash = partial.hash.finish();
        let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if meta.sha256.as_ref().is_some_and(|expected| *expected != hex) {
            fs::remove_file(&path).map_err(HubError::io("write", &path))?;
            let what = "what came is not what the server says the file holds (SHA-256): try again".into();
            return Err(HubError::Server { url: url.into(), what });
        }
        partial.file.sync_all().map_err(HubError::io("write", &path))?;
        fs::rename(&path, blob).map_err(HubError::io("write", blob))
    }

    /// Reads until the file is whole, or the connection breaks.
    fn more(&self, file: &str, url: &str, meta: &Meta, partial: &mut Partial) -> Result<()> {
        self.progress.at(file, partial.have, meta.size);
        let (start, body) = self.client.content(self.name, url, partial.have)?;
        if start != partial.have {
            partial.clear()?;
        }
        let mut body = body.into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let broken = |what: String| HubError::Broken {
                name: self.name.to_string(),
                file: file.into(),
                at: partial.have,
                size: meta.size,
                what,
            };
            let n = body.read(&mut chunk).map_err(|e| broken(e.to_string()))?;
            if n == 0 && partial.have < meta.size {
                return Err(broken("the server says that this is all".into()));
            }
            if n as u64 > meta.size - partial.have {
                partial.clear()?;
                let what = format!("the server sends more than the {} bytes that it said", meta.size);
                return Err(HubError::Server { url: url.into(), what });
            }
            if n == 0 {
                return Ok(());
            }
            partial.push(&chunk[..n])?;
            self.progress.at(file, partial.have, meta.size);
        }
    }
}
