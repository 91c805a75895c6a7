//! The tokenizer of a GGUF file as a `tokenizer.json`: byte-level BPE ("gpt2") and the BPE of SentencePiece ("llama").

use super::metadata::of_file;
use super::pre;
use crate::error::{ModelError, Result};
use senmon_gguf::{FromValue, Metadata};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Kinds of tokens (`tokenizer.ggml.token_type`).
pub(super) mod kinds {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// Longest token of SentencePiece that is taken apart, in bytes: its own longest are 16 characters, or a run of spaces.
const MAX_PIECE: usize = 512;
/// Greatest number of pairs that may be joined.
const MAX_MERGES: usize = 1 << 24;

/// The space of SentencePiece.
pub(super) const SPACE: &str = "▁";

struct Vocabulary<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    tokens: &'a [String],
    kinds: Vec<i32>,
}

/// The `tokenizer.json` of a model; `None` where the file has no tokens.
pub(crate) fn json(path: &Path, metadata: &Metadata) -> Result<Option<Value>> {
    let find = |e| of_file(path, e);
    if metadata.get("tokenizer.ggml.tokens").is_none() {
        return Ok(None);
    }
    let model: &str = metadata.require("tokenizer.ggml.model").map_err(find)?;
    let tokens: &[String] = metadata.require("tokenizer.ggml.tokens").map_err(find)?;
    let kinds: Option<Vec<i32>> = metadata.find("tokenizer.ggml.token_type").map_err(find)?;
    let kinds = kinds.unwrap_or_else(|| vec![kinds::NORMAL; tokens.len()]);
    let vocabulary = Vocabulary { path, metadata, tokens, kinds };
    vocabulary.same_length("token_type", vocabulary.kinds.len())?;
    match model {
        "gpt2" => vocabulary.byte_level(),
        "llama" => vocabulary.sentence_piece(),
        other => Err(vocabulary.error(format!(
            "key tokenizer.ggml.model: \"{other}\" is not supported; gpt2 (byte-level BPE) and llama (SentencePiece) are"
        ))),
    }
    .map(Some)
}

impl<'a> Vocabulary<'a> {
    fn error(&self, what: String) -> ModelError {
        ModelError::File { path: self.path.into(), what }
    }

