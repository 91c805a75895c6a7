//! Windows for evaluation, each from one domain, in equal numbers by domain as far as there are.

use std::path::PathBuf;

use rayon::prelude::*;

use crate::config::DomainRule;
use crate::domains;
use crate::error::{DataError, Result};
use crate::progress::Progress;
use crate::report::{DomainReport, Report};
use crate::shards::encode;
use crate::source::{self, Columns, Corpus, TextReader};
use crate::tokenizer::TextTokenizer;

/// One window of evaluation text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalSequence {
    /// [S + 1]: inputs are the first S, targets the last S.
    pub tokens: Vec<u32>,
    /// The domain of all of them.
    pub domain: u16,
    /// The document that most of them are from, as a number: windows of one document are no independent samples of text.
    pub document: u32,
}

/// Everything under some paths, as windows for evaluation by a model that exists.
#[derive(Clone, Debug)]
pub struct EvalSet {
    /// The windows, domain after domain.
    pub sequences: Vec<EvalSequence>,
    /// Domain names, largest first; the position is the id.
    pub domains: Vec<String>,
    /// What was found. All bytes count as held out; there is no split and no overlap.
    pub report: Report,
}

impl EvalSet {
    /// Reads all text under `paths`, without any split, and cuts windows of S + 1 tokens (S = `sequence`), at most
    /// `max_tokens_total` targets in total. Exact duplicates count once. Domains with less than one window are left out.
    ///
    /// # Errors
    /// Those of [`crate::Dataset::open`] about paths and rule files; [`DataError::TooSmall`] if no domain has a window.
    pub fn from_paths(
        paths: &[PathBuf],
        domain_rule: &DomainRule,
        column: &str,
        tokenizer: &TextTokenizer,
        sequence: usize,
        max_tokens_total: Option<usize>,
        progress: &dyn Progress,
    ) -> Result<EvalSet> {
        let spool = tempfile::tempdir().map_err(|source| DataError::Cache {
            action: "create",
            path: std::env::temp_dir(),
            source,
        })?;
        let domain_column = match domain_rule {
            DomainRule::Column(name) => Some(name.as_str()),
            _ => None,
        };
        let columns = Columns { text: column, domain: domain_column, group: None };
        let mut corpus = source::scan(paths, columns, spool.path(), progress)?;
        let (duplicates, duplicate_bytes) = source::remove_duplicates(&mut corpus);
        let domains = domains::assign(&corpus, domain_rule)?;
        let mut report = Report {
            files_read: corpus.files.len() as u64,
            files_skipped: corpus.files_skipped.clone(),
            rows_skipped: corpus.rows_skipped.clone(),
            documents: corpus.documents.len() as u64,
            bytes: corpus.documents.iter().map(|d| d.bytes).sum(),
            duplicates,
            duplicate_bytes,
            domains: domains
                .names
                .iter()
                .map(|n| DomainReport { name: n.clone(), ..Default::default() })
                .collect(),
            domains_joined: domains.joined,
            split_rule: "no split: everything is evaluated".to_owned(),
            vocab: tokenizer.vocab_size() as u64,
            tokenizer: tokenizer.source().to_owned(),
            ..Report::default()
        };
        report.held_out_bytes = report.bytes;
        let mut by_domain: Vec<Vec<u32>> = vec![Vec::new(); domains.names.len()];
        for (number, (document, &domain)) in corpus.documents.iter().zip(&domains.of).enumerate() {
            report.domains[domain as usize].held_out_bytes += document.bytes;
            by_domain[domain as usize].push(number as u32);
        }
        let what = "the text";
        let sequences =
            windows(&corpus, column, tokenizer, by_domain, sequence, max_tokens_total, what, progress)?;
        Ok(EvalSet { sequences, domains: domains.names, report })
    }
}

/// The documents of one domain as a stream of tokens, made as far as it is asked for.
struct Stream {
    /// In an order that mixes files, the next one last.
    documents: Vec<u32>,
    tokens: Vec<u32>,
    /// Where documents begin among the tokens, and which they are.
    starts: Vec<(usize, u32)>,
    /// Windows granted so far.
    windows: usize,
}

impl Stream {
    /// The document that most tokens of a window are from.
    fn document(&self, window: std::ops::Range<usize>) -> u32 {
        let first = self.starts.partition_point(|(start, _)| *start <= window.start).saturating_sub(1);
        let starts = &self.starts[first..];
        let within = |at: usize| {
            let end = starts.get(at + 1).map_or(window.end, |(next, _)| (*next).min(window.end));
            end.saturating_sub(starts[at].0.max(window.start))
        };
        let inside = (0..starts.len()).take_while(|at| starts[*at].0 < window.end);
        // Of documents with as many tokens the first.
        let most = inside.max_by_key(|at| (within(*at), std::cmp::Reverse(*at)));
        most.map_or(0, |at| starts[at].1)
    }
}

