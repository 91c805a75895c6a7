//! The data set: what [`Dataset::open`] makes of a configuration, and the batches cut from it.
//!
//! Training reads an endless stream of windows. In each epoch the shards come in an order drawn from (seed, epoch); within a
//! shard the windows, S + 1 tokens long and S apart, come in an order drawn from (seed, epoch, shard), and start at an
//! offset drawn from the same. So every token but fewer than S of a shard is a target exactly once an epoch, other tokens
//! being left out each time. Micro-batch i is windows i·B to (i+1)·B of the stream: no state but i.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::cache;
use crate::config::{DataConfig, DomainRule, GroupRule};
use crate::domains::{self, Domains};
use crate::error::{DataError, Result};
use crate::eval::{self, EvalSequence};
use crate::hash::{mix, mix_all, permute};
use crate::overlap;
use crate::progress::{Progress, Silent};
use crate::report::{DomainReport, Report};
use crate::shards::{SHARD_BYTES, Shard, Shards};
use crate::source::{self, Columns, Corpus, TextReader};
use crate::split;
use crate::tokenizer::TextTokenizer;

/// A tokenizer is trained on at most this much text, in bytes.
const TOKENIZER_SAMPLE: u64 = 24_000_000;

/// One micro-batch of windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// [B, S + 1], row after row: inputs are the first S of a row, targets the last S.
    pub tokens: Vec<u32>,
    /// \[B\], the domain that most targets of the row are from.
    pub domains: Vec<u16>,
}

/// Text with domains, split into a training and a held-out part, as tokens in a cache.
#[derive(Debug)]
pub struct Dataset {
    report: Report,
    tokenizer: TextTokenizer,
    domains: Vec<String>,
    key: String,
    column: String,
    corpus: Arc<Corpus>,
    /// By domain, the documents held out.
    held_out: Vec<Vec<u32>>,
    shards: Shards,
}

impl Dataset {
    /// Reads the sources, splits them, trains or reads the tokenizer. Tokens are made later, when they are needed.
    ///
    /// What is slow (the trained tokenizer, the overlap, tokens, parquet files turned into lines) is kept in `cache_dir` under
    /// a hash of all that it depends on. Several processes may share the folder. Work is spread over the current rayon
    /// pool; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// Bad values and paths, no text, a rule file or tokenizer that is not one, a text that cannot be split, a cache that
    /// cannot be written; each names what and where ([`DataError`]).
    pub fn open(config: &DataConfig, cache_dir: &Path, progress: &dyn Progress) -> Result<Dataset> {
        Self::open_with(config, cache_dir, progress, SHARD_BYTES)
    }

    /// [`Dataset::open`] with shards of another size, so that tests reach many shards with little text.
    fn open_with(
        config: &DataConfig,
        cache_dir: &Path,
        progress: &dyn Progress,
        shard_bytes: u64,
    ) -> Result<Dataset> {
        config.validate()?;
        // A tokenizer that is not one is told before minutes of reading.
        let given = config.tokenizer.as_deref().map(TextTokenizer::from_file).transpose()?;
        cache::folder(cache_dir)?;
        let columns = Columns {
            text: &config.column,
            domain: match &config.domains {
                DomainRule::Column(name) => Some(name.as_str()),
                _ => None,
            },
            group: match &config.group {
                GroupRule::Column(name) => Some(name.as_str()),
                _ => None,
            },
        };
        let mut corpus = source::scan(&config.paths, columns, &cache_dir.join("tables"), progress)?;
        let (duplicates, duplicate_bytes) =
            if config.dedupe { source::remove_duplicates(&mut corpus) } else { (0, 0) };
        let mut domains = domains::assign(&corpus, &config.domains)?;
        let mut split = split::split(&mut corpus, &mut domains, &config.group, config.holdout)?;
        let straddlers = drop_straddlers(&mut corpus, &mut domains, &mut split.held_out);
        if config.holdout > 0.0 && !split.held_out.contains(&true) {
            let reason = "the training part holds the same text".to_owned();
            return Err(DataError::CannotSplit { reason });
        }

        let order = training_order(&corpus, &domains, &split.held_out, config.dedupe);
        let tokenizer = match given {
            Some(tokenizer) => tokenizer,
            None => trained_tokenizer(&corpus, &config.column, &order, config.vocab, cache_dir, progress)?,
        };
        let shards_key = shards_key(&corpus, &order, &tokenizer, shard_bytes);
        let key = whole_key(&corpus, &domains, &split.held_out, shards_key);
        let (overlap, overlap_sampled) =
            cached_overlap(&corpus, &config.column, &split.held_out, cache_dir, progress)?;

        let mut report = Report {
            files_read: corpus.files.len() as u64,
            files_skipped: corpus.files_skipped.clone(),
            rows_skipped: corpus.rows_skipped.clone(),
            documents: corpus.documents.len() as u64,
            bytes: corpus.documents.iter().map(|d| d.bytes).sum(),
            duplicates,
            duplicate_bytes,
            straddlers,
            domains: domains
                .names
                .iter()
                .map(|n| DomainReport { name: n.clone(), ..Default::default() })
                .collect(),
            domains_joined: domains.joined,
            groups: split.groups,
            groups_held_out: split.groups_held_out,
            split_rule: split.rule,
            held_out_bytes: 0,
            overlap,
            overlap_sampled,
            vocab: tokenizer.vocab_size() as u64,
            tokenizer: tokenizer.source().to_owned(),
        };
        let mut held_out: Vec<Vec<u32>> = vec![Vec::new(); domains.names.len()];
        for (number, document) in corpus.documents.iter().enumerate() {
            let domain = domains.of[number] as usize;
            if split.held_out[number] {
                report.domains[domain].held_out_bytes += document.bytes;
                report.held_out_bytes += document.bytes;
                held_out[domain].push(number as u32);
            } else {
                report.domains[domain].train_bytes += document.bytes;
            }
        }
        let corpus = Arc::new(corpus);
        let folder = cache_dir.join("tokens").join(shards_key.to_hex().as_str());
        let shards = Shards::new(
            folder,
            Arc::clone(&corpus),
            config.column.clone(),
            tokenizer.clone(),
            &order,
            shard_bytes,
        )?;
        let column = config.column.clone();
        let key = key.to_hex().to_string();
        Ok(Dataset { report, tokenizer, domains: domains.names, key, column, corpus, held_out, shards })
    }

