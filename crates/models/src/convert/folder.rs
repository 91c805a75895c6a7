//! A model written as a folder of a Hugging Face family.

use super::{Meter, Params, Progress, Report, Tensor, Types, as_io, by_type, bytes_of, commonest};
use crate::chat;
use crate::checkpoint::Found;
use crate::error::{ModelError, Result};
use crate::families;
use crate::gguf;
use crate::names::{Part, parts};
use crate::params::param_defs;
use crate::save::{SHARD, generation_config, write_json, write_weights};
use crate::text::TokenizerSource;
use senmon_kernels::blocks::ElementType;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Files beside a model that go along with it.
const BESIDE: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

pub(super) fn into_folder(
    from: &Path,
    found: &Found,
    to: &Path,
    types: Types,
    family: &str,
    progress: &Progress,
) -> Result<Report> {
    let own = found.layout.family(&found.spec).name;
    let family = if family == "auto" { own } else { family };
    let (family, mut config) = families::config_json(&found.spec, family)?;
    let (defs, parts) = (param_defs(&found.spec), parts(&found.spec, &family.names));
    let mut params = Params::new(found, &defs)?;
    let mut chosen = Vec::with_capacity(parts.len());
    for part in &parts {
        let kept = match params.type_of(part)? {
            Some(ty) if ty.block_len() == 1 => ty,
            Some(ElementType::Mxfp4) => ElementType::Bf16,
            _ => ElementType::F32,
        };
        chosen.push(match types {
            Types::Matrices(ty) if defs[part.param].stays() => ty,
            _ => kept,
        });
    }
    let tensors: Vec<Tensor> =
        parts.iter().zip(&chosen).map(|(part, ty)| Tensor { parts: vec![part], ty: *ty }).collect();
    let of: HashMap<&str, ElementType> =
        parts.iter().map(|part| part.tensor.as_str()).zip(chosen.iter().copied()).collect();
    let of = |part: &Part| of[part.tensor.as_str()];
    if found.upcycled {
        config["upcycled"] = true.into();
    }
    config["dtype"] = match commonest(&tensors) {
        Some(ElementType::Bf16) => "bfloat16".into(),
        Some(ElementType::F16) => "float16".into(),
        _ => "float32".into(),
    };
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(ModelError::io("write", parent))?;
    let work = tempfile::Builder::new().prefix(".senmon-").tempdir_in(parent);
    let work = work.map_err(ModelError::io("write", parent))?;
    let bytes = bytes_of(&tensors);
    let mut meter = Meter { done: 0, total: bytes, progress };
    write_weights(work.path(), &parts, SHARD, &of, &mut |part, out| {
        params.write(part, of(part), out).map_err(as_io)?;
        meter.add(of(part).row_bytes(part.len()).unwrap_or(0))
    })
    .map_err(|e| in_place(e, work.path(), to))?;
    match &found.tokenizer {
        Some(TokenizerSource::Gguf { path, metadata }) => {
            if let Some(json) = gguf::tokenizer_json(path, metadata)? {
                write_json(&work.path().join("tokenizer.json"), &json)?;
                write_json(&work.path().join("tokenizer_config.json"), &tokenizer_config(from)?)?;
            }
        }
        _ => {
            for name in BESIDE {
                let file = from.join(name);
                if from.is_dir() && file.is_file() {
                    std::fs::copy(&file, work.path().join(name)).map_err(ModelError::io("read", &file))?;
                }
            }
        }
    }
    let generation = work.path().join("generation_config.json");
    if !generation.is_file() {
        write_json(&generation, &generation_config(&found.spec))?;
    }
    write_json(&work.path().join("config.json"), &config)?;
    readable(work.path());
    std::fs::rename(work.path(), to).map_err(ModelError::io("write", to))?;
    // It has another name now, under which nothing removes it.
    let _ = work.keep();
    Ok(Report {
        layout: family.name.into(),
        tensors: tensors.len(),
        bytes,
        types: by_type(&tensors),
        notes: Vec::new(),
    })
}

/// A temporary folder is its owner's alone; a model is as any other folder.
fn readable(folder: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755));
    }
    #[cfg(not(unix))]
    let _ = folder;
}

/// An error about a file in the temporary folder, as one about where it would be.
fn in_place(error: ModelError, work: &Path, to: &Path) -> ModelError {
    match error {
        ModelError::Io { action, path, source } => {
            let path = path.strip_prefix(work).map_or_else(|_| to.to_owned(), |file| to.join(file));
            ModelError::Io { action, path, source }
        }
        other => other,
    }
}

/// The `tokenizer_config.json` of a GGUF model.
fn tokenizer_config(from: &Path) -> Result<Value> {
    let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
    if let Some((_, template, tokens)) = chat::text_of(from)? {
        config["chat_template"] = template.into();
        tokens.into_iter().for_each(|(name, token)| config[name] = token);
    }
    Ok(config)
}
