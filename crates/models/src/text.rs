//! Text to tokens and back: a model's tokenizer, and a decoder that gives text out as soon as it is whole.

use crate::error::{ModelError, Result};
use crate::gguf;
use crate::spec::ModelSpec;
use senmon_gguf::Metadata;
use std::path::{Path, PathBuf};
use std::sync::Arc;
pub use tokenizers::Tokenizer;

/// Where a model's tokenizer is.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// The metadata of a GGUF file.
    Gguf {
        /// The file.
        path: PathBuf,
        /// Its metadata.
        metadata: Arc<Metadata>,
    },
}

impl TokenizerSource {
    /// The file that it is in.
    pub fn path(&self) -> &Path {
        match self {
            TokenizerSource::File(path) | TokenizerSource::Gguf { path, .. } => path,
        }
    }

    /// The text of the `tokenizer.json` that it is.
    pub fn json(&self) -> Result<Vec<u8>> {
        match self {
            TokenizerSource::File(path) => std::fs::read(path).map_err(ModelError::io("read", path)),
            TokenizerSource::Gguf { path, metadata } => {
                let json = gguf::tokenizer_json(path, metadata)?;
                let json = json.ok_or_else(|| {
                    let what = "has no tokenizer (tokenizer.ggml.tokens)".into();
                    ModelError::File { path: path.clone(), what }
                })?;
                Ok(json.to_string().into_bytes())
            }
        }
    }

    /// The tokenizer.
    pub fn load(&self) -> Result<Tokenizer> {
        Tokenizer::from_bytes(self.json()?).map_err(|e| {
            let why = e.to_string().lines().next().unwrap_or_default().to_owned();
            let what = match self {
                TokenizerSource::File(_) => format!("is not a tokenizer.json: {why}"),
                TokenizerSource::Gguf { .. } => format!("has a tokenizer that cannot be used: {why}"),
            };
            ModelError::File { path: self.path().into(), what }
        })
    }

    /// A `tokenizer.json` with it: its own, or one in the cache.
    pub fn file(&self) -> Result<PathBuf> {
        let TokenizerSource::Gguf { path, .. } = self else { return Ok(self.path().into()) };
        let json = self.json()?;
        let folder = senmon_files::cache_folder().ok_or_else(|| {
            let what = "its tokenizer needs a place in the cache: set XDG_CACHE_HOME or HOME".into();
            ModelError::File { path: path.clone(), what }
        })?;
        let folder = folder.join("tokenizers");
        std::fs::create_dir_all(&folder).map_err(ModelError::io("write", &folder))?;
        let file = folder.join(format!("{}.json", blake3::hash(&json).to_hex()));
        if !file.is_file() {
            crate::files::write_whole(&file, |w| w.write_all(&json))?;
        }
        Ok(file)
    }
}

/// Reads a `tokenizer.json`.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
    TokenizerSource::File(path.into()).load()
}

/// Refuses a tokenizer that has tokens beyond the model's rows.
pub fn check_vocab(tokenizer: &Tokenizer, spec: &ModelSpec, path: &Path) -> Result<()> {
    // Ids may have gaps: the greatest counts, not their number.
    let tokens = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
    if tokens <= spec.vocab {
        return Ok(());
    }
    let what = format!(
        "has token ids up to {}, the model's vocabulary {}: it is another model's tokenizer",
        tokens - 1,
        spec.vocab
    );
    Err(ModelError::File { path: path.into(), what })
}

/// The tokens of a text, without special ones around it: what a chat template wrote has them.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    encoded(tokenizer, text, false)
}

/// The tokens of a text that is to be continued: after the special ones that the tokenizer begins a text with, if it does, and without
/// those that would end it.
pub fn encode_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    // An empty text does not show what is before it and what behind.
    let [before, own, _] = around(tokenizer, if text.is_empty() { "a" } else { text })?;
    Ok(if text.is_empty() { before } else { [before, own].concat() })
}

/// The special tokens that a tokenizer puts before a text, the text's own, and those behind it.
pub(crate) fn around(tokenizer: &Tokenizer, text: &str) -> Result<[Vec<u32>; 3]> {
    let (own, whole) = (encoded(tokenizer, text, false)?, encoded(tokenizer, text, true)?);
    let at = whole.windows(own.len().max(1)).position(|window| window == own).unwrap_or(0);
    let behind = whole.get(at + own.len()..).unwrap_or_default();
    Ok([whole[..at].to_vec(), own, behind.to_vec()])
}

fn encoded(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(text, special).map_err(|e| ModelError::Option {
        what: format!("the text cannot be tokenized: {}", e.to_string().lines().next().unwrap_or_default()),
    })?;
    Ok(encoding.get_ids().to_vec())
}

/// What `now` has beyond `before`; where a decoder rewrites the end of `before` (a character that was cut, a space before a
/// full stop), what differs.
fn added<'t>(before: &str, now: &'t str) -> &'t str {
    let same = before.char_indices().zip(now.chars()).find(|((_, a), b)| a != b);
    let at = same.map_or(before.len(), |((at, _), _)| at);
    now.get(at..).unwrap_or_default()
}

