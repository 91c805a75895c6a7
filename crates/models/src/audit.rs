//! The audit of a checkpoint: every parameter there once, with its shape, finite; nothing left over unexplained; no expert
//! twice. Converted checkpoints with experts dropped, duplicated or transposed are refused by name, not run.
//!
//! What looks at every byte is done once: that a checkpoint passed is remembered by the paths, sizes and times of its files.

use crate::error::Result;
use crate::names::Part;
use crate::params::{ParamDef, param_defs};
use crate::sources::source;
use crate::spec::{FfnSpec, ModelSpec};
use crate::tensor_files::Files;
use rayon::prelude::*;
use senmon_kernels::blocks::dequantize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

/// How much of a checkpoint is looked at when it is opened to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Audit {
    /// Names, shapes and types; and, at the first time, every value.
    #[default]
    Once,
    /// Names, shapes, types and every value.
    Full,
    /// Names, shapes and types.
    Structure,
}

/// Every part is there, with its shape; and no tensor is left over that cannot be explained. Returns the ones that are not
/// needed, and why they may be there.
pub(crate) fn structure(
    spec: &ModelSpec,
    parts: &[Part],
    files: &Files,
) -> Result<Vec<(String, &'static str)>> {
    structure_of(parts, files, |name| explanation(spec, files, name))
}

/// [`structure`] of any model, by what explains a tensor that is no part.
pub(crate) fn structure_of(
    parts: &[Part],
    files: &Files,
    explanation: impl Fn(&str) -> Option<&'static str>,
) -> Result<Vec<(String, &'static str)>> {
    let mut known = HashSet::new();
    for part in parts {
        known.extend(source(files, part)?.1);
    }
    let mut unused = Vec::new();
    for name in files.tensors.keys().filter(|name| !known.contains(*name)) {
        let Some(why) = explanation(name) else {
            return Err(
                files.refuse(name, "is not part of the model that its configuration describes".into())
            );
        };
        unused.push((name.clone(), why));
    }
    Ok(unused)
}

/// Why a tensor that the model does not need may be there.
fn explanation(spec: &ModelSpec, files: &Files, name: &str) -> Option<&'static str> {
    if name.ends_with("rotary_emb.inv_freq") {
        return Some("rotary frequencies, which follow from config.json");
    }
    let layer =
        name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    // Such a layer is known by the projection that joins its two inputs.
    let joins = |layer: &usize| files.tensors.contains_key(&format!("model.layers.{layer}.eh_proj.weight"));
    if layer.filter(|layer| *layer >= spec.layers.len()).is_some_and(|layer| joins(&layer))
        || name.starts_with("model.mtp_")
    {
        return Some("layers that predict further tokens, which are not run");
    }
    (name == "lm_head.weight" && spec.tie_embeddings).then_some("the head, which is the embedding")
}

/// Every value is finite, a tied head is the embedding, and no two experts of a layer are the same; `experts` names those of a
/// layer.
pub(crate) fn content(
    spec: &ModelSpec,
    experts: &dyn Fn(usize) -> String,
    parts: &[Part],
    files: &Files,
    upcycled: bool,
) -> Result<()> {
    finite_all(parts, files)?;
    if spec.tie_embeddings {
        tied(spec, parts, files)?;
    }
    if upcycled {
        return Ok(());
    }
    twins(&param_defs(spec), parts, files, &|def| {
        let (layer, size) = of_experts(spec, def)?;
        Some((experts(layer), size))
    })
}

/// The values of all parts are finite.
pub(crate) fn finite_all(parts: &[Part], files: &Files) -> Result<()> {
    parts.par_iter().try_for_each(|part| finite(files, part))
}

/// The values of a part are finite.
fn finite(files: &Files, part: &Part) -> Result<()> {
    /// Values that are decoded at once.
    const CHUNK: usize = 1 << 16;
    let (source, _) = source(files, part)?;
    let refuse = |at: usize, x: f32| files.refuse(&part.tensor, format!("element {at} is {x}"));
    if let crate::sources::Source::Numbers(entry, ty) = &source {
        let mut values = vec![0.0; CHUNK.min(part.len())];
        let size = CHUNK / ty.block_len() * ty.block_bytes();
        for (chunk, bytes) in files.bytes(entry).chunks(size).enumerate() {
            let values = &mut values[..bytes.len() / ty.block_bytes() * ty.block_len()];
            dequantize(*ty, bytes, values);
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                return Err(refuse(chunk * CHUNK + at, values[at]));
            }
        }
        return Ok(());
    }
    let mut values = vec![0.0; part.len()];
    source.read(files, part, &mut values)?;
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(refuse(at, values[at])),
        None => Ok(()),
    }
}

