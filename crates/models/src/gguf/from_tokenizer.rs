//! From a `tokenizer.json` to the keys of a GGUF file.

use super::pre;
use super::tokenizer::{SPACE, kinds};
use crate::error::{ModelError, Result};
use crate::text::{self, Tokenizer};
use senmon_gguf::Value as Key;
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

/// The keys of a tokenizer, for a model of `vocab` tokens; `path` is where it is from.
pub(crate) fn keys(path: &Path, json: &Value, vocab: usize) -> Result<Vec<(String, Key)>> {
    let error = |what: String| ModelError::File { path: path.into(), what };
    let model = &json["model"];
    let of_kind = model["type"].as_str().unwrap_or("BPE");
    let (Some(ids), true) = (model["vocab"].as_object(), of_kind == "BPE") else {
        return Err(error(format!("is a tokenizer of the kind {of_kind}; BPE can be written to GGUF")));
    };
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; vocab];
    let mut put = |id: &Value, token: &str, kind: i32| match id
        .as_u64()
        .and_then(|id| tokens.get_mut(id as usize))
    {
        Some(place) => {
            *place = Some((token.to_owned(), kind));
            Ok(())
        }
        None => Err(error(format!("has token \"{token}\" with id {id}, the model's vocabulary is {vocab}"))),
    };
    let unknown = model["unk_token"].as_str();
    let bytes = model["byte_fallback"].as_bool().unwrap_or(false);
    for (token, id) in ids {
        let kind = match () {
            () if bytes && is_byte(token) => kinds::BYTE,
            () if unknown == Some(token) => kinds::UNKNOWN,
            () => kinds::NORMAL,
        };
        put(id, token, kind)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let token = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"].as_bool() {
            _ if unknown == Some(token) => kinds::UNKNOWN,
            Some(true) => kinds::CONTROL,
            _ => kinds::USER_DEFINED,
        };
        put(&added["id"], token, kind)?;
    }
    let (texts, kind_list): (Vec<String>, Vec<i32>) = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), kinds::UNUSED)))
        .unzip();
    let mut keys: Vec<(String, Key)> = Vec::new();
    let mut set = |key: &str, value: Key| keys.push((format!("tokenizer.ggml.{key}"), value));
    let merges = merges(model).ok_or_else(|| error("has merges that are not pairs of tokens".into()))?;
    let byte_level = json["pre_tokenizer"].to_string().contains("\"ByteLevel\"");
    if byte_level {
        let pre = pre::of_json(json).ok_or_else(|| {
            error(format!("cuts text in a way that GGUF has no name for; those of {} have one", pre::known()))
        })?;
        set("model", "gpt2".into());
        set("pre", pre.names[0].into());
        set("merges", merges.iter().map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>().into());
    } else if let Some(prefix) = sentence_piece(json) {
        set("model", "llama".into());
        set("pre", "default".into());
        set("scores", scores(&texts, &kind_list, &merges).into());
        set("add_space_prefix", Key::Bool(prefix));
    } else {
        return Err(error(
            "is neither a byte-level BPE nor one of SentencePiece, which GGUF has words for".into(),
        ));
    }
    if let Some(id) = unknown.and_then(|token| texts.iter().position(|text| text == token)) {
        set("unknown_token_id", Key::U32(id as u32));
    }
    set("tokens", texts.into());
    set("token_type", kind_list.into());
    let (begin, end) = around(path, json)?;
    set("add_bos_token", Key::Bool(begin.is_some()));
    set("add_eos_token", Key::Bool(end.is_some()));
    // What a text begins with goes before what the configuration calls so.
    for (key, id) in [("bos_token_id", begin), ("eos_token_id", end)] {
        if let Some(id) = id {
            set(key, Key::U32(id));
        }
    }
    Ok(keys)
}

fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// The merges, which a file has as pairs or as texts with a space.
fn merges(model: &Value) -> Option<Vec<(String, String)>> {
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        Value::Array(two) if two.len() == 2 => Some((two[0].as_str()?.into(), two[1].as_str()?.into())),
        _ => None,
    };
    model["merges"].as_array().map_or(Some(Vec::new()), |all| all.iter().map(pair).collect())
}

/// Spaces are written as SentencePiece does; and whether a text gets one in front.
fn sentence_piece(json: &Value) -> Option<bool> {
    let normalizer = &json["normalizer"];
    let steps: Vec<&Value> = match normalizer["normalizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![normalizer],
    };
    let replaces = steps.iter().any(|step| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == SPACE
    });
    let prepends = steps.iter().any(|step| step["type"] == "Prepend" && step["prepend"] == SPACE);
    let others = steps.len() != usize::from(replaces) + usize::from(prepends);
    let cut = &json["pre_tokenizer"];
    if cut.is_null() {
        return (replaces && !others).then_some(prepends);
    }
    // The later way of the same: no cuts but at spaces, which are marked.
    let marks = cut["type"] == "Metaspace" && cut["replacement"] == SPACE && cut["split"] == false;
    (marks && normalizer.is_null()).then(|| cut["prepend_scheme"] != "never")
}

/// Scores by which the same pairs are joined first: those of tokens that earlier merges make are higher.
fn scores(tokens: &[String], kinds: &[i32], merges: &[(String, String)]) -> Vec<f32> {
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (n, (a, b)) in merges.iter().enumerate() {
        rank.entry(format!("{a}{b}")).or_insert(n);
    }
    let lowest = -(merges.len() as f32) - 1.0;
    tokens
        .iter()
        .zip(kinds)
        .map(|(token, kind)| match (*kind, rank.get(token)) {
            (self::kinds::NORMAL, Some(rank)) => -(*rank as f32) - 1.0,
            // Single characters, which nothing makes.
            (self::kinds::NORMAL, None) => lowest,
            _ => 0.0,
        })
        .collect()
}

/// The tokens that are put before and behind a text.
fn around(path: &Path, json: &Value) -> Result<(Option<u32>, Option<u32>)> {
    let wrong = |e: tokenizers::Error| {
        let what = format!("is not a tokenizer.json: {}", e.to_string().lines().next().unwrap_or_default());
        ModelError::File { path: path.into(), what }
    };
    let tokenizer = Tokenizer::from_bytes(json.to_string()).map_err(wrong)?;
    let [before, _, behind] = text::around(&tokenizer, "a")?;
    Ok((before.last().copied(), behind.first().copied()))
}
