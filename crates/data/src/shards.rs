//! Tokens in memory-mapped files of the cache, each made when it is first needed.
//!
//! Tokenizing everything first would spoil a short run, so a shard (about 4 MB of text) is tokenized when a batch
//! first falls into it, and the one after it by a thread in the background. What a shard holds follows from the
//! documents and the tokenizer alone, so neither the order in which shards are made nor who makes them matters.
//!
//! A shard file, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `SENMONTK` |
//! | 8..12 | format, 1 |
//! | 12..16 | bytes of a token, 2 or 4 |
//! | 16..24 | number of tokens N |
//! | 24..32 | number of ranges R |
//! | 32..64 | BLAKE3 of bytes 0..32 and all that follows byte 64 |
//! | 64.. | R ranges (u32 end, u32 domain), then N tokens |

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::cache;
use crate::error::{DataError, Result};
use crate::source::{Corpus, Document, PIECE, TextReader};
use crate::tokenizer::TextTokenizer;

const MAGIC: &[u8; 8] = b"SENMONTK";
const FORMAT: u32 = 1;
const HEADER: usize = 64;

/// Bytes of text in a shard, about.
pub(crate) const SHARD_BYTES: u64 = 4 << 20;

/// The tokens of a shard, mapped.
#[derive(Debug)]
pub(crate) struct Shard {
    map: senmon_files::Mapped,
    /// Bytes of a token, 2 or 4.
    width: usize,
    tokens: usize,
    ranges: usize,
}

impl Shard {
    /// Maps a shard file and checks every byte of it. None if it is not there, cut short or corrupt.
    fn open(path: &std::path::Path) -> Option<Shard> {
        let file = File::open(path).ok()?;
        let map = senmon_files::map(&file).ok()?;
        let number = |at: usize, n: usize| -> Option<u64> {
            let mut bytes = [0; 8];
            bytes[..n].copy_from_slice(map.get(at..at + n)?);
            Some(u64::from_le_bytes(bytes))
        };
        if map.get(..8)? != MAGIC || number(8, 4)? != u64::from(FORMAT) {
            return None;
        }
        let width = number(12, 4)? as usize;
        let (tokens, ranges) = (number(16, 8)?, number(24, 8)?);
        let length = tokens.checked_mul(width as u64)?.checked_add(ranges.checked_mul(8)?)?;
        if ![2, 4].contains(&width) || map.len().checked_sub(HEADER)? as u64 != length {
            return None;
        }
        if checksum(&map[..32], &map[HEADER..]).as_bytes() != &map[32..64] {
            return None;
        }
        Some(Shard { width, tokens: tokens as usize, ranges: ranges as usize, map })
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.tokens
    }

    /// Appends `count` tokens from `start` on. Both must lie within the shard.
    pub(crate) fn read(&self, start: usize, count: usize, out: &mut Vec<u32>) {
        let from = HEADER + 8 * self.ranges + start * self.width;
        let bytes = &self.map[from..from + count * self.width];
        if self.width == 2 {
            out.extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))));
        } else {
            out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }

    /// (end, domain) of a range of tokens.
    fn range(&self, at: usize) -> (usize, u16) {
        let b = &self.map[HEADER + 8 * at..HEADER + 8 * at + 8];
        (u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize, u16::from_le_bytes([b[4], b[5]]))
    }

    /// The domain of most of `count` tokens from `start` on; of two equal ones the smaller id.
    pub(crate) fn majority(&self, start: usize, count: usize) -> u16 {
        let (mut low, mut high) = (0, self.ranges);
        while low < high {
            let middle = (low + high) / 2;
            if self.range(middle).0 <= start { low = middle + 1 } else { high = middle }
        }
        let mut sums: Vec<(u16, usize)> = Vec::new();
        let (mut at, end) = (start, start + count);
        while at < end && low < self.ranges {
            let (range_end, domain) = self.range(low);
            let here = range_end.min(end).saturating_sub(at);
            match sums.iter_mut().find(|(d, _)| *d == domain) {
                Some((_, sum)) => *sum += here,
                None => sums.push((domain, here)),
            }
            at = range_end;
            low += 1;
        }
        sums.into_iter()
            .min_by_key(|&(domain, sum)| (usize::MAX - sum, domain))
            .map_or(0, |(domain, _)| domain)
    }
}

fn checksum(header: &[u8], payload: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(payload);
    hasher.finalize()
}

/// The training part of a corpus as shards.
#[derive(Debug)]
pub(crate) struct Shards {
    inner: Arc<Inner>,
    /// The thread that makes a shard in advance.
    ahead: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    corpus: Arc<Corpus>,
    column: String,
    tokenizer: TextTokenizer,
    /// For each shard, its documents and their domains, in order.
    documents: Vec<Vec<(u32, u16)>>,
    slots: Vec<Mutex<Option<Arc<Shard>>>>,
    lengths: Vec<OnceLock<u64>>,
    stop: AtomicBool,
}