    /// What was found.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// Domain names, largest first; the position is the id.
    pub fn domains(&self) -> &[String] {
        &self.domains
    }

    /// A hexadecimal key of all that batches depend on besides B, S and the seed: text, split, domains, tokenizer. A run that
    /// resumes on another key would not go on with the same data.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Micro-batch number `index` since the start of a run: `batch` windows of `sequence` + 1 tokens. Depends on the data,
    /// these sizes and the seed alone; any index may be asked for in any order. After the last window of an epoch
    /// comes the first of the next.
    ///
    /// The first batch that falls into a shard tokenizes it (seconds), unless it is in the cache or was made in the
    /// background meanwhile.
    ///
    /// # Errors
    /// [`DataError::TooSmall`] if no shard has a window; [`DataError::Changed`] or [`DataError::Unreadable`] if a source is no
    /// longer what it was; [`DataError::Cache`]; [`DataError::BadValue`] for a size of 0.
    pub fn batch(&self, index: u64, batch: usize, sequence: usize, seed: u64) -> Result<Batch> {
        let at_least_one = |key: &'static str| DataError::BadValue {
            key,
            value: "0".to_owned(),
            expected: "must be at least 1".to_owned(),
        };
        if batch == 0 {
            return Err(at_least_one("train.batch"));
        }
        if sequence == 0 {
            return Err(at_least_one("train.sequence"));
        }
        let first = index.checked_mul(batch as u64).ok_or_else(|| DataError::BadValue {
            key: "train.batch",
            value: batch.to_string(),
            expected: format!("batch number {index} is beyond 2^64 windows"),
        })?;
        let mut place = self.locate(first, sequence, seed)?;
        let row = sequence.saturating_add(1);
        let mut out = Batch { tokens: Vec::with_capacity(batch * row), domains: Vec::with_capacity(batch) };
        let mut open: Option<(usize, Arc<Shard>)> = None;
        while out.domains.len() < batch {
            let shard = self.shard_at(place.epoch, place.turn, seed);
            let tokens = match &open {
                Some((number, tokens)) if *number == shard => Arc::clone(tokens),
                _ => self.shards.get(shard)?,
            };
            let count = windows_of(tokens.len() as u64, sequence);
            if place.window >= count {
                place = Place { turn: place.turn + 1, window: 0, ..place };
                if place.turn >= self.shards.count() as u64 {
                    place = Place { epoch: place.epoch + 1, turn: 0, window: 0 };
                }
                continue;
            }
            let start = window_start(place, shard, tokens.len() as u64, sequence, seed) as usize;
            tokens.read(start, row, &mut out.tokens);
            out.domains.push(tokens.majority(start + 1, sequence));
            place.window += 1;
            open = Some((shard, tokens));
        }
        if place.turn + 1 < self.shards.count() as u64 {
            self.shards.prefetch(self.shard_at(place.epoch, place.turn + 1, seed));
        }
        Ok(out)
    }

    /// Held-out windows of `sequence` + 1 tokens, domain after domain: all of them, or at most `max_tokens_total` targets (but
    /// at least one window a domain), in equal numbers by domain as far as there are. Each window is from one domain;
    /// domains with less than a window are left out. Always the same for the same data.
    ///
    /// # Errors
    /// [`DataError::TooSmall`] if no domain has a window, as without a held-out part; those of reading.
    pub fn held_out(&self, sequence: usize, max_tokens_total: Option<usize>) -> Result<Vec<EvalSequence>> {
        let held_out = self.held_out.clone();
        let what = "the held-out part";
        let corpus = &self.corpus;
        eval::windows(
            corpus,
            &self.column,
            &self.tokenizer,
            held_out,
            sequence,
            max_tokens_total,
            what,
            &Silent,
        )
    }

    /// The shard that comes as number `turn` in an epoch.
    fn shard_at(&self, epoch: u64, turn: u64, seed: u64) -> usize {
        permute(turn, self.shards.count() as u64, mix_all(&[seed, epoch, 1])) as usize
    }

    /// Where window number `position` of the stream is. Walks shard by shard, making those on the way that are not there, as
    /// their lengths decide: the ones that a run from the start would have made.
    fn locate(&self, position: u64, sequence: usize, seed: u64) -> Result<Place> {
        let walk = |epoch: u64, mut left: u64| -> Result<std::result::Result<Place, u64>> {
            let position = left;
            for turn in 0..self.shards.count() as u64 {
                let count = windows_of(self.shards.length(self.shard_at(epoch, turn, seed))?, sequence);
                if left < count {
                    return Ok(Ok(Place { epoch, turn, window: left }));
                }
                left -= count;
            }
            Ok(Err(position - left))
        };
        let per_epoch = match walk(0, position)? {
            Ok(place) => return Ok(place),
            Err(per_epoch) => per_epoch,
        };
        if per_epoch > 0
            && let Ok(place) = walk(position / per_epoch, position % per_epoch)?
        {
            return Ok(place);
        }
        let mut tokens = 0;
        for shard in 0..self.shards.count() {
            tokens = tokens.max(self.shards.length(shard)?);
        }
        let what = "the training part".to_owned();
        Err(DataError::TooSmall { what, tokens, sequence, needed: (sequence as u64).saturating_add(1) })
    }
}