/// Cuts windows of S + 1 tokens from each domain's documents: in turn from every domain, until `max_tokens` targets or all
/// of the text are reached. `by_domain` holds documents by domain; `what` names the part in errors.
pub(crate) fn windows(
    corpus: &Corpus,
    column: &str,
    tokenizer: &TextTokenizer,
    by_domain: Vec<Vec<u32>>,
    sequence: usize,
    max_tokens: Option<usize>,
    what: &str,
    progress: &dyn Progress,
) -> Result<Vec<EvalSequence>> {
    if sequence == 0 {
        return Err(DataError::BadValue {
            key: "train.sequence",
            value: "0".to_owned(),
            expected: "must be at least 1".to_owned(),
        });
    }
    let mut streams: Vec<Stream> = by_domain
        .into_iter()
        .map(|mut documents| {
            documents.sort_by_key(|&d| std::cmp::Reverse((corpus.documents[d as usize].hash, d)));
            Stream { documents, tokens: Vec::new(), starts: Vec::new(), windows: 0 }
        })
        .collect();
    progress.stage("tokenizing text to evaluate", None);
    // A cap below one window for every domain would leave some domain out, so it is raised to that.
    let mut left = max_tokens.map_or(usize::MAX, |max| (max / sequence).max(streams.len()));
    let mut open: Vec<usize> = (0..streams.len()).collect();
    while left > 0 && !open.is_empty() {
        let share = (left / open.len()).max(1);
        let mut still = Vec::new();
        for domain in open {
            let stream = &mut streams[domain];
            let grant = share.min(left);
            let wanted = stream.windows.saturating_add(grant);
            fill(
                stream,
                wanted.saturating_mul(sequence).saturating_add(1),
                corpus,
                column,
                tokenizer,
                progress,
            )?;
            let available = stream.tokens.len().saturating_sub(1) / sequence;
            let reached = available.min(wanted);
            left -= reached - stream.windows;
            stream.windows = reached;
            if reached == wanted && left > 0 {
                still.push(domain);
            }
        }
        open = still;
    }
    let sequences: Vec<EvalSequence> = streams
        .iter()
        .enumerate()
        .flat_map(|(domain, stream)| {
            (0..stream.windows).map(move |w| EvalSequence {
                tokens: stream.tokens[w * sequence..(w + 1) * sequence + 1].to_vec(),
                domain: domain as u16,
                document: stream.document(w * sequence..(w + 1) * sequence),
            })
        })
        .collect();
    if sequences.is_empty() {
        let most = streams.iter().map(|s| s.tokens.len()).max().unwrap_or(0) as u64;
        let what = format!("no domain of {what} is long enough: the longest");
        return Err(DataError::TooSmall {
            what,
            tokens: most,
            sequence,
            needed: (sequence as u64).saturating_add(1),
        });
    }
    Ok(sequences)
}

/// Tokenizes documents until a stream has `wanted` tokens or no document is left.
fn fill(
    stream: &mut Stream,
    wanted: usize,
    corpus: &Corpus,
    column: &str,
    tokenizer: &TextTokenizer,
    progress: &dyn Progress,
) -> Result<()> {
    while stream.tokens.len() < wanted && !stream.documents.is_empty() {
        if progress.cancelled() {
            return Err(DataError::Cancelled);
        }
        // As many documents at once as are likely to be needed, by two bytes a token at the least.
        let missing = wanted.saturating_sub(stream.tokens.len()).saturating_mul(2).min(16 << 20) as u64;
        let (mut bytes, mut count) = (0, 0);
        for &d in stream.documents.iter().rev() {
            bytes += corpus.documents[d as usize].bytes;
            count += 1;
            if bytes >= missing {
                break;
            }
        }
        let next = stream.documents.split_off(stream.documents.len() - count);
        let tokens: Vec<Vec<u32>> = next
            .par_iter()
            .rev()
            .map(|&d| {
                let document = &corpus.documents[d as usize];
                let tokens = encode(document, &mut TextReader::new(corpus, column), tokenizer)?;
                progress.advance(document.bytes);
                Ok(tokens)
            })
            .collect::<Result<_>>()?;
        for (tokens, document) in tokens.into_iter().zip(next.iter().rev()) {
            stream.starts.push((stream.tokens.len(), *document));
            stream.tokens.extend(tokens);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_of_the_document_with_most_of_its_tokens() {
        let starts = vec![(0, 7), (10, 3), (12, 4), (12, 9), (20, 5)];
        let stream = Stream { documents: Vec::new(), tokens: vec![0; 30], starts, windows: 0 };
        for (window, document) in [(0..8, 7), (8..16, 4), (16..24, 9), (5..11, 7), (9..13, 3), (20..30, 5)] {
            // Documents without a token, as the one that begins where the next does, have no window.
            let expected = if document == 4 { 9 } else { document };
            assert_eq!(stream.document(window.clone()), expected, "{window:?}");
        }
    }
}
