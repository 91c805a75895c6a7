//! Text to tokens and back: a byte-level BPE trained here, or any given `tokenizer.json`.
//!
//! Encoding and decoding are those of the `tokenizers` crate. What is added: which token ends a document, and how
//! many bytes of text each token stands for (for bits per byte).

use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerImpl};

use crate::config::{MAX_VOCAB, MIN_VOCAB};
use crate::error::{DataError, Result};

/// The token that ends a document, id 0, of tokenizers trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The token that fills, id 1, of tokenizers trained here. No text is ever encoded to it.
pub const PAD: &str = "<|pad|>";

/// Names by which known tokenizers call the end of a document, in order of preference.
const EOS_NAMES: [&str; 9] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "[EOS]",
    "<|im_end|>",
];

/// A tokenizer with what training and evaluation need to know of it.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// The exact text of its `tokenizer.json`.
    json: String,
    /// For people: "byte-level BPE trained on 24.0 MB" or the path.
    source: String,
    eos: Option<u32>,
    /// Bytes of text of each token, [V].
    bytes: Vec<u32>,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer")
            .field("source", &self.source)
            .field("vocab", &self.bytes.len())
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`, or the one in a given folder. The token that ends a document is taken from
    /// `tokenizer_config.json` beside it, else from well-known names.
    ///
    /// # Errors
    /// [`DataError::NoSuchFile`], [`DataError::Unreadable`], [`DataError::NotATokenizer`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let file: PathBuf = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let not = |reason: String| DataError::NotATokenizer { path: file.clone(), reason };
        let bytes = fs::read(&file).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                DataError::NoSuchFile { path: file.clone(), key: "data.tokenizer" }
            }
            _ => DataError::Unreadable { path: file.clone(), source },
        })?;
        let json = String::from_utf8(bytes).map_err(|_| not("it is not UTF-8 text".to_owned()))?;
        let named_eos = fs::read(file.with_file_name("tokenizer_config.json")).ok().and_then(|config| {
            let config: serde_json::Value = serde_json::from_slice(&config).ok()?;
            let eos = config.get("eos_token")?;
            eos.as_str().or_else(|| eos.get("content")?.as_str()).map(str::to_owned)
        });
        Self::build(json, file.display().to_string(), named_eos.as_deref()).map_err(not)
    }

    /// Reads the text of a `tokenizer.json`; `source` says for people where it is from.
    ///
    /// # Errors
    /// [`DataError::NotATokenizer`] that names `source`.
    pub fn from_json(json: String, source: &str) -> Result<Self> {
        Self::build(json, source.to_owned(), None)
            .map_err(|reason| DataError::NotATokenizer { path: source.into(), reason })
    }

    /// Trains a byte-level BPE of at most `vocab` tokens: two special tokens ([`END_OF_TEXT`], [`PAD`]), the 256 byte
    /// symbols, then merges. Fewer come out where the text gives no more merges. The same text gives the same tokenizer.
    ///
    /// # Errors
    /// [`DataError::BadValue`] for a vocabulary below 258 or above 2²⁰; [`DataError::Tokenizer`].
    pub fn train<S: AsRef<str> + Send>(
        texts: impl Iterator<Item = S> + Send,
        vocab: usize,
        source: &str,
    ) -> Result<Self> {
        if !(MIN_VOCAB..=MAX_VOCAB).contains(&vocab) {
            return Err(DataError::BadValue {
                key: "data.vocab",
                value: vocab.to_string(),
                expected: format!("must be between {MIN_VOCAB} and {MAX_VOCAB}"),
            });
        }
        let failed = |e: tokenizers::Error| DataError::Tokenizer { reason: e.to_string() };
        let special = |text: &str| AddedToken::from(text, true);
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![special(END_OF_TEXT), special(PAD)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut tokenizer: TokenizerImpl<
            BPE,
            tokenizers::NormalizerWrapper,
            ByteLevel,
            tokenizers::PostProcessorWrapper,
            ByteLevelDecoder,
        > = TokenizerImpl::new(BPE::default());
        let split = ByteLevel::new(false, false, true);
        tokenizer.with_pre_tokenizer(Some(split)).with_decoder(Some(split));
        let texts = texts.flat_map(|text| cut_long_runs(text.as_ref()));
        tokenizer.train(&mut trainer, texts).map_err(failed)?;
        let json = tokenizer.to_string(true).map_err(failed)?;
        Self::build(json, source.to_owned(), Some(END_OF_TEXT))
            .map_err(|reason| DataError::Tokenizer { reason })
    }

    fn build(json: String, source: String, named_eos: Option<&str>) -> std::result::Result<Self, String> {
        let mut inner: Tokenizer = json.parse().map_err(|e: tokenizers::Error| e.to_string())?;
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if size == 0 {
            return Err("its vocabulary is empty".to_owned());
        }
        if size > u32::MAX as usize / 2 {
            return Err(format!("its largest token id is {}", size - 1));
        }
        // A `tokenizer.json` may carry the truncation of the run that wrote it, which would cut documents.
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        // In a tokenizer trained here, text that spells a special token stays text: nothing but the end of a
        // document is its end. A given one may be meant to read chat markup, so it reads its special tokens.
        if inner.token_to_id(END_OF_TEXT) == Some(0) && inner.token_to_id(PAD) == Some(1) {
            inner.set_encode_special_tokens(true);
        }
        let eos = named_eos
            .and_then(|name| inner.token_to_id(name))
            .or_else(|| EOS_NAMES.iter().find_map(|name| inner.token_to_id(name)));
        let bytes = bytes_of_tokens(&inner, &json, size);
        Ok(TextTokenizer { inner, json, source, eos, bytes })
    }

    /// The tokenizer itself.
    pub fn inner(&self) -> &Tokenizer {
        &self.inner
    }

    /// The exact text of its `tokenizer.json`, for a run folder.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Where it is from, for people.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// V, the largest token id + 1: the rows that a model's embedding needs at least.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The token that ends a document, where the tokenizer has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// \[V\], the bytes of text that each token stands for; 0 for special tokens.
    ///
    /// Exact for byte-level tokenizers. Where a tokenizer changes the text first (lower case, Unicode normal forms, a
    /// space put before the first word) the count is that of the changed text.
    pub fn bytes_of_tokens(&self) -> &[u32] {
        &self.bytes
    }

    /// Bytes of text of one token, 0 for special tokens and ids that do not exist.
    pub fn bytes_of_token(&self, id: u32) -> u32 {
        self.bytes.get(id as usize).copied().unwrap_or(0)
    }

    /// The tokens of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], which some given tokenizers return for text outside their vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.inner.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => Err(DataError::Tokenizer { reason: e.to_string() }),
        }
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(|e| DataError::Tokenizer { reason: e.to_string() })
    }

    /// What tokens depend on, for cache keys: the JSON and the token that ends a document.
    pub(crate) fn key(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.json.as_bytes()).update(&self.eos.unwrap_or(u32::MAX).to_le_bytes());
        hasher.finalize()
    }
}

/// Bytes without a white space after which a text is cut for the training of a tokenizer: its time grows with the square
/// of the longest word, and a run of megabytes (encoded data, a script that knows no spaces) may be one word.
const LONGEST_RUN: usize = 4096;

/// The text in pieces, cut only where a run is too long.
fn cut_long_runs(text: &str) -> Vec<String> {
    let (mut pieces, mut start, mut run) = (Vec::new(), 0, 0);
    for (at, character) in text.char_indices() {
        if character.is_whitespace() {
            run = at;
        } else if at - run.max(start) >= LONGEST_RUN {
            pieces.push(text[start..at].to_owned());
            start = at;
        }
    }
    pieces.push(text[start..].to_owned());
    pieces
}

/// How the symbols of a vocabulary spell bytes.
#[derive(PartialEq)]
enum Spelling {
    /// One character stands for one byte (GPT-2's table).
    ByteLevel,
    /// `▁` stands for a space, `<0x0A>` for a byte.
    Metaspace,
    /// A word is followed by the next one at a space, `##` goes on with it.
    WordPiece,
    /// Symbols are text.
    Plain,
}

