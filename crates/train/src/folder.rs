//! The folder of a run: who may write into it, and its checkpoints.
//!
//! A folder belongs to one process at a time, by a file lock that dies with the process. A checkpoint is a folder
//! `checkpoints/step-00001234`; it is written under another name and renamed when every byte of it is on disk, so that
//! one with this name is whole.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::config::RunConfig;
use crate::error::{Result, TrainError};

/// The configuration of the run.
pub const CONFIG: &str = "senmon.toml";
/// One line a step.
pub const METRICS: &str = "metrics.jsonl";
/// Folder of the routing of held-out text as a run goes.
pub const TRACES: &str = "traces";

const LOCK: &str = ".lock";
const CHECKPOINTS: &str = "checkpoints";
const PREFIX: &str = "step-";
const UNFINISHED: &str = ".tmp";
/// Begins the name of a file that is about to take its place in the run folder.
pub(crate) const PUBLISHING: &str = ".publishing-";
/// Begins the name of a file that is being written ([`senmon_models::files`]).
const WRITING: &str = ".writing-";

/// A run folder that this process alone writes to.
#[derive(Debug)]
pub struct RunFolder {
    root: PathBuf,
    /// The folder and those above it that were made here, the highest last.
    made: Vec<PathBuf>,
    /// Held, not read: the lock ends with it.
    _lock: File,
}

/// The step of a file in [`TRACES`], by its name.
pub fn step_of_trace(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()
}

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Checkpoint {
    /// Optimiser steps done.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
}

/// A checkpoint that is being written. Dropped before [`Pending::commit`], it is removed.
#[derive(Debug)]
pub struct Pending {
    path: PathBuf,
    checkpoint: Checkpoint,
    done: bool,
}

