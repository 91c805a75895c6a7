//! Models in GGUF, the container of llama.cpp: one file, or several with `-00001-of-` in their names.
//!
//! An architecture ([`arch::ARCHS`]) is a row of a table; the specification comes from the metadata, and from there on a model is
//! what it would be in a folder: parts of parameters, an audit, weights that stay in the mapped file.

pub mod arch;
mod from_tokenizer;
mod metadata;
mod names;
mod pre;
mod rope;
mod spec;
mod tokenizer;
mod write;

use crate::error::Result;
use crate::names::Part;
use crate::spec::ModelSpec;
use crate::tensor_files::Files;
use arch::Arch;
pub(crate) use from_tokenizer::keys as tokenizer_keys;
use metadata::{Keys, of_file};
pub use names::parts;
use senmon_gguf::{Gguf, Metadata, split};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;
pub(crate) use tokenizer::json as tokenizer_json;
pub(crate) use write::{of_tokens, say};

/// True for a path that is a GGUF file by its name or by its first bytes.
pub fn is_gguf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    path.is_file()
        && (path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
            || std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok()
                && magic == *b"GGUF")
}

/// What a GGUF model is, before its values are looked at.
pub(crate) struct Opened {
    pub metadata: Arc<Metadata>,
    pub arch: &'static Arch,
    pub spec: ModelSpec,
    pub parts: Vec<Part>,
    pub files: Files,
}

/// Opens the model that a file is, or is a part of. `turned` as in [`spec::read`].
pub(crate) fn open(path: &Path, turned: bool) -> Result<Opened> {
    let (metadata, files) = files(path)?;
    let keys = Keys::new(path, &metadata)?;
    let (arch, spec) = (keys.arch, spec::read(&keys, &files, turned)?);
    let parts = parts(&spec, arch);
    Ok(Opened { metadata: Arc::new(metadata), arch, spec, parts, files })
}

/// The key that says that equal experts are meant.
pub(crate) const UPCYCLED: &str = "senmon.upcycled";

/// The model was upcycled: its experts may be equal.
pub(crate) fn upcycled(path: &Path, metadata: &Metadata) -> Result<bool> {
    Ok(metadata.find(UPCYCLED).map_err(|e| of_file(path, e))?.unwrap_or(false))
}

/// The file has a tokenizer.
pub(crate) fn has_tokenizer(metadata: &Metadata) -> bool {
    metadata.get("tokenizer.ggml.tokens").is_some()
}

/// The metadata of a file as bytes, and its tensors.
pub(crate) fn identity(path: &Path) -> Result<(Vec<u8>, Files)> {
    let (metadata, files) = files(path)?;
    let own = metadata.iter().filter(|(key, _)| !key.starts_with("split."));
    let text: Vec<String> = own.map(|(key, value)| format!("{key} {value:?}")).collect();
    Ok((text.join("\n").into_bytes(), files))
}

/// The chat template of a file, and its special tokens by the names that templates have for them.
pub(crate) fn chat_template(path: &Path) -> Result<Option<(String, Map<String, Value>)>> {
    let metadata = files(path)?.0;
    let error = |e| of_file(path, e);
    let Some(text) = metadata.find::<&str>("tokenizer.chat_template").map_err(error)? else {
        return Ok(None);
    };
    let tokens: &[String] = metadata.find("tokenizer.ggml.tokens").map_err(error)?.unwrap_or_default();
    let mut named = Map::new();
    for (name, key) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]
    {
        let id: Option<usize> = metadata.find(&format!("tokenizer.ggml.{key}_token_id")).map_err(error)?;
        if let Some(token) = id.and_then(|id| tokens.get(id)) {
            named.insert(name.into(), token.as_str().into());
        }
    }
    Ok(Some((text.to_owned(), named)))
}

/// The files of a model and what is in them.
fn files(path: &Path) -> Result<(Metadata, Files)> {
    let mut files = Files::none();
    let mut read = Vec::new();
    for path in split::siblings(path).map_err(|e| of_file(path, e))? {
        let map = files.map(path.clone())?;
        read.push(Gguf::read((*map).as_ref()).map_err(|e| of_file(&path, e))?);
    }
    let joined = split::join(read).map_err(|e| of_file(path, e))?;
    for (file, tensor) in joined.tensors {
        files.put(file, tensor);
    }
    Ok((joined.metadata, files))
}

impl spec::Tensors for Files {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|entry| entry.shape.clone())
    }

    fn values(&self, name: &str) -> Result<Option<Vec<f64>>> {
        /// Nothing that is asked for in this way is longer.
        const MOST: usize = 1 << 16;
        let Some(entry) = self.tensors.get(name) else { return Ok(None) };
        let count = entry.shape.iter().product::<usize>();
        if count > MOST {
            return Err(self.refuse(name, format!("has {count} numbers, expected at most {MOST}")));
        }
        let mut values = vec![0.0; count];
        self.decode(name, &mut values)?;
        Ok(Some(values.into_iter().map(metadata::widened).collect()))
    }
}

/// Why a tensor that is no part of the model may be there.
pub(crate) fn explanation(spec: &ModelSpec, files: &Files, name: &str) -> Option<&'static str> {
    if name == rope::FREQS || rope::FACTORS.contains(&name) {
        return Some("divisors of the rotary speeds, which are in the specification");
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    // Such a layer is known by the projection that joins its two inputs.
    let joins = |layer: usize| files.tensors.contains_key(&format!("blk.{layer}.nextn.eh_proj.weight"));
    layer
        .is_some_and(|layer| layer >= spec.layers.len() && joins(layer))
        .then_some("layers that predict further tokens, which are not run")
}