/// [V] bytes of text by token id; see [`TextTokenizer::bytes_of_tokens`].
fn bytes_of_tokens(tokenizer: &Tokenizer, json: &str, size: usize) -> Vec<u32> {
    let parsed: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
    let says = |parts: &[&str], word: &str| {
        parts.iter().any(|part| parsed.get(part).is_some_and(|v| v.to_string().contains(word)))
    };
    let spelling = if says(&["pre_tokenizer", "decoder", "normalizer"], "\"ByteLevel\"") {
        Spelling::ByteLevel
    } else if says(&["decoder"], "\"WordPiece\"") {
        Spelling::WordPiece
    } else if says(&["pre_tokenizer", "decoder", "normalizer"], "Metaspace")
        || says(&["decoder", "normalizer"], "▁")
        || says(&["decoder"], "ByteFallback")
    {
        Spelling::Metaspace
    } else {
        Spelling::Plain
    };
    let alphabet = ByteLevel::alphabet();
    let added = tokenizer.get_added_tokens_decoder();
    let count = |symbol: &str| -> usize {
        match spelling {
            Spelling::ByteLevel => {
                symbol.chars().map(|c| if alphabet.contains(&c) { 1 } else { c.len_utf8() }).sum()
            }
            Spelling::Metaspace if is_byte(symbol) => 1,
            Spelling::Metaspace => symbol.chars().map(|c| if c == '▁' { 1 } else { c.len_utf8() }).sum(),
            // The space before a word belongs to no symbol: it is counted with the word that it precedes.
            Spelling::WordPiece => symbol.strip_prefix("##").map_or(symbol.len() + 1, str::len),
            Spelling::Plain => symbol.len(),
        }
    };
    (0..size as u32)
        .map(|id| match added.get(&id) {
            Some(token) if token.special => 0,
            Some(token) => token.content.len() as u32,
            None => tokenizer.id_to_token(id).map_or(0, |symbol| count(&symbol) as u32),
        })
        .collect()
}

