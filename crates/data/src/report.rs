//! What was found in the text, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What opening a data set found. Sizes are bytes of text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Files that gave at least one document.
    pub files_read: u64,
    /// Files and folders left out, counted by reason.
    pub files_skipped: BTreeMap<String, u64>,
    /// Rows of `.jsonl` and `.parquet` files left out, counted by reason.
    pub rows_skipped: BTreeMap<String, u64>,
    /// Documents kept, duplicates not among them.
    pub documents: u64,
    /// Bytes of the documents kept.
    pub bytes: u64,
    /// Documents removed because an equal one came before.
    pub duplicates: u64,
    /// Bytes of the documents removed as duplicates.
    pub duplicate_bytes: u64,
    /// Documents taken out of the held-out part because the training part holds the same text
    /// (only without `dedupe`).
    pub straddlers: u64,
    /// The domains by size, largest first; the position is the id.
    pub domains: Vec<DomainReport>,
    /// Number of domains joined into `other` because only the 31 largest keep their name.
    pub domains_joined: u64,
    /// Groups in total.
    pub groups: u64,
    /// Groups held out.
    pub groups_held_out: u64,
    /// The rule by which the text was grouped for the split, for people.
    pub split_rule: String,
    /// Bytes held out.
    pub held_out_bytes: u64,
    /// Fraction of the held-out 13-grams (over whitespace-separated words) that the training part
    /// holds too; none where there is no held-out 13-gram.
    pub overlap: Option<f64>,
    /// Number of held-out 13-grams looked for: all of them, or a sample.
    pub overlap_sampled: u64,
    /// Size of the vocabulary (the largest token id + 1).
    pub vocab: u64,
    /// Where the tokenizer is from, for people.
    pub tokenizer: String,
}

/// One domain in a [`Report`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainReport {
    /// Its name.
    pub name: String,
    /// Bytes in the training part.
    pub train_bytes: u64,
    /// Bytes in the held-out part.
    pub held_out_bytes: u64,
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn counts(map: &BTreeMap<String, u64>) -> String {
    map.iter().map(|(why, n)| format!("{n} {why}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "text       {} documents, {}", self.documents, size(self.bytes))?;
        write!(f, " from {} files", self.files_read)?;
        if self.duplicates > 0 {
            write!(f, "; {} duplicates ({}) removed", self.duplicates, size(self.duplicate_bytes))?;
        }
        if !self.files_skipped.is_empty() {
            write!(f, "\nskipped    files: {}", counts(&self.files_skipped))?;
        }
        if !self.rows_skipped.is_empty() {
            write!(f, "\nskipped    rows: {}", counts(&self.rows_skipped))?;
        }
        let shown: Vec<String> = self
            .domains
            .iter()
            .take(6)
            .map(|d| format!("{} {}", d.name, size(d.train_bytes + d.held_out_bytes)))
            .collect();
        write!(f, "\ndomains    {}", shown.join(", "))?;
        if self.domains.len() > 6 {
            write!(f, ", {} more", self.domains.len() - 6)?;
        }
        write!(f, "\nheld out   {}", size(self.held_out_bytes))?;
        if self.held_out_bytes > 0 {
            write!(f, ", {} of {} groups ({})", self.groups_held_out, self.groups, self.split_rule)?;
        }
        if let Some(overlap) = self.overlap {
            write!(f, "; {:.1} % of its 13-grams are in the training part", 100.0 * overlap)?;
        }
        if self.straddlers > 0 {
            write!(f, "; {} copies of training text taken out", self.straddlers)?;
        }
        write!(f, "\ntokenizer  {}, {} tokens", self.tokenizer, self.vocab)
    }
}