/// A place in the stream of windows.
#[derive(Clone, Copy, Debug)]
struct Place {
    epoch: u64,
    /// Position of the shard in the epoch's order.
    turn: u64,
    /// Position of the window in the shard's order.
    window: u64,
}

/// Windows of S + 1 tokens, S apart, in so many tokens.
fn windows_of(tokens: u64, sequence: usize) -> u64 {
    tokens.saturating_sub(1) / sequence as u64
}

/// First token of the window at a place, in a shard of so many tokens.
fn window_start(place: Place, shard: usize, tokens: u64, sequence: usize, seed: u64) -> u64 {
    let count = windows_of(tokens, sequence);
    let unused = (tokens - 1) % sequence as u64;
    let key = mix_all(&[seed, place.epoch, 2, shard as u64]);
    permute(place.window, count, key) * sequence as u64 + mix(key) % (unused + 1)
}

/// Training documents with their domains, in an order that mixes files and domains: that of their hashes.
fn training_order(corpus: &Corpus, domains: &Domains, held_out: &[bool], deduped: bool) -> Vec<(u32, u16)> {
    let key = |d: u32| {
        let hash = corpus.documents[d as usize].hash;
        let mut word = [0; 8];
        word.copy_from_slice(&hash[..8]);
        // Copies of one text would follow each other; their number parts them.
        mix(u64::from_le_bytes(word) ^ if deduped { 0 } else { mix(u64::from(d)) })
    };
    let mut order: Vec<u32> = (0..corpus.documents.len() as u32).filter(|&d| !held_out[d as usize]).collect();
    order.sort_by_cached_key(|&d| (key(d), d));
    order.into_iter().map(|d| (d, domains.of[d as usize])).collect()
}

/// Removes held-out documents that training holds too; their number.
fn drop_straddlers(corpus: &mut Corpus, domains: &mut Domains, held_out: &mut Vec<bool>) -> u64 {
    let drop = split::straddlers(corpus, held_out);
    let number = drop.iter().filter(|&&d| d).count() as u64;
    if number > 0 {
        let mut keep = drop.iter().map(|d| !d);
        corpus.documents.retain(|_| keep.next().unwrap_or(true));
        let mut keep = drop.iter().map(|d| !d);
        domains.of.retain(|_| keep.next().unwrap_or(true));
        let mut keep = drop.iter().map(|d| !d);
        held_out.retain(|_| keep.next().unwrap_or(true));
    }
    number
}

