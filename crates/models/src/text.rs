//! Text to tokens and back: a model's tokenizer, and a decoder that gives text out as soon as it is whole.

use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;
use std::path::Path;
pub use tokenizers::Tokenizer;

/// Reads a `tokenizer.json`.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(path).map_err(ModelError::io("read", path))?;
    Tokenizer::from_bytes(&bytes).map_err(|e| {
        let what = format!("is not a tokenizer.json: {}", e.to_string().lines().next().unwrap_or_default());
        ModelError::File { path: path.into(), what }
    })
}

/// Refuses a tokenizer with more tokens than the model has rows.
pub fn check_vocab(tokenizer: &Tokenizer, spec: &ModelSpec, path: &Path) -> Result<()> {
    let tokens = tokenizer.get_vocab_size(true);
    if tokens <= spec.vocab {
        return Ok(());
    }
    let what = format!(
        "has {tokens} tokens, the model's vocabulary {}: it is another model's tokenizer",
        spec.vocab
    );
    Err(ModelError::File { path: path.into(), what })
}

/// The tokens of a text, without special ones added around it.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(text, false).map_err(|e| ModelError::Option {
        what: format!("the text cannot be tokenized: {}", e.to_string().lines().next().unwrap_or_default()),
    })?;
    Ok(encoding.get_ids().to_vec())
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
        let new = now.get(before.len()..).unwrap_or_default().to_owned();
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
        self.held.push_str(now.get(before.len()..).unwrap_or_default());
        let text = self.release();
        Ok(text + &std::mem::take(&mut self.held))
    }

    /// Takes out what cannot be part of a stop string any more.
    fn release(&mut self) -> String {
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
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