impl RunFolder {
    /// Takes a folder for a new run: one that does not exist yet, or is empty.
    pub fn create(root: &Path) -> Result<Self> {
        let made = match fs::metadata(root) {
            Ok(meta) if !meta.is_dir() => return Err(TrainError::NotAFolder { path: root.to_owned() }),
            Ok(_) => Vec::new(),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let new = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
                let made = root.ancestors().take_while(new).map(Path::to_owned).collect();
                fs::create_dir_all(root).map_err(TrainError::io("create", root))?;
                made
            }
            Err(e) => return Err(TrainError::io("read", root)(e)),
        };
        let foreign = foreign_file(root)?;
        if let Some(found) = foreign {
            return Err(refusal(root, found));
        }
        let lock = take_lock(root)?;
        // Another process may have begun a run here between the look and the lock.
        if let Some(found) = foreign_file(root)? {
            return Err(refusal(root, found));
        }
        let folder = Self { root: root.to_owned(), made, _lock: lock };
        folder.sweep()?;
        Ok(folder)
    }

    /// Takes the folder of an earlier run, to go on with it.
    pub fn resume(root: &Path) -> Result<Self> {
        let no_run = |reason: &str| TrainError::NoRun { path: root.to_owned(), reason: reason.to_owned() };
        match fs::metadata(root) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(no_run("there is no such folder")),
            Err(e) => return Err(TrainError::io("read", root)(e)),
            Ok(meta) if !meta.is_dir() => return Err(TrainError::NotAFolder { path: root.to_owned() }),
            Ok(_) => {}
        }
        if !root.join(CONFIG).is_file() {
            return Err(no_run("it has no senmon.toml"));
        }
        let lock = take_lock(root)?;
        let folder = Self { root: root.to_owned(), made: Vec::new(), _lock: lock };
        folder.sweep()?;
        Ok(folder)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the routing of the held-out text at a step goes.
    pub fn trace(&self, step: u64) -> PathBuf {
        self.root.join(TRACES).join(format!("step-{step:08}.safetensors"))
    }

    /// Where `metrics.jsonl` is.
    pub fn metrics(&self) -> PathBuf {
        self.root.join(METRICS)
    }

    /// Writes the run's configuration; from here on the folder holds a run.
    pub fn write_config(&self, config: &RunConfig) -> Result<()> {
        write_whole(&self.root.join(CONFIG), config.to_toml()?.as_bytes())
    }

    /// Reads the run's configuration.
    pub fn read_config(&self) -> Result<RunConfig> {
        let path = self.root.join(CONFIG);
        let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        RunConfig::from_toml(&path.display().to_string(), &text)
    }

    /// Gives the folder of a run up that failed before its first step, as if it had never been taken: it was empty.
    pub fn abandon(self) {
        let _ = fs::remove_dir_all(self.root.join(CHECKPOINTS));
        for name in names(&self.root).unwrap_or_default() {
            // What a checkpoint shows here, and no other.
            let model = name.starts_with("model")
                && (name.ends_with(".safetensors") || name.ends_with(".index.json"));
            let ours =
                [CONFIG, METRICS, LOCK, "config.json", "generation_config.json"].contains(&name.as_str());
            if model || ours || name.starts_with("tokenizer") || name.starts_with(PUBLISHING) {
                let _ = fs::remove_file(self.root.join(name));
            }
        }
        for folder in &self.made {
            // Only an empty folder goes.
            let _ = fs::remove_dir(folder);
        }
    }

    /// The whole checkpoints, oldest first.
    pub fn checkpoints(&self) -> Result<Vec<Checkpoint>> {
        checkpoints(&self.root)
    }

    /// The newest whole checkpoint.
    pub fn newest(&self) -> Result<Option<Checkpoint>> {
        Ok(self.checkpoints()?.pop())
    }

    /// Begins a checkpoint: its files go into [`Pending::path`].
    pub fn begin(&self, step: u64) -> Result<Pending> {
        let name = format!("{PREFIX}{step:08}");
        let folder = self.root.join(CHECKPOINTS);
        let path = folder.join(format!("{name}{UNFINISHED}"));
        if path.exists() {
            fs::remove_dir_all(&path).map_err(TrainError::io("remove", &path))?;
        }
        fs::create_dir_all(&path).map_err(TrainError::io("create", &path))?;
        let checkpoint = Checkpoint { step, path: folder.join(name) };
        Ok(Pending { path, checkpoint, done: false })
    }

    /// Removes all but the newest `keep` checkpoints (at least one stays); answers what was removed.
    pub fn prune(&self, keep: usize) -> Result<Vec<Checkpoint>> {
        let mut old = self.checkpoints()?;
        old.truncate(old.len().saturating_sub(keep.max(1)));
        for checkpoint in &old {
            remove_checkpoint(&checkpoint.path)?;
        }
        Ok(old)
    }

    /// Removes the checkpoints after `step`: those of a run that is gone on with from an earlier one.
    pub fn remove_after(&self, step: u64) -> Result<()> {
        self.checkpoints()?
            .iter()
            .filter(|checkpoint| checkpoint.step > step)
            .try_for_each(|checkpoint| remove_checkpoint(&checkpoint.path))
    }

    /// Removes what a killed process left half-written.
    fn sweep(&self) -> Result<()> {
        let folder = self.root.join(CHECKPOINTS);
        for name in names(&folder)? {
            if name.starts_with(PREFIX) && name.ends_with(UNFINISHED) {
                let path = folder.join(name);
                fs::remove_dir_all(&path).map_err(TrainError::io("remove", &path))?;
            }
        }
        for name in names(&self.root)? {
            if name.starts_with(PUBLISHING) || name.starts_with(WRITING) {
                let path = self.root.join(name);
                fs::remove_file(&path).map_err(TrainError::io("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// The whole checkpoints of the run in `root`, oldest first.
pub fn checkpoints(root: &Path) -> Result<Vec<Checkpoint>> {
    let folder = root.join(CHECKPOINTS);
    let mut found: Vec<_> = names(&folder)?
        .into_iter()
        .filter_map(|name| {
            let digits = name.strip_prefix(PREFIX)?;
            let plain = digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit());
            let step = plain.then(|| digits.parse().ok()).flatten()?;
            Some(Checkpoint { step, path: folder.join(name) })
        })
        .filter(|checkpoint| checkpoint.path.is_dir())
        .collect();
    found.sort();
    Ok(found)
}

impl Pending {
    /// Where the checkpoint's files go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Brings every file to the disk and gives the checkpoint its name.
    pub fn commit(mut self) -> Result<Checkpoint> {
        sync_tree(&self.path)?;
        let target = &self.checkpoint.path;
        if target.exists() {
            remove_checkpoint(target)?;
        }
        fs::rename(&self.path, target).map_err(TrainError::io("write", target))?;
        self.done = true;
        if let Some(parent) = target.parent() {
            sync_folder(parent)?;
            if let Some(root) = parent.parent() {
                sync_folder(root)?;
            }
        }
        Ok(self.checkpoint.clone())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Writes a file as a whole: into a temporary file beside it, to the disk, then renamed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(senmon_models::files::write_whole(path, |file| file.write_all(bytes))?)
}

/// Takes the name away first, so that a half-removed checkpoint is never taken for a whole one.
fn remove_checkpoint(path: &Path) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".old");
    name.push(UNFINISHED);
    let gone = PathBuf::from(name);
    if gone.exists() {
        fs::remove_dir_all(&gone).map_err(TrainError::io("remove", &gone))?;
    }
    fs::rename(path, &gone).map_err(TrainError::io("remove", path))?;
    fs::remove_dir_all(&gone).map_err(TrainError::io("remove", &gone))
}

fn sync_tree(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(name);
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|f| f.sync_all()).map_err(TrainError::io("write", &path))?;
        }
    }
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> Result<()> {
    // Elsewhere a folder cannot be opened as a file, and a rename is on disk by itself.
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(TrainError::io("write", folder))?;
    }
    Ok(())
}