/// Gives out the text of tokens as they come, never half a character, and stops at stop strings.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stops: Vec<String>,
    tokens: Vec<u32>,
    /// Tokens whose text is out, and how they begin what is decoded together.
    done: usize,
    context: usize,
    /// Decoded but held back: it may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// A stream that ends before the first of `stops`.
    pub fn new(tokenizer: &'a Tokenizer, stops: &[String]) -> Self {
        Self {
            tokenizer,
            stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(),
            tokens: Vec::new(),
            done: 0,
            context: 0,
            held: String::new(),
            stopped: false,
        }
    }

    /// The stream goes on after the tokens of a prompt, whose text is not given out: a tokenizer that drops the space at the
    /// beginning of a text (SentencePiece) keeps that of the first new token.
    pub fn after(mut self, prompt: &[u32]) -> Self {
        // Enough to see that a text has begun, and to hold a character's bytes.
        self.tokens = prompt[prompt.len().saturating_sub(8)..].to_vec();
        self.done = self.tokens.len();
        self
    }

    /// A stop string came.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    fn decode(&self, range: std::ops::Range<usize>) -> Result<String> {
        self.tokenizer.decode(&self.tokens[range], true).map_err(|e| ModelError::Option {
            what: format!("tokens cannot be decoded: {}", e.to_string().lines().next().unwrap_or_default()),
        })
    }

    /// The text that token adds, as far as it is certain.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.stopped {
            return Ok(String::new());
        }
        self.tokens.push(token);
        // The text of a token may depend on those before it (spaces at the beginning): two texts are compared.
        let before = self.decode(self.context..self.done)?;
        let now = self.decode(self.context..self.tokens.len())?;
        if now.ends_with('\u{fffd}') && self.tokens.len() - self.done < 8 {
            return Ok(String::new());
        }
        let new = added(&before, &now).to_owned();
        self.context = self.done;
        self.done = self.tokens.len();
        self.held.push_str(&new);
        Ok(self.release())
    }

    /// What is held back at the end.
    pub fn finish(&mut self) -> Result<String> {
        if self.stopped {
            return Ok(String::new());
        }
        let before = self.decode(self.context..self.done)?;
        let now = self.decode(self.context..self.tokens.len())?;
        self.held.push_str(added(&before, &now));
        let text = self.release();
        Ok(text + &std::mem::take(&mut self.held))
    }

    /// Takes out what cannot be part of a stop string any more.
    fn release(&mut self) -> String {
        // Of several stop strings that which is whole first counts, the longer of two that end together: so the result does
        // not depend on where tokens begin.
        let found = self.stops.iter().filter_map(|stop| {
            let at = self.held.find(stop.as_str())?;
            Some((at + stop.len(), at))
        });
        if let Some((_, at)) = found.min() {
            self.stopped = true;
            let text = self.held[..at].to_owned();
            self.held.clear();
            return text;
        }
        let keep = |len: &usize| {
            let end = &self.held[self.held.len() - len..];
            self.stops.iter().any(|stop| stop.starts_with(end))
        };
        let starts = self.held.char_indices().map(|(i, _)| self.held.len() - i);
        let held = starts.filter(keep).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer: the token of a byte is the byte, and 256 is a special token.
    fn bytes() -> Tokenizer {
        // The printable stand-ins of GPT-2's byte-level pre-tokenizer, by byte.
        let mut next = 256;
        let vocab: serde_json::Map<String, serde_json::Value> = (0u32..256)
            .map(|b| {
                let plain = matches!(b, 33..=126 | 161..=172 | 174..=255);
                let code = if plain { b } else { next };
                next += u32::from(!plain);
                (char::from_u32(code).unwrap().to_string(), b.into())
            })
            .collect();
        tokenizer(serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{
                "id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }],
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
            "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [],
            },
        }))
    }

    /// As Llama's: "▁" is a space, the first of a text is dropped, bytes stand as <0x..>.
    fn sentencepiece() -> Tokenizer {
        let vocab = serde_json::json!({
            "<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6, "▁": 7,
        });
        tokenizer(serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "added_tokens": [],
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ]},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": [],
            },
        }))
    }

    fn tokenizer(json: serde_json::Value) -> Tokenizer {
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    fn stream(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32], stops: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut stream = TextStream::new(tokenizer, &stops).after(prompt);
        let mut pieces: Vec<String> = tokens.iter().map(|t| stream.push(*t).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        (pieces, stream.stopped())
    }

    fn of(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn characters_come_whole() {
        let text = "aé漢🦀 z\u{fffd}!";
        let (pieces, stopped) = stream(&bytes(), &[], &of(text), &[]);
        assert_eq!(pieces.concat(), text);
        assert!(!stopped);
        // Four bytes of the crab: nothing, nothing, nothing, all.
        assert_eq!(pieces[6..10], ["", "", "", "🦀"]);
    }

    #[test]
    fn broken_bytes_do_not_stop_the_stream() {
        let mut tokens = of("ab");
        tokens.extend([0xe6, 0xbc]);
        assert_eq!(stream(&bytes(), &[], &tokens, &[]).0.concat(), "ab\u{fffd}");
        tokens.extend([0x80; 20]);
        tokens.extend(of("cd"));
        let text = stream(&bytes(), &[], &tokens, &[]).0.concat();
        assert!(text.starts_with("ab") && text.ends_with("cd"), "{text:?}");
        tokens.push(256);
        tokens.push(9999);
        assert!(stream(&bytes(), &[], &tokens, &[]).0.concat().ends_with("cd"));
    }

    #[test]
    fn stop_strings_across_tokens() {
        let tokens = of("one STOP two");
        assert_eq!(stream(&bytes(), &[], &tokens, &["STOP"]).0.concat(), "one ");
        assert!(stream(&bytes(), &[], &tokens, &["STOP"]).1);
        // What only looked like one comes out when it is clear, and at the end.
        let (pieces, stopped) = stream(&bytes(), &[], &of("STO STO"), &["STOP"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("STO STO", false));
        assert_eq!(pieces[..4], ["", "", "", "STO "]);
        assert_eq!(stream(&bytes(), &[], &tokens, &["two", "P"]).0.concat(), "one STO");
        assert_eq!(stream(&bytes(), &[], &tokens, &["OP", "STOP"]).0.concat(), "one ");
        assert_eq!(stream(&bytes(), &[], &of("x漢字y"), &["字"]).0.concat(), "x漢");
        assert_eq!(stream(&bytes(), &[], &tokens, &[""]).0.concat(), "one STOP two");
        // The first that is whole counts, whether its text comes in one token or in five.
        assert_eq!(stream(&bytes(), &[], &of("Hello"), &["Hello", "e"]).0.concat(), "H");
        assert_eq!(stream(&sentencepiece(), &[], &[1], &["Hello", "e"]).0.concat(), "H");
        // Overlapping its own beginning.
        assert_eq!(stream(&bytes(), &[], &of("aaab"), &["aab"]).0.concat(), "a");
    }

    #[test]
    fn sentencepiece_keeps_the_space_after_a_prompt() {
        let t = sentencepiece();
        assert_eq!(stream(&t, &[], &[1, 2, 3], &[]).0, ["Hello", " world", "!", ""]);
        assert_eq!(stream(&t, &[1], &[2, 3], &[]).0, [" world", "!", ""]);
        assert_eq!(stream(&t, &[1], &[7, 4, 5, 6, 2], &[]).0.concat(), " € world");
    }

    #[test]
    fn tokenizers_that_do_not_fit_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        assert!(load_tokenizer(&path).unwrap_err().to_string().contains("tokenizer.json"));
        for text in ["", "{}", "[1, 2]", "\u{1}\u{2}", "{\"model\": {\"type\": \"BPE\"}}"] {
            std::fs::write(&path, text).unwrap();
            let error = load_tokenizer(&path).unwrap_err();
            assert!(error.to_string().contains("is not a tokenizer.json"), "{error}");
            assert!(error.is_users_mistake() && !error.to_string().contains('\n'));
        }
        let mut spec = crate::spec::test_spec(0);
        spec.vocab = 257;
        assert!(check_vocab(&bytes(), &spec, &path).is_ok());
        spec.vocab = 256;
        let text = check_vocab(&bytes(), &spec, &path).unwrap_err().to_string();
        assert!(text.contains("256") && text.contains("tokenizer.json"), "{text}");
    }

    #[test]
    fn a_prompt_begins_as_the_tokenizer_begins_texts_and_does_not_end() {
        let mut t = bytes();
        assert_eq!(encode_prompt(&t, "ab").unwrap(), of("ab"));
        let around: tokenizers::PostProcessorWrapper = serde_json::from_value(serde_json::json!({
            "type": "TemplateProcessing", "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "single": [
                { "SpecialToken": { "id": "<|end|>", "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "SpecialToken": { "id": "<|end|>", "type_id": 0 } },
            ],
            "special_tokens": { "<|end|>": { "id": "<|end|>", "ids": [256], "tokens": ["<|end|>"] } },
        }))
        .unwrap();
        t.with_post_processor(Some(around));
        assert_eq!(encode_prompt(&t, "ab").unwrap(), [&[256], &of("ab")[..]].concat());
        assert_eq!(encode(&t, "ab").unwrap(), of("ab"));
        assert_eq!(encode_prompt(&t, "").unwrap(), [256]);
    }

    #[test]
    fn a_text_comes_back() {
        let tokens = encode(&bytes(), "fn main() {\n\t漢\n}").unwrap();
        assert_eq!(stream(&bytes(), &[], &tokens, &[]).0.concat(), "fn main() {\n\t漢\n}");
    }
}