/// Names the shards: the documents in order with their domains, the tokenizer, and how shards are cut.
fn shards_key(
    corpus: &Corpus,
    order: &[(u32, u16)],
    tokenizer: &TextTokenizer,
    shard_bytes: u64,
) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"senmon-tokens-1").update(&shard_bytes.to_le_bytes());
    hasher.update(tokenizer.key().as_bytes());
    for &(document, domain) in order {
        hasher.update(&corpus.documents[document as usize].hash).update(&domain.to_le_bytes());
    }
    hasher.finalize()
}

fn whole_key(corpus: &Corpus, domains: &Domains, held_out: &[bool], shards: blake3::Hash) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"senmon-data-1").update(shards.as_bytes());
    for name in &domains.names {
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
    }
    for (number, document) in corpus.documents.iter().enumerate().filter(|(d, _)| held_out[*d]) {
        hasher.update(&document.hash).update(&domains.of[number].to_le_bytes());
    }
    hasher.finalize()
}

/// A tokenizer trained on a sample of the training part, spread over the domains by size; from the cache if the same sample
/// was used before.
fn trained_tokenizer(
    corpus: &Corpus,
    column: &str,
    order: &[(u32, u16)],
    vocab: usize,
    cache_dir: &Path,
    progress: &dyn Progress,
) -> Result<TextTokenizer> {
    let total: u64 = order.iter().map(|&(d, _)| corpus.documents[d as usize].bytes).sum();
    let keep = (TOKENIZER_SAMPLE as f64 / total.max(1) as f64).min(1.0);
    let count = order.iter().map(|&(_, domain)| domain as usize + 1).max().unwrap_or(0);
    let mut left = vec![0.0f64; count];
    for &(d, domain) in order {
        left[domain as usize] += keep * corpus.documents[d as usize].bytes as f64;
    }
    // (document, bytes of it used)
    let mut sample: Vec<(u32, usize)> = Vec::new();
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"senmon-bpe-1").update(&(vocab as u64).to_le_bytes());
    for &(d, domain) in order {
        let left = &mut left[domain as usize];
        let document = &corpus.documents[d as usize];
        let bytes = (document.bytes as f64).min(left.ceil()) as usize;
        if *left >= 1.0 && bytes > 0 {
            *left -= bytes as f64;
            hasher.update(&document.hash).update(&(bytes as u64).to_le_bytes());
            sample.push((d, bytes));
        }
    }
    let bytes: usize = sample.iter().map(|s| s.1).sum();
    let source = format!("byte-level BPE trained on {:.1} MB of the training part", bytes as f64 / 1e6);
    let folder = cache_dir.join("tokenizers");
    let path: PathBuf = folder.join(format!("{}.json", hasher.finalize().to_hex()));
    // A file that is cut short or otherwise not a tokenizer is made again.
    if let Ok(json) = std::fs::read_to_string(&path)
        && let Ok(tokenizer) = TextTokenizer::from_json(json, &source)
    {
        return Ok(tokenizer);
    }
    cache::folder(&folder)?;
    progress.stage("training the tokenizer", None);
    let texts: Vec<String> = sample
        .par_iter()
        .map(|&(d, bytes)| {
            if progress.cancelled() {
                return Err(DataError::Cancelled);
            }
            let mut text = TextReader::new(corpus, column).text(&corpus.documents[d as usize])?;
            let mut at = bytes.min(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            text.truncate(at);
            Ok(text)
        })
        .collect::<Result<_>>()?;
    let tokenizer = TextTokenizer::train(texts.into_iter(), vocab, &source)?;
    if progress.cancelled() {
        return Err(DataError::Cancelled);
    }
    cache::write_whole(&path, |out| out.write_all(tokenizer.json().as_bytes()))?;
    Ok(tokenizer)
}

/// What [`overlap::measure`] found, kept in the cache.
#[derive(Serialize, Deserialize)]
struct Overlap {
    overlap: Option<f64>,
    sampled: u64,
}

fn cached_overlap(
    corpus: &Corpus,
    column: &str,
    held_out: &[bool],
    cache_dir: &Path,
    progress: &dyn Progress,
) -> Result<(Option<f64>, u64)> {
    if !held_out.contains(&true) {
        return Ok((None, 0));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"senmon-overlap-1");
    for (document, held) in corpus.documents.iter().zip(held_out) {
        hasher.update(&document.hash).update(&[u8::from(*held)]);
    }
    let folder = cache_dir.join("overlap");
    let path = folder.join(format!("{}.json", hasher.finalize().to_hex()));
    if let Ok(bytes) = std::fs::read(&path)
        && let Ok(found) = serde_json::from_slice::<Overlap>(&bytes)
    {
        return Ok((found.overlap, found.sampled));
    }
    let (overlap, sampled) = overlap::measure(corpus, column, held_out, progress)?;
    cache::folder(&folder)?;
    cache::write_whole(&path, |out| Ok(serde_json::to_writer(out, &Overlap { overlap, sampled })?))?;
    Ok((overlap, sampled))
}

#[cfg(test)]
mod tests;