/// A panic elsewhere leaves a slot empty or filled, both of which are right.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Shards {
    /// Lays out `order` (documents and their domains, in training order) as shards of about `shard_bytes` of text in `folder`.
    pub(crate) fn new(
        folder: PathBuf,
        corpus: Arc<Corpus>,
        column: String,
        tokenizer: TextTokenizer,
        order: &[(u32, u16)],
        shard_bytes: u64,
    ) -> Result<Self> {
        cache::folder(&folder)?;
        let bytes_of = |d: u32| corpus.documents[d as usize].bytes;
        let total: u64 = order.iter().map(|&(d, _)| bytes_of(d)).sum();
        let count = ((total as f64 / shard_bytes as f64).round() as u64).max(1);
        let mut documents: Vec<Vec<(u32, u16)>> = Vec::new();
        let (mut sum, mut last) = (0u64, None);
        for &(document, domain) in order {
            // By the document's middle, so that a long one at a border does not leave an empty shard.
            let middle = sum + bytes_of(document) / 2;
            let shard = (u128::from(middle) * u128::from(count) / u128::from(total.max(1))) as u64;
            if last != Some(shard) {
                documents.push(Vec::new());
                last = Some(shard);
            }
            if let Some(shard) = documents.last_mut() {
                shard.push((document, domain));
            }
            sum += bytes_of(document);
        }
        let slots = documents.iter().map(|_| Mutex::new(None)).collect();
        let lengths = documents.iter().map(|_| OnceLock::new()).collect();
        let stop = AtomicBool::new(false);
        let inner = Inner { folder, corpus, column, tokenizer, documents, slots, lengths, stop };
        Ok(Shards { inner: Arc::new(inner), ahead: Mutex::new(None) })
    }

    /// Number of shards.
    pub(crate) fn count(&self) -> usize {
        self.inner.documents.len()
    }

    /// A shard, from the cache or made now.
    pub(crate) fn get(&self, shard: usize) -> Result<Arc<Shard>> {
        self.inner.get(shard, true)
    }

    /// Number of tokens of a shard; makes it if it is not there.
    pub(crate) fn length(&self, shard: usize) -> Result<u64> {
        match self.inner.lengths[shard].get() {
            Some(&length) => Ok(length),
            None => Ok(self.get(shard)?.len() as u64),
        }
    }

    /// Begins to make a shard in the background, on one thread, if it has not been needed yet. A failure there shows when
    /// the shard is needed.
    pub(crate) fn prefetch(&self, shard: usize) {
        if self.inner.lengths[shard].get().is_some() {
            return;
        }
        let mut ahead = lock(&self.ahead);
        if ahead.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new().name("senmon-tokenize".to_owned());
        *ahead = thread.spawn(move || drop(inner.get(shard, false))).ok();
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = lock(&self.ahead).take() {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn get(&self, shard: usize, parallel: bool) -> Result<Arc<Shard>> {
        // Whoever comes while the shard is being made waits here.
        let mut slot = lock(&self.slots[shard]);
        if let Some(shard) = &*slot {
            return Ok(Arc::clone(shard));
        }
        let path = self.folder.join(format!("{shard:06}.tokens"));
        let opened = match Shard::open(&path) {
            Some(opened) => opened,
            None => {
                self.make(shard, &path, parallel)?;
                Shard::open(&path).ok_or_else(|| DataError::Cache {
                    action: "read",
                    path: path.clone(),
                    source: std::io::Error::other("it is not what was written"),
                })?
            }
        };
        let opened = Arc::new(opened);
        let _ = self.lengths[shard].set(opened.len() as u64);
        *slot = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn make(&self, shard: usize, path: &std::path::Path, parallel: bool) -> Result<()> {
        let encode = |&(document, _): &(u32, u16)| {
            if self.stop.load(Ordering::Relaxed) {
                return Err(DataError::Cancelled);
            }
            let mut reader = TextReader::new(&self.corpus, &self.column);
            encode(&self.corpus.documents[document as usize], &mut reader, &self.tokenizer)
        };
        let documents = &self.documents[shard];
        // The background thread stays one thread: the pool belongs to whoever trains.
        let tokens: Vec<Vec<u32>> = if parallel {
            documents.par_iter().map(encode).collect::<Result<_>>()?
        } else {
            documents.iter().map(encode).collect::<Result<_>>()?
        };
        let mut ranges: Vec<(u32, u16)> = Vec::new();
        let mut end = 0u64;
        for (tokens, &(_, domain)) in tokens.iter().zip(documents) {
            end += tokens.len() as u64;
            let end = u32::try_from(end).map_err(|_| DataError::Tokenizer {
                reason: "one document has more than 4 G tokens".to_owned(),
            })?;
            match ranges.last_mut() {
                Some((last, of)) if *of == domain => *last = end,
                _ => ranges.push((end, domain)),
            }
        }
        let width: usize = if self.tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 };
        let mut bytes = Vec::with_capacity(HEADER + ranges.len() * 8 + end as usize * width);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&(width as u32).to_le_bytes());
        bytes.extend_from_slice(&end.to_le_bytes());
        bytes.extend_from_slice(&(ranges.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 32]);
        for (end, domain) in ranges {
            bytes.extend_from_slice(&end.to_le_bytes());
            bytes.extend_from_slice(&u32::from(domain).to_le_bytes());
        }
        for token in tokens.iter().flatten() {
            bytes.extend_from_slice(&token.to_le_bytes()[..width]);
        }
        let sum = checksum(&bytes[..32], &bytes[HEADER..]);
        bytes[32..HEADER].copy_from_slice(sum.as_bytes());
        cache::write_whole(path, |out| out.write_all(&bytes))
    }
}

/// The tokens of a document and the one that ends it.
pub(crate) fn encode(
    document: &Document,
    reader: &mut TextReader<'_>,
    tokenizer: &TextTokenizer,
) -> Result<Vec<u32>> {
    let text = reader.text(document)?;
    let mut tokens = Vec::with_capacity(text.len() / 3 + 1);
    let mut rest = text.as_str();
    // Rows may be longer than pieces of plain files; a tokenizer needs about a hundred times its text in memory.
    while rest.len() > PIECE {
        let mut at = PIECE;
        while !rest.is_char_boundary(at) {
            at -= 1;
        }
        let at = rest[..at].rfind('\n').map_or(at, |newline| newline + 1);
        tokens.extend(tokenizer.encode(&rest[..at])?);
        rest = &rest[at..];
    }
    tokens.extend(tokenizer.encode(rest)?);
    tokens.extend(tokenizer.eos());
    Ok(tokens)
}
