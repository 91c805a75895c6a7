//! What was measured: one line a finished run in `results.jsonl`, written whole. A line cut short by a crash is left out.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{CompareError, Result};

/// The file's name in the folder of a comparison.
pub const RESULTS: &str = "results.jsonl";

/// An evaluation on the way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens trained on; of an ensemble, each member.
    pub tokens: u64,
    /// Held-out bits per byte.
    pub bits_per_byte: f64,
    /// Held-out loss by block of held-out text, nats: \[G\].
    pub blocks: Vec<f64>,
}

/// The held-out loss of one window at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Its domain, by its place in [`Record::domains`].
    pub domain: u16,
    /// Tokens that were predicted.
    pub tokens: u32,
    /// Bytes that they stand for.
    pub bytes: u32,
    /// Their loss, nats.
    pub nats: f64,
}

/// A finished run, or an ensemble of finished runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The hash of its configuration ([`crate::plan::hash_of`]); of an ensemble, of those of its members.
    pub hash: String,
    /// The name of its folder.
    pub name: String,
    /// The seed of the comparison.
    pub seed: u64,
    /// How many members predict together.
    pub members: usize,
    /// Parameters of all members.
    pub parameters: u64,
    /// Parameters of all members that a token meets.
    pub active_parameters: u64,
    /// Operations per token of a forward pass of all members.
    pub flops_per_token: u64,
    /// Tokens trained on; of an ensemble, each member.
    pub tokens: u64,
    /// Steps taken.
    pub steps: u64,
    /// Seconds of training, at the speed of the median step; of an ensemble, of all members one after another.
    pub seconds: f64,
    /// The most memory that the process held while it trained, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// What its time was measured with: threads and the instruction set; empty where nothing was trained.
    #[serde(default)]
    pub machine: String,
    /// A key of the text.
    pub data: String,
    /// Held-out bits per byte at the end.
    pub bits_per_byte: f64,
    /// Evaluations, the last one at the end.
    pub curve: Vec<Point>,
    /// Bytes of each block of held-out text: \[G\].
    pub block_bytes: Vec<u64>,
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Held-out windows at the end.
    pub windows: Vec<Window>,
    /// Why it ended before its end, where it did; there is no loss then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Record {
    /// Training operations.
    pub fn training_flops(&self) -> f64 {
        3.0 * self.flops_per_token as f64 * self.tokens as f64
    }

    /// The curve of held-out bits per byte over tokens.
    pub fn by_tokens(&self) -> Vec<(f64, f64)> {
        self.curve.iter().map(|p| (p.tokens as f64, p.bits_per_byte)).collect()
    }

    /// The same of the held-out text without one of its blocks.
    pub fn by_tokens_without(&self, left_out: Option<usize>) -> Vec<(f64, f64)> {
        let Some(block) = left_out else { return self.by_tokens() };
        let kept = |g: &usize| *g != block;
        let bytes: u64 = (0..self.block_bytes.len()).filter(kept).map(|g| self.block_bytes[g]).sum();
        let bits = |p: &Point| {
            let nats: f64 = (0..p.blocks.len()).filter(kept).map(|g| p.blocks[g]).sum();
            nats / std::f64::consts::LN_2 / bytes.max(1) as f64
        };
        self.curve.iter().map(|p| (p.tokens as f64, bits(p))).collect()
    }

    /// The same over seconds.
    pub fn by_seconds(&self) -> Vec<(f64, f64)> {
        self.scaled(self.seconds / self.tokens.max(1) as f64)
    }

    /// The same over training operations.
    pub fn by_flops(&self) -> Vec<(f64, f64)> {
        self.scaled(3.0 * self.flops_per_token as f64)
    }

    fn scaled(&self, factor: f64) -> Vec<(f64, f64)> {
        self.by_tokens().into_iter().map(|(tokens, bits)| (factor * tokens, bits)).collect()
    }

    /// The tokens of the evaluation with the lowest held-out loss among those up to `tokens`; `tokens` itself where there is none.
    pub fn best_until(&self, tokens: f64) -> f64 {
        let until = self.curve.iter().filter(|p| p.tokens as f64 <= tokens);
        until.min_by(|a, b| a.bits_per_byte.total_cmp(&b.bits_per_byte)).map_or(tokens, |p| p.tokens as f64)
    }

    /// The lowest held-out loss on the way, in bits per byte.
    pub fn best(&self) -> f64 {
        self.curve.iter().map(|p| p.bits_per_byte).fold(f64::INFINITY, f64::min)
    }
}

