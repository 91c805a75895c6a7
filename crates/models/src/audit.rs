//! The audit of a checkpoint: every parameter there once, with its shape, finite; nothing left over unexplained; no expert
//! twice. Converted checkpoints with experts dropped, duplicated or transposed are refused by name, not run.

use crate::checkpoint::Files;
use crate::error::{ModelError, Result};
use crate::families::Family;
use crate::names::Part;
use crate::params::param_defs;
use crate::spec::{FfnSpec, ModelSpec};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// Every part is there, with its shape; and no tensor is left over that cannot be explained.
pub(crate) fn structure(spec: &ModelSpec, parts: &[Part], files: &Files) -> Result<()> {
    for part in parts {
        let refuse = |what: String| {
            Err(ModelError::Tensor { path: files.path_of(&part.tensor), tensor: part.tensor.clone(), what })
        };
        match files.tensors.get(&part.tensor) {
            None => return refuse("is missing".into()),
            Some(entry) if entry.shape != part.shape => {
                let mut turned = entry.shape.clone();
                turned.reverse();
                let hint = if turned == part.shape { ": it is transposed" } else { "" };
                return refuse(format!(
                    "has shape {:?}, config.json says {:?}{hint}",
                    entry.shape, part.shape
                ));
            }
            Some(_) => {}
        }
    }
    let known: HashSet<&str> = parts.iter().map(|part| part.tensor.as_str()).collect();
    for name in files.tensors.keys().filter(|name| !known.contains(name.as_str())) {
        if explanation(spec, files, name).is_none() {
            let what = "is not part of the model that config.json describes".into();
            return Err(ModelError::Tensor { path: files.path_of(name), tensor: name.clone(), what });
        }
    }
    Ok(())
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

/// A tensor's values are finite.
pub(crate) fn finite(files: &Files, tensor: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(ModelError::Tensor {
            path: files.path_of(tensor),
            tensor: tensor.into(),
            what: format!("element {at} is {}", values[at]),
        }),
    }
}

/// The tensors that were not needed; a tied head must be the embedding.
pub(crate) fn leftovers(
    spec: &ModelSpec,
    parts: &[Part],
    files: &Files,
    params: &[Vec<f32>],
) -> Result<Vec<(String, &'static str)>> {
    let known: HashSet<&str> = parts.iter().map(|part| part.tensor.as_str()).collect();
    let mut unused = Vec::new();
    for (name, entry) in files.tensors.iter().filter(|(name, _)| !known.contains(name.as_str())) {
        if name == "lm_head.weight" {
            let refuse = |what: &str| {
                Err(ModelError::Tensor { path: files.path_of(name), tensor: name.clone(), what: what.into() })
            };
            if entry.shape != [spec.vocab, spec.hidden] {
                return refuse("tie_word_embeddings is true, but its shape is not the embedding's");
            }
            let mut head = vec![0.0; spec.vocab * spec.hidden];
            files.read(name, &mut head)?;
            if head != params[0] {
                return refuse("tie_word_embeddings is true, but it is not the embedding");
            }
        }
        unused.push((name.clone(), explanation(spec, files, name).unwrap_or("")));
    }
    Ok(unused)
}

/// No two experts of a layer are the same.
pub(crate) fn twins(spec: &ModelSpec, family: &Family, folder: &Path, params: &[Vec<f32>]) -> Result<()> {
    let defs = param_defs(spec);
    for (l, layer) in spec.layers.iter().enumerate() {
        let FfnSpec::Moe(moe) = layer else { continue };
        let find = |part: &str| defs.iter().position(|def| def.name == format!("layers.{l}.{part}"));
        let (Some(up), Some(down)) = (find("experts.gate_up"), find("experts.down")) else { continue };
        let expert = |param: usize, e: usize| {
            let size = params[param].len() / moe.experts;
            &params[param][e * size..][..size]
        };
        // Equal experts have equal first values: only those are compared whole.
        let mut by_start: HashMap<Vec<u32>, Vec<usize>> = HashMap::new();
        for e in 0..moe.experts {
            let start = expert(up, e).iter().take(8).map(|x| x.to_bits()).collect();
            let same_start = by_start.entry(start).or_default();
            let twin = same_start
                .iter()
                .find(|&&o| expert(up, o) == expert(up, e) && expert(down, o) == expert(down, e));
            if let Some(twin) = twin {
                return Err(ModelError::Tensor {
                    path: folder.into(),
                    tensor: format!("model.layers.{l}.{}.experts.{e}", family.names.block),
                    what: format!("is the same as expert {twin}: the checkpoint was converted wrongly"),
                });
            }
            same_start.push(e);
        }
    }
    Ok(())
}