/// The names in a folder; none if there is no such folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(TrainError::io("read", folder)(e)),
    };
    entries
        .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()
        .map_err(TrainError::io("read", folder))
}

/// A file that is not ours to write over: that of a run if there is one, else the first by name.
fn foreign_file(root: &Path) -> Result<Option<String>> {
    let mut names = names(root)?;
    // A process that was killed at its start leaves these.
    names.retain(|name| name != LOCK && !name.starts_with(WRITING));
    names.sort();
    let of_run = names.iter().position(|name| is_of_run(name));
    Ok(match of_run {
        Some(i) => Some(names.swap_remove(i)),
        None => names.into_iter().next(),
    })
}

fn is_of_run(name: &str) -> bool {
    [CONFIG, "config.json", CHECKPOINTS, METRICS].contains(&name)
}

fn refusal(root: &Path, found: String) -> TrainError {
    let path = root.to_owned();
    if is_of_run(&found) { TrainError::HoldsRun { path } } else { TrainError::NotEmpty { path, found } }
}

fn take_lock(root: &Path) -> Result<File> {
    let path = root.join(LOCK);
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(TrainError::io("write", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::InUse { path: root.to_owned() }),
        // A file system without locks: better unlocked than not at all.
        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(TrainError::io("lock", path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_checkpoint(folder: &RunFolder, step: u64) -> Checkpoint {
        let pending = folder.begin(step).unwrap();
        fs::create_dir(pending.path().join("state")).unwrap();
        fs::write(pending.path().join("state/optimizer"), step.to_string()).unwrap();
        pending.commit().unwrap()
    }

    #[test]
    fn a_new_folder_a_second_process_and_a_resumption() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("runs/first");
        let folder = RunFolder::create(&root).unwrap();
        let busy = RunFolder::create(&root).unwrap_err();
        assert!(matches!(busy, TrainError::InUse { .. }), "{busy}");
        folder.write_config(&RunConfig::default()).unwrap();
        assert!(matches!(RunFolder::resume(&root).unwrap_err(), TrainError::InUse { .. }));
        drop(folder);
        let held = RunFolder::create(&root).unwrap_err().to_string();
        assert!(held.contains("--resume") && held.contains("already holds a run"), "{held}");
        let folder = RunFolder::resume(&root).unwrap();
        assert_eq!(folder.read_config().unwrap(), RunConfig::default());
        assert_eq!(folder.newest().unwrap(), None);
    }

    #[test]
    fn what_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        let error = RunFolder::create(dir.path()).unwrap_err().to_string();
        assert!(error.contains("letter.txt"), "{error}");
        assert!(!dir.path().join(LOCK).exists());
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(matches!(RunFolder::create(dir.path()).unwrap_err(), TrainError::HoldsRun { .. }));
        let file = dir.path().join("letter.txt");
        assert!(matches!(RunFolder::create(&file).unwrap_err(), TrainError::NotAFolder { .. }));
        assert!(matches!(RunFolder::resume(dir.path()).unwrap_err(), TrainError::NoRun { .. }));
        assert!(matches!(RunFolder::resume(&dir.path().join("no")).unwrap_err(), TrainError::NoRun { .. }));
        assert!(!dir.path().join("no").exists());
        // Below a file there is no folder to be made.
        assert!(RunFolder::create(&file.join("run")).is_err());
    }

    #[test]
    fn an_abandoned_folder_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("run");
        RunFolder::create(&root).unwrap().abandon();
        assert!(!root.exists());
        RunFolder::create(dir.path()).unwrap().abandon();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn checkpoints_are_whole_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(&dir.path().join("run")).unwrap();
        folder.write_config(&RunConfig::default()).unwrap();
        for step in [1, 5, 9, 123_456_789] {
            write_checkpoint(&folder, step);
        }
        let newest = folder.newest().unwrap().unwrap();
        assert_eq!(newest.step, 123_456_789);
        assert!(newest.path.ends_with("checkpoints/step-123456789"));
        // The same step again takes the place of the first.
        let again = write_checkpoint(&folder, 9);
        assert_eq!(fs::read_to_string(again.path.join("state/optimizer")).unwrap(), "9");
        drop(folder.begin(10).unwrap());
        assert_eq!(folder.checkpoints().unwrap().len(), 4);
        assert_eq!(folder.prune(2).unwrap().iter().map(|c| c.step).collect::<Vec<_>>(), [1, 5]);
        assert_eq!(
            folder.checkpoints().unwrap().iter().map(|c| c.step).collect::<Vec<_>>(),
            [9, 123_456_789]
        );
        folder.remove_after(9).unwrap();
        assert_eq!(folder.newest().unwrap().unwrap().step, 9);
        assert_eq!(folder.prune(0).unwrap(), []);

        // A process killed in the midst of writing, and another of removing.
        let half = folder.begin(11).unwrap();
        let left = half.path().to_owned();
        std::mem::forget(half);
        let removed = left.with_file_name("step-00000003.old.tmp");
        fs::create_dir(&removed).unwrap();
        fs::write(left.with_file_name("notes.txt"), "mine").unwrap();
        fs::create_dir(left.with_file_name("step-7")).unwrap();
        assert_eq!(folder.newest().unwrap().unwrap().step, 9);
        let root = folder.root().to_owned();
        drop(folder);
        let folder = RunFolder::resume(&root).unwrap();
        assert!(!left.exists() && !removed.exists());
        assert!(left.with_file_name("notes.txt").exists());
        assert_eq!(folder.checkpoints().unwrap().len(), 1);
    }

    #[test]
    fn a_file_written_whole_replaces_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_whole(&dir.path().join("no/where"), b"x").is_err());
    }
}
