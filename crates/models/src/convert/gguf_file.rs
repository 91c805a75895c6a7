//! A model written as GGUF.

use super::{Meter, Params, Progress, Report, Tensor, Types, as_io, by_type, bytes_of, commonest};
use crate::chat;
use crate::checkpoint::{Found, Layout};
use crate::error::{ModelError, Result};
use crate::gguf;
use crate::params::param_defs;
use crate::text::TokenizerSource;
use senmon_gguf::{Value as Key, Writer, split};
use senmon_kernels::blocks::ElementType;
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::path::Path;

pub(super) fn into_gguf(
    from: &Path,
    found: &Found,
    to: &Path,
    types: Types,
    progress: &Progress,
) -> Result<Report> {
    let family = match found.layout {
        Layout::Folder(family) => family.name,
        Layout::Gguf(arch) => arch.families[0],
    };
    if let Some((_, number, count)) = to.file_name().and_then(|n| n.to_str()).and_then(split::parse_name) {
        let what =
            format!("is the name of file {} of {count} of a split model: one file is written", number + 1);
        return Err(ModelError::File { path: to.into(), what });
    }
    let mut spec = found.spec.clone();
    // Chat models often say only beside the model what ends a turn.
    spec.tokens.eos.extend(&found.generation.eos);
    let said = gguf::say(&spec, family)?;
    let (defs, parts) = (param_defs(&said.spec), gguf::parts(&said.spec, said.arch));
    let mut params = Params::new(found, &defs)?;
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    for part in &parts {
        let at = *index.entry(&part.tensor).or_insert_with(|| {
            tensors.push(Tensor { parts: Vec::new(), ty: ElementType::F32 });
            tensors.len() - 1
        });
        tensors[at].parts.push(part);
    }
    let mut unfit: Vec<(ElementType, ElementType, usize)> = Vec::new();
    for tensor in &mut tensors {
        let part = tensor.first();
        let (def, cols) = (&defs[part.param], part.shape.last().copied().unwrap_or(1));
        // Routers, norms and biases are small, and llama.cpp wants them so.
        let chosen = match types {
            _ if !def.stays() || part.shape.len() < 2 => ElementType::F32,
            Types::Keep => {
                let mut own =
                    tensor.parts.iter().map(|part| params.type_of(part)).collect::<Result<Vec<_>>>()?;
                own.dedup();
                match own.as_slice() {
                    [Some(ty)] if part.order.keeps_rows() || ty.block_len() == 1 => *ty,
                    _ => ElementType::F32,
                }
            }
            // The head decides on every token: as llama.cpp, it gets more bits.
            Types::Matrices(ElementType::Q4K) if def.name == "head" => ElementType::Q6K,
            Types::Matrices(ty) => ty,
        };
        let whole = |ty: &ElementType| cols.is_multiple_of(ty.block_len());
        let fit = [chosen, ElementType::Q8_0, ElementType::F16].into_iter().find(whole);
        tensor.ty = fit.unwrap_or(ElementType::F16);
        if tensor.ty != chosen {
            match unfit.iter_mut().find(|(from, to, _)| (*from, *to) == (chosen, tensor.ty)) {
                Some((.., count)) => *count += 1,
                None => unfit.push((chosen, tensor.ty, 1)),
            }
        }
    }
    let mut notes = said.notes;
    notes.extend(unfit.iter().map(|(from, to, count)| {
        format!("{count} matrices are {to}: their rows are no whole blocks of {from}")
    }));
    let mut writer = Writer::new();
    let wrong = |e: senmon_gguf::GgufError| match e {
        senmon_gguf::GgufError::Write { source } => ModelError::io("write", to)(source),
        other => ModelError::File { path: to.into(), what: other.to_string() },
    };
    let mut set = |key: &str, value: Key| match writer.metadata().get(key) {
        None => writer.set(key, value).map(|_| ()).map_err(wrong),
        Some(_) => Ok(()),
    };
    set("general.architecture", said.arch.name.into())?;
    if found.upcycled {
        set(gguf::UPCYCLED, Key::Bool(true))?;
    }
    set("general.type", "model".into())?;
    if let Some(name) =
        from.canonicalize().ok().as_deref().unwrap_or(from).file_stem().and_then(|s| s.to_str())
    {
        set("general.name", name.into())?;
    }
    let (file_type, coded) = file_type(types, &tensors);
    set("general.file_type", Key::U32(file_type))?;
    if coded {
        set("general.quantization_version", Key::U32(2))?;
    }
    for (key, value) in said.keys {
        set(&key, value)?;
    }
    match &found.tokenizer {
        Some(TokenizerSource::Gguf { metadata, .. }) => {
            let own = metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
            own.into_iter().try_for_each(|(key, value)| set(key, value.clone()))?;
        }
        Some(tokenizer) => {
            let json: Value = serde_json::from_slice(&tokenizer.json()?).map_err(|e| ModelError::File {
                path: tokenizer.path().into(),
                what: format!("is not JSON: {e}"),
            })?;
            let keys = gguf::tokenizer_keys(tokenizer.path(), &json, said.spec.vocab)?;
            keys.into_iter().try_for_each(|(key, value)| set(&key, value))?;
            if let Some((_, template, _)) = chat::text_of(from)? {
                set("tokenizer.chat_template", template.as_str().into())?;
            }
        }
        None => set("tokenizer.ggml.model", "no_vocab".into())?,
    }
    for (key, value) in gguf::of_tokens(&said.spec) {
        set(&key, value)?;
    }
    for (name, values) in &said.tensors {
        writer.tensor(name, &[values.len()], ElementType::F32).map_err(wrong)?;
    }
    for tensor in &tensors {
        writer.tensor(&tensor.first().tensor, &tensor.first().whole_shape(), tensor.ty).map_err(wrong)?;
    }
    let bytes = bytes_of(&tensors);
    let mut meter = Meter { done: 0, total: bytes, progress };
    crate::files::write_whole(to, |file| {
        let written = writer.write(file, |info, out| {
            if let Some((_, values)) = said.tensors.iter().find(|(name, _)| *name == info.name) {
                return values.iter().try_for_each(|x| out.write_all(&x.to_le_bytes()));
            }
            let tensor = &tensors[index[info.name.as_str()]];
            for part in &tensor.parts {
                params.write(part, tensor.ty, out).map_err(as_io)?;
                meter.add(tensor.ty.row_bytes(part.len()).unwrap_or(0))?;
            }
            Ok(())
        });
        written.map(|_| ()).map_err(|e| match e {
            senmon_gguf::GgufError::Write { source } => source,
            other => io::Error::other(other.to_string()),
        })
    })?;
    Ok(Report {
        layout: Layout::Gguf(said.arch).name(),
        tensors: tensors.len() + said.tensors.len(),
        bytes,
        types: by_type(&tensors),
        notes,
    })
}

/// llama.cpp's number for what most of a file is, and whether blocks are in it.
fn file_type(types: Types, tensors: &[Tensor]) -> (u32, bool) {
    let number = match (types, commonest(tensors)) {
        (Types::Matrices(ElementType::Q4K), _) => 14,
        (_, Some(ElementType::F16)) => 1,
        (_, Some(ElementType::Q8_0)) => 7,
        (_, Some(ElementType::Bf16)) => 32,
        (_, Some(ElementType::Mxfp4)) => 38,
        (_, Some(ElementType::F32)) => 0,
        // Not said: what the tensors are is with each of them.
        _ => 1024,
    };
    (number, tensors.iter().any(|tensor| tensor.ty.block_len() > 1))
}