/// `<0x00>` … `<0xFF>`, the symbols of single bytes in SentencePiece vocabularies.
fn is_byte(symbol: &str) -> bool {
    symbol
        .strip_prefix("<0x")
        .and_then(|s| s.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fn main() { println!(\"hello, wörld 门\"); } // hello hello main main\n";

    fn trained(vocab: usize) -> TextTokenizer {
        TextTokenizer::train(std::iter::repeat_n(TEXT, 20), vocab, "test").unwrap()
    }

    #[test]
    fn a_trained_tokenizer_knows_every_byte_and_comes_back_exactly() {
        let tokenizer = trained(320);
        assert!(tokenizer.vocab_size() <= 320 && tokenizer.vocab_size() > 258);
        assert_eq!(tokenizer.inner().token_to_id(END_OF_TEXT), Some(0));
        assert_eq!(tokenizer.inner().token_to_id(PAD), Some(1));
        assert_eq!(tokenizer.eos(), Some(0));
        for text in
            [TEXT, "", "\u{0}\u{7f}\r\n\t", "日本語 🦀 Ωμέγα", "a<|endoftext|>b<|pad|>", "   x  \n\n y"]
        {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
            let bytes: u32 = tokens.iter().map(|&t| tokenizer.bytes_of_token(t)).sum();
            assert_eq!(bytes as usize, text.len(), "{text:?}");
            assert!(tokens.iter().all(|&t| t > 1), "text is never a special token: {text:?}");
        }
    }

    #[test]
    fn training_is_deterministic_and_the_json_is_all_of_it() {
        let (a, b) = (trained(300), trained(300));
        assert_eq!(a.json(), b.json());
        let again = TextTokenizer::from_json(a.json().to_owned(), "json").unwrap();
        assert_eq!(again.encode(TEXT).unwrap(), a.encode(TEXT).unwrap());
        assert_eq!(again.bytes_of_tokens(), a.bytes_of_tokens());
        assert_eq!((again.eos(), again.key()), (a.eos(), a.key()));
    }

    #[test]
    fn long_runs_are_cut_and_nothing_else_is() {
        let lines = "some words\n".repeat(2000);
        assert_eq!(cut_long_runs(&lines), [lines.as_str()]);
        let run = format!("before {} after", "門".repeat(5000));
        let pieces = cut_long_runs(&run);
        assert_eq!(pieces.concat(), run);
        assert!(pieces.len() > 3 && pieces.iter().all(|piece| piece.len() <= LONGEST_RUN + 10));
        // A run of megabytes is trained on in a moment.
        TextTokenizer::train(std::iter::once("門".repeat(500_000)), 300, "test").unwrap();
    }

    #[test]
    fn what_is_not_a_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokenizer.json");
        for content in [&b"{}"[..], b"not json", b"\xff\xfe", b"{\"model\": 3}"] {
            fs::write(&file, content).unwrap();
            let error = TextTokenizer::from_file(&file).unwrap_err();
            assert!(matches!(error, DataError::NotATokenizer { .. }), "{error}");
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
        }
        let error = TextTokenizer::from_file(&dir.path().join("none.json")).unwrap_err();
        assert!(matches!(error, DataError::NoSuchFile { .. }), "{error}");
    }

    #[test]
    fn a_given_tokenizer_brings_its_end_token_and_loses_its_truncation() {
        let dir = tempfile::tempdir().unwrap();
        let mut value: serde_json::Value = serde_json::from_str(trained(300).json()).unwrap();
        value["truncation"] = serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        fs::write(dir.path().join("tokenizer.json"), value.to_string()).unwrap();
        fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": {"content": "<|pad|>"}}"#)
            .unwrap();
        let tokenizer = TextTokenizer::from_file(dir.path()).unwrap();
        assert_eq!(tokenizer.eos(), Some(1));
        assert!(tokenizer.encode(TEXT).unwrap().len() > 3);
    }

    #[test]
    fn bytes_are_counted_in_sentencepiece_vocabularies() {
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
            "added_tokens": [{"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}, {"id": 1, "content": "</s>", "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                "vocab": {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁": 4, "a": 5, "▁a": 6},
                "merges": [["▁", "a"]]}
        });
        let tokenizer = TextTokenizer::from_json(json.to_string(), "test").unwrap();
        assert_eq!(tokenizer.bytes_of_tokens(), [0, 0, 1, 1, 1, 1, 2]);
        assert_eq!(tokenizer.eos(), Some(1));
        let tokens = tokenizer.encode("é a a").unwrap();
        assert_eq!(tokens.iter().map(|&t| tokenizer.bytes_of_token(t)).sum::<u32>(), 6);
    }
}
