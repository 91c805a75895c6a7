//! How much of the held-out text the training part holds too, measured in runs of 13 words.
//!
//! 13 words is the length by which GPT-3's authors and others since have looked for contamination. Words are what ASCII white
//! space separates. A run is its 64-bit hash; of very large held-out parts only the runs whose hash is below a bound
//! are looked for, but they are looked for in all of the training text.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::error::{DataError, Result};
use crate::hash::mix;
use crate::progress::Progress;
use crate::source::{Corpus, TextReader};

/// Words in a run.
const N: usize = 13;
/// At most about this many held-out runs are looked for.
const SAMPLE: f64 = 2_000_000.0;
/// Documents of one task: neighbours share files.
const CHUNK: usize = 32;

/// (fraction of the held-out runs that training holds, number of runs looked for).
pub(crate) fn measure(
    corpus: &Corpus,
    column: &str,
    held_out: &[bool],
    progress: &dyn Progress,
) -> Result<(Option<f64>, u64)> {
    let part = |side: bool| (0..corpus.documents.len()).filter(|&d| held_out[d] == side).collect::<Vec<_>>();
    let (held, training) = (part(true), part(false));
    let held_bytes: u64 = held.iter().map(|&d| corpus.documents[d].bytes).sum();
    // Four bytes a word at the least, in any text of this kind.
    let keep = (SAMPLE / (held_bytes as f64 / 4.0).max(1.0)).min(1.0);
    let bound = (keep * u64::MAX as f64) as u64;
    progress.stage("measuring overlap", Some(corpus.documents.len() as u64));

    let each = |documents: &[usize], run: &(dyn Fn(u64) + Sync)| -> Result<()> {
        documents.par_chunks(CHUNK).try_for_each(|chunk| {
            let mut reader = TextReader::new(corpus, column);
            for &document in chunk {
                if progress.cancelled() {
                    return Err(DataError::Cancelled);
                }
                runs(reader.text(&corpus.documents[document])?.as_bytes(), run);
            }
            progress.advance(chunk.len() as u64);
            Ok(())
        })
    };
    let wanted = std::sync::Mutex::new(Vec::new());
    each(&held, &|run| {
        if run <= bound
            && let Ok(mut wanted) = wanted.lock()
        {
            wanted.push(run);
        }
    })?;
    let mut wanted = wanted.into_inner().unwrap_or_default();
    wanted.sort_unstable();
    if wanted.is_empty() {
        return Ok((None, 0));
    }
    let mut distinct = wanted.clone();
    distinct.dedup();
    // One bit for each value of some bits of a hash: most runs of the training text end here.
    const BITS: u32 = 25;
    let mut filter = vec![0u64; 1 << (BITS - 6)];
    let slot = |run: u64| ((run >> (64 - BITS)) as usize >> 6, 1u64 << ((run >> (64 - BITS)) & 63));
    for &run in &distinct {
        let (word, bit) = slot(run);
        filter[word] |= bit;
    }
    let found: Vec<AtomicBool> = distinct.iter().map(|_| AtomicBool::new(false)).collect();
    each(&training, &|run| {
        let (word, bit) = slot(run);
        if filter[word] & bit != 0
            && let Ok(at) = distinct.binary_search(&run)
        {
            found[at].store(true, Ordering::Relaxed);
        }
    })?;
    let hits = wanted
        .iter()
        .filter(|run| distinct.binary_search(run).is_ok_and(|at| found[at].load(Ordering::Relaxed)))
        .count();
    Ok((Some(hits as f64 / wanted.len() as f64), wanted.len() as u64))
}

/// Calls `run` with the hash of every run of [`N`] words.
fn runs(text: &[u8], run: &(dyn Fn(u64) + Sync)) {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15;
    const BASE_N: u64 = {
        let (mut power, mut i) = (1u64, 0);
        while i < N {
            power = power.wrapping_mul(BASE);
            i += 1;
        }
        power
    };
    let mut ring = [0u64; N];
    let (mut hash, mut words) = (0u64, 0usize);
    for word in text.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty()) {
        let word = word
            .iter()
            .fold(0xCBF2_9CE4_8422_2325u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3));
        let word = mix(word);
        let oldest = std::mem::replace(&mut ring[words % N], word);
        hash = hash.wrapping_mul(BASE).wrapping_add(word).wrapping_sub(oldest.wrapping_mul(BASE_N));
        words += 1;
        if words >= N {
            run(mix(hash));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn all(text: &str) -> Vec<u64> {
        let out = Mutex::new(Vec::new());
        runs(text.as_bytes(), &|run| out.lock().unwrap().push(run));
        out.into_inner().unwrap()
    }

    #[test]
    fn runs_depend_on_their_words_alone() {
        let words: Vec<String> = (0..40).map(|i| format!("w{}", i % 17)).collect();
        let here = all(&words.join(" "));
        assert_eq!(here.len(), 40 - N + 1);
        let there = all(&format!("something before\n\n{}\tand after", words.join("\n  ")));
        assert!(here.iter().all(|run| there.contains(run)));
        assert_eq!(here[0], here[17], "the same words have the same hash");
        assert_ne!(here[0], here[1]);
        assert!(all("only twelve words are not a run of thirteen, a b c").is_empty());
    }
}