    fn find<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        self.metadata.find(&format!("tokenizer.ggml.{key}")).map_err(|e| of_file(self.path, e))
    }

    fn same_length(&self, key: &str, found: usize) -> Result<()> {
        match found == self.tokens.len() {
            true => Ok(()),
            false => Err(self.error(format!(
                "key tokenizer.ggml.{key}: has {found} entries, and tokenizer.ggml.tokens {}",
                self.tokens.len()
            ))),
        }
    }

    /// Ids by token; of two tokens that are the same, the first.
    fn ids(&self) -> HashMap<&'a str, u32> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(token.as_str()).or_insert(id as u32);
        }
        ids
    }

    /// Tokens that are taken out of a text before it is cut.
    fn added(&self) -> Vec<Value> {
        let each = self.tokens.iter().zip(&self.kinds).enumerate();
        let added = each.filter_map(|(id, (token, kind))| {
            let special = match *kind {
                kinds::CONTROL | kinds::UNKNOWN => true,
                kinds::USER_DEFINED => false,
                _ => return None,
            };
            (!token.is_empty()).then(|| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special,
                })
            })
        });
        added.collect()
    }

    /// What is put around a text.
    fn post_processor(&self, begins: bool) -> Result<Value> {
        let mut around = Vec::new();
        for (key, token, default) in
            [("add_bos_token", "bos_token_id", begins), ("add_eos_token", "eos_token_id", false)]
        {
            let id = self.find::<u32>(token)?.filter(|id| (*id as usize) < self.tokens.len());
            around.push(id.filter(|_| self.find(key).ok().flatten().unwrap_or(default)));
        }
        if around.iter().all(Option::is_none) {
            return Ok(Value::Null);
        }
        let name = |id: u32| &self.tokens[id as usize];
        let special = |id: u32| json!({ "SpecialToken": { "id": name(id), "type_id": 0 } });
        let with = |sequences: &[&str]| -> Vec<Value> {
            let text = sequences.iter().map(|id| json!({ "Sequence": { "id": id, "type_id": 0 } }));
            around[0].map(special).into_iter().chain(text).chain(around[1].map(special)).collect()
        };
        let tokens: Map<String, Value> = around
            .iter()
            .flatten()
            .map(|id| (name(*id).clone(), json!({ "id": name(*id), "ids": [id], "tokens": [name(*id)] })))
            .collect();
        Ok(json!({
            "type": "TemplateProcessing", "single": with(&["A"]), "pair": with(&["A", "B"]), "special_tokens": tokens,
        }))
    }

    /// A `tokenizer.json` around a model of the kind BPE.
    fn whole(&self, parts: Value, model: Value, begins: bool) -> Result<Value> {
        let mut json = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added(),
            "post_processor": self.post_processor(begins)?,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            },
        });
        if let (Some(into), Value::Object(from)) = (json["model"].as_object_mut(), model) {
            into.extend(from);
        }
        if let (Some(into), Value::Object(from)) = (json.as_object_mut(), parts) {
            into.extend(from);
        }
        Ok(json)
    }

    fn vocab(&self) -> Value {
        Value::Object(self.ids().into_iter().map(|(token, id)| (token.to_owned(), id.into())).collect())
    }

    fn byte_level(&self) -> Result<Value> {
        let name: &str = self.find("pre")?.unwrap_or("gpt-2");
        let pre = pre::named(name).ok_or_else(|| {
            let known = pre::known();
            self.error(format!("key tokenizer.ggml.pre: \"{name}\" is not known; {known} are"))
        })?;
        let merges: &[String] = self.find("merges")?.ok_or_else(|| {
            self.error("key tokenizer.ggml.merges: is missing, and the tokenizer is of the kind gpt2".into())
        })?;
        let ids = self.ids();
        let mut pairs = Vec::with_capacity(merges.len());
        for (number, merge) in merges.iter().enumerate() {
            // The space that parts them is not the first byte: a token of one space is written otherwise.
            let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let pair = cut.map(|at| (&merge[..at], &merge[at + 1..]));
            let known = |(a, b): &(&str, &str)| {
                ids.contains_key(a) && ids.contains_key(b) && ids.contains_key(format!("{a}{b}").as_str())
            };
            let (a, b) = pair.filter(known).ok_or_else(|| {
                self.error(format!(
                    "key tokenizer.ggml.merges: entry {number} does not join two tokens to one that there is"
                ))
            })?;
            pairs.push(json!([a, b]));
        }
        let model = json!({ "vocab": self.vocab(), "merges": pairs, "ignore_merges": pre.ignore_merges });
        let parts = json!({
            "normalizer": pre.normalizer(),
            "pre_tokenizer": pre.json(),
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        });
        self.whole(parts, model, pre.begins)
    }

    fn sentence_piece(&self) -> Result<Value> {
        let scores: &[f32] = self.find("scores")?.ok_or_else(|| {
            self.error("key tokenizer.ggml.scores: is missing, and the tokenizer is of the kind llama".into())
        })?;
        self.same_length("scores", scores.len())?;
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(self.error(format!("key tokenizer.ggml.scores: entry {id} is not a number")));
        }
        let ids = self.ids();
        // Two tokens are joined where their text together is a token; of several pairs, that whose token has the best score.
        let whole = |token: &str| {
            let id = *ids.get(token)?;
            let plain = matches!(self.kinds[id as usize], kinds::NORMAL | kinds::USER_DEFINED);
            plain.then_some(id)
        };
        let mut merges: Vec<(f32, u32, u32, u32)> = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if self.kinds[id] != kinds::NORMAL || ids.get(token.as_str()) != Some(&(id as u32)) {
                continue;
            }
            if token.len() > MAX_PIECE || merges.len() > MAX_MERGES {
                return Err(self.error(format!(
                    "key tokenizer.ggml.tokens: entry {id} has {} bytes, and {} pairs make the tokens before it: no \
                     vocabulary of SentencePiece",
                    token.len(),
                    merges.len()
                )));
            }
            for (at, _) in token.char_indices().skip(1) {
                if let (Some(a), Some(b)) = (whole(&token[..at]), whole(&token[at..])) {
                    merges.push((scores[id], id as u32, a, b));
                }
            }
        }
        merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2, x.3).cmp(&(y.1, y.2, y.3))));
        let pairs: Vec<Value> = merges
            .iter()
            .map(|(.., a, b)| json!([self.tokens[*a as usize], self.tokens[*b as usize]]))
            .collect();
        let unknown = self.find::<u32>("unknown_token_id")?.map(|id| id as usize);
        let unknown = unknown.or_else(|| self.kinds.iter().position(|kind| *kind == kinds::UNKNOWN));
        let unknown = unknown.and_then(|id| self.tokens.get(id));
        let prefix = self.find("add_space_prefix")?.unwrap_or(true);
        let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        let mut normalizers = vec![json!({ "type": "Prepend", "prepend": SPACE }), replace];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
            strip,
        ];
        if !prefix {
            normalizers.remove(0);
            decoders.pop();
        }
        let model = json!({
            "vocab": self.vocab(), "merges": pairs, "unk_token": unknown, "fuse_unk": true,
            "byte_fallback": self.kinds.contains(&kinds::BYTE),
        });
        let parts = json!({
            "normalizer": { "type": "Sequence", "normalizers": normalizers },
            "pre_tokenizer": null,
            "decoder": { "type": "Sequence", "decoders": decoders },
        });
        self.whole(parts, model, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tokenizer_keys;
    use crate::text::Tokenizer;
    use senmon_gguf::{Gguf, Writer};

    fn golden(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/tokenizers").join(name)
    }

    fn metadata(name: &str) -> Metadata {
        let bytes = std::fs::read(golden(&format!("{name}.gguf"))).unwrap();
        Gguf::read(&bytes).unwrap().into_parts().0
    }

    /// What was written with keys, read again.
    fn of_keys(keys: Vec<(String, senmon_gguf::Value)>) -> Metadata {
        let mut writer = Writer::new();
        for (key, value) in keys {
            writer.set(&key, value).unwrap();
        }
        writer.metadata().clone()
    }

    fn check(metadata: &Metadata, name: &str) -> Value {
        let json = json(Path::new("m.gguf"), metadata).unwrap().unwrap();
        let tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        let cases: Vec<Value> =
            serde_json::from_slice(&std::fs::read(golden(&format!("{name}.json"))).unwrap()).unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> =
                case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokenizer.encode(text, true).unwrap().get_ids(), ids, "{name}: {text:?}");
            if !text.contains("<|") {
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{name}");
            }
        }
        json
    }

    #[test]
    fn ids_are_those_of_the_libraries_and_of_llama_cpp_there_and_back() {
        for name in ["spm", "bytes"] {
            let metadata = metadata(name);
            let json = check(&metadata, name);
            let tokens: &[String] = metadata.require("tokenizer.ggml.tokens").unwrap();
            let keys = tokenizer_keys(Path::new("tokenizer.json"), &json, tokens.len() + 2).unwrap();
            let back = of_keys(keys);
            // Two more rows than tokens: they are filled.
            let written: &[String] = back.require("tokenizer.ggml.tokens").unwrap();
            assert!(written[..tokens.len()] == *tokens && written[tokens.len()].starts_with("[PAD"));
            for key in ["model", "pre", "token_type", "add_bos_token", "bos_token_id", "merges"] {
                let key = format!("tokenizer.ggml.{key}");
                let cut = |metadata: &Metadata| match metadata.get(&key) {
                    Some(senmon_gguf::Value::Array(senmon_gguf::Array::I32(kinds))) => {
                        format!("{:?}", &kinds[..tokens.len()])
                    }
                    other => format!("{other:?}"),
                };
                assert_eq!(cut(&back), cut(&metadata), "{name} {key}");
            }
            check(&back, name);
        }
    }

    #[test]
    fn what_is_wrong_with_a_tokenizer_is_named() {
        use senmon_gguf::Value as Key;
        let plain = || -> Vec<(String, Key)> {
            let key = |name: &str| format!("tokenizer.ggml.{name}");
            vec![
                (key("model"), "gpt2".into()),
                (key("pre"), "gpt-2".into()),
                (key("tokens"), vec!["a".to_owned(), "b".into(), "ab".into()].into()),
                (key("merges"), vec!["a b".to_owned()].into()),
            ]
        };
        let failing = |change: &dyn Fn(&mut Vec<(String, Key)>)| {
            let mut keys = plain();
            change(&mut keys);
            let error = json(Path::new("m.gguf"), &of_keys(keys)).unwrap_err();
            assert!(error.is_users_mistake());
            error.to_string()
        };
        assert!(json(Path::new("m.gguf"), &of_keys(plain())).unwrap().is_some());
        let text = failing(&|keys| keys[0].1 = "bert".into());
        assert!(
            text.contains("m.gguf") && text.contains("tokenizer.ggml.model") && text.contains("bert"),
            "{text}"
        );
        let text = failing(&|keys| keys[1].1 = "quen2".into());
        assert!(text.contains("quen2") && text.contains("qwen2"), "{text}");
        let text = failing(&|keys| keys[3].1 = vec!["a c".to_owned()].into());
        assert!(text.contains("merges") && text.contains("entry 0"), "{text}");
        let text = failing(&|keys| {
            keys.pop();
        });
        assert!(text.contains("merges: is missing"), "{text}");
        let text = failing(&|keys| keys[0].1 = "llama".into());
        assert!(text.contains("scores: is missing"), "{text}");
        let text = failing(&|keys| keys.push(("tokenizer.ggml.token_type".into(), vec![1i32].into())));
        assert!(text.contains("token_type") && text.contains("1 entries"), "{text}");
        // Ids that are no tokens are not put around a text.
        let mut keys = plain();
        keys.push(("tokenizer.ggml.bos_token_id".into(), Key::U32(99)));
        keys.push(("tokenizer.ggml.add_bos_token".into(), Key::Bool(true)));
        assert!(json(Path::new("m.gguf"), &of_keys(keys)).unwrap().unwrap()["post_processor"].is_null());
    }
}