/// A head that is there although it is tied is the embedding.
fn tied(spec: &ModelSpec, parts: &[Part], files: &Files) -> Result<()> {
    let head = "lm_head.weight";
    let (Some(entry), Some(embedding)) = (files.tensors.get(head), parts.first()) else { return Ok(()) };
    let refuse = |what: &str| Err(files.refuse(head, what.into()));
    if entry.shape != [spec.vocab, spec.hidden] {
        return refuse("tie_word_embeddings is true, but its shape is not the embedding's");
    }
    let (mut head, mut table) = (vec![0.0; embedding.len()], vec![0.0; embedding.len()]);
    files.decode("lm_head.weight", &mut head)?;
    source(files, embedding)?.0.read(files, embedding, &mut table)?;
    match head == table {
        true => Ok(()),
        false => refuse("tie_word_embeddings is true, but it is not the embedding"),
    }
}

/// No two experts of a layer are the same. `of_experts` gives the block of a parameter that holds experts' matrices, and the
/// elements that one expert has in it.
pub(crate) fn twins(
    defs: &[ParamDef],
    parts: &[Part],
    files: &Files,
    of_experts: &dyn Fn(&ParamDef) -> Option<(String, usize)>,
) -> Result<()> {
    // The bytes of each expert of each layer, in a fixed order of its tensors.
    let mut experts: BTreeMap<(String, usize), Vec<&[u8]>> = BTreeMap::new();
    for part in parts {
        let Some((layer, size)) = of_experts(&defs[part.param]) else { continue };
        let count = part.len() / size.max(1);
        for bytes in source(files, part)?.0.bytes(files) {
            // A tensor of one expert may be a part of its parameter's.
            let (first, count) =
                if count == 0 { (part.offset / size, 1) } else { (part.offset / size.max(1), count) };
            for (n, bytes) in bytes.chunks(bytes.len().div_ceil(count).max(1)).enumerate() {
                experts.entry((layer.clone(), first + n)).or_default().push(bytes);
            }
        }
    }
    let mut by_start: HashMap<(&str, &[u8]), Vec<usize>> = HashMap::new();
    for ((layer, expert), bytes) in &experts {
        // Equal experts begin with equal bytes: only those are compared whole.
        let start = bytes.first().map_or(&[][..], |bytes| &bytes[..bytes.len().min(32)]);
        let same_start = by_start.entry((layer.as_str(), start)).or_default();
        if let Some(twin) = same_start.iter().find(|other| experts[&(layer.clone(), **other)] == *bytes) {
            let tensor = format!("{layer}.experts.{expert}");
            let what = format!("is the same as expert {twin}: the checkpoint was converted wrongly");
            let path = parts.first().map_or_else(PathBuf::new, |part| files.path_of(&part.tensor));
            return Err(crate::ModelError::Tensor { path, tensor, what });
        }
        same_start.push(*expert);
    }
    Ok(())
}

/// The layer of a parameter that holds experts' matrices, and the elements that one expert has in it.
fn of_experts(spec: &ModelSpec, def: &ParamDef) -> Option<(usize, usize)> {
    let (layer, part) = def.name.strip_prefix("layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let FfnSpec::Moe(moe) = spec.layers.get(layer)? else { return None };
    matches!(part, "experts.gate_up" | "experts.down").then(|| (layer, def.len() / moe.experts))
}

/// What a checkpoint that passed is remembered by.
fn key(files: &Files) -> Option<PathBuf> {
    let mut hash = blake3::Hasher::new();
    hash.update(concat!("audit 1 ", env!("CARGO_PKG_VERSION")).as_bytes());
    for path in &files.paths {
        let (path, found) = (path.canonicalize().ok()?, std::fs::metadata(path).ok()?);
        let changed = found.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        hash.update(format!("\n{} {} {}", path.display(), found.len(), changed.as_nanos()).as_bytes());
    }
    Some(senmon_files::cache_folder()?.join("audits").join(hash.finalize().to_hex().as_str()))
}

/// The checkpoint passed before, and has not changed.
pub(crate) fn passed(files: &Files) -> bool {
    key(files).is_some_and(|key| key.is_file())
}

/// Remembers that the checkpoint passed; where there is no place for it, nothing is.
pub(crate) fn remember(files: &Files) {
    let Some(key) = key(files) else { return };
    if key.parent().is_some_and(|folder| std::fs::create_dir_all(folder).is_ok()) {
        let _ = senmon_files::write_whole(&key, |_| Ok(()));
    }
}