/// `results.jsonl`, for this process alone.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
    /// Held, not read.
    _lock: File,
}

impl Results {
    /// Opens the results in `out`, which is made where it is not there; what other runs put there is read.
    pub fn open(out: &Path) -> Result<Self> {
        if out.join(senmon_train::folder::CONFIG).is_file() {
            let what = format!("{} holds a run, not a comparison: choose another --out", out.display());
            return Err(CompareError::Mistake(what));
        }
        std::fs::create_dir_all(out).map_err(CompareError::io("create", out))?;
        let lock_path = out.join(".compare-lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(CompareError::io("write", &lock_path))?;
        if matches!(lock.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
            let what = format!(
                "{} is in use by another process: wait for it, or choose another --out",
                out.display()
            );
            return Err(CompareError::Mistake(what));
        }
        let path = out.join(RESULTS);
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = file.map_err(CompareError::io("open", &path))?;
        let bytes = std::fs::read(&path).map_err(CompareError::io("read", &path))?;
        // A line that a crash cut short may end within a character.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let bad = |reason: String| CompareError::File { path: path.clone(), reason };
        let text = std::str::from_utf8(&bytes[..whole]).map_err(|e| bad(e.to_string()))?;
        let read = |(i, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|e| CompareError::File {
                path: path.clone(),
                reason: format!("line {} is no result of a run: {e}", i + 1),
            })
        };
        let records = text.lines().enumerate().map(read).collect::<Result<Vec<Record>>>()?;
        // Another program's file is left as it is: only after results of runs is a rest cut off.
        if whole < bytes.len() {
            if records.is_empty() && !bytes.starts_with(b"{\"hash\"") {
                return Err(bad("does not hold results of runs: choose another --out".into()));
            }
            file.set_len(whole as u64).map_err(CompareError::io("shorten", &path))?;
        }
        Ok(Self { path, file, records, _lock: lock })
    }

    /// The record of a hash.
    pub fn find(&self, hash: &str) -> Option<&Record> {
        self.records.iter().find(|record| record.hash == hash)
    }

    /// All of them, in the order in which they were added.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// One more line, on the disk before this returns.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let mut line = serde_json::to_string(&record)
            .map_err(|e| CompareError::File { path: self.path.clone(), reason: e.to_string() })?;
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(CompareError::io("write", &self.path))?;
        self.records.push(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(hash: &str) -> Record {
        Record { hash: hash.into(), bits_per_byte: 1.5, seconds: 2.0, ..Record::default() }
    }

    #[test]
    fn lines_are_whole_and_a_half_one_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b");
        let mut results = Results::open(&out).unwrap();
        results.add(record("one")).unwrap();
        results.add(record("two")).unwrap();
        assert!(Results::open(&out).unwrap_err().to_string().contains("in use"));
        drop(results);
        let path = out.join(RESULTS);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let mut results = Results::open(&out).unwrap();
        assert_eq!(results.records(), [record("one")]);
        results.add(record("three")).unwrap();
        drop(results);
        let results = Results::open(&out).unwrap();
        assert!(results.find("three").is_some() && results.find("two").is_none());
        drop(results);
        for foreign in ["one line without an end", "{\"other\": 1}\nhalf a li"] {
            std::fs::write(&path, foreign).unwrap();
            assert!(Results::open(&out).unwrap_err().is_users_mistake());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), foreign);
        }
        // The first result, cut within a character.
        std::fs::write(&path, b"{\"hash\": \"\xe5\xb0").unwrap();
        assert!(Results::open(&out).unwrap().records().is_empty());
        std::fs::write(&path, "{}\nnonsense\n").unwrap();
        let error = Results::open(&out).unwrap_err();
        assert!(error.is_users_mistake() && error.to_string().contains("line 1"), "{error}");
    }
}
