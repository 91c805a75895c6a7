//! Models written as folders in Hugging Face layout.

use crate::error::{ModelError, Result};
use crate::families::{self, Family};
use crate::files::write_whole;
use crate::names::{Order, Part, parts};
use crate::params::param_defs;
use crate::spec::ModelSpec;
use crate::tensor_files::INDEX;
use senmon_kernels::blocks::ElementType;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

/// Bytes of one file of a checkpoint, about.
pub(crate) const SHARD: usize = 4 << 30;

/// Writes a model into a folder that exists: safetensors, then `generation_config.json`, at last `config.json`, each whole.
///
/// `family` is a name of [`families::FAMILIES`] or `auto`; `params` are the values of [`param_defs`], in their order. Weights
/// of another model in the folder that would be read beside these or instead of them are removed. Each file is whole at
/// any instant; that all are of one model needs a folder of its own, renamed when this returns.
pub fn save(folder: &Path, spec: &ModelSpec, params: &[&[f32]], family: &str) -> Result<&'static Family> {
    save_in_shards(folder, spec, params, family, SHARD)
}

fn save_in_shards(
    folder: &Path,
    spec: &ModelSpec,
    params: &[&[f32]],
    family: &str,
    shard_bytes: usize,
) -> Result<&'static Family> {
    spec.validate()?;
    let defs = param_defs(spec);
    if defs.len() != params.len() || defs.iter().zip(params).any(|(def, values)| def.len() != values.len()) {
        let what = "the values to save are not those of the specification".into();
        return Err(ModelError::Internal { what });
    }
    let (family, config) = families::config_json(spec, family)?;
    let parts = parts(spec, &family.names);
    write_weights(folder, &parts, shard_bytes, &|_| ElementType::F32, &mut |part, w| {
        let values = &params[part.param][part.offset..][..part.len()];
        let mut in_file = Vec::new();
        let values = match part.order {
            Order::Straight => values,
            order => {
                in_file.resize(values.len(), 0.0);
                order.write(&part.shape, values, &mut in_file);
                &in_file
            }
        };
        let mut buffer = Vec::new();
        for chunk in values.chunks(1 << 16) {
            buffer.clear();
            buffer.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
            w.write_all(&buffer)?;
        }
        Ok(())
    })?;
    write_json(&folder.join("generation_config.json"), &generation_config(spec))?;
    write_json(&folder.join("config.json"), &config)?;
    Ok(family)
}

/// The `generation_config.json` of a model.
pub(crate) fn generation_config(spec: &ModelSpec) -> Value {
    let mut generation = Map::new();
    let tokens = &spec.tokens;
    for (key, ids) in [
        ("bos_token_id", tokens.bos.as_slice()),
        ("eos_token_id", tokens.eos.as_slice()),
        ("pad_token_id", tokens.pad.as_slice()),
    ] {
        match ids {
            [] => continue,
            [one] => generation.insert(key.into(), (*one).into()),
            several => generation.insert(key.into(), several.into()),
        };
    }
    Value::Object(generation)
}

/// Writes the tensors of a model into a folder, in files of about `shard_bytes`; `data` writes the elements of each, of the
/// type that `types` says.
pub(crate) fn write_weights(
    folder: &Path,
    parts: &[Part],
    shard_bytes: usize,
    types: &dyn Fn(&Part) -> ElementType,
    data: &mut dyn FnMut(&Part, &mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let bytes = |part: &Part| types(part).row_bytes(part.len()).unwrap_or(0);
    let mut shards: Vec<Vec<&Part>> = vec![Vec::new()];
    let mut filled = 0;
    for part in parts {
        if filled > 0 && filled + bytes(part) > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes(part);
        if let Some(shard) = shards.last_mut() {
            shard.push(part);
        }
    }
    let mut index = Map::new();
    let mut written = HashSet::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut at = 0;
        for part in shard {
            let end = at + bytes(part);
            header.insert(
                part.tensor.clone(),
                json!({ "dtype": types(part).name(), "shape": part.shape, "data_offsets": [at, end] }),
            );
            index.insert(part.tensor.clone(), name.clone().into());
            at = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        // The data begin at a multiple of eight bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        write_whole(&folder.join(&name), |w| {
            w.write_all(&(header.len() as u64).to_le_bytes())?;
            w.write_all(&header)?;
            shard.iter().try_for_each(|part| data(part, w))
        })?;
        written.insert(name);
    }
    if shards.len() > 1 {
        let total: usize = parts.iter().map(bytes).sum();
        let json = json!({ "metadata": { "total_size": total }, "weight_map": index });
        write_json(&folder.join(INDEX), &json)?;
        written.insert(INDEX.into());
    }
    remove_stale(folder, &written)
}

/// Removes the weights that an earlier save left in a folder and this one did not write over.
fn remove_stale(folder: &Path, written: &HashSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(ModelError::io("read", folder))? {
        let name = entry.map_err(ModelError::io("read", folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        if (shard || name == "model.safetensors" || name == INDEX) && !written.contains(name) {
            let path = folder.join(name);
            std::fs::remove_file(&path).map_err(ModelError::io("remove", &path))?;
        }
    }
    Ok(())
}

pub(crate) fn write_json(path: &Path, json: &Value) -> Result<()> {
    let text = format!("{json:#}\n");
    write_whole(path, |w| w.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::load;
    use crate::params::initial_values;
    use crate::spec::test_spec;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn shards_come_back_and_leave_with_the_next_save() {
        let folder = tempfile::tempdir().unwrap();
        let spec = test_spec(4);
        let values = initial_values(&spec, 1);
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        let whole = ["config.json", "generation_config.json", "model.safetensors"];
        save(folder.path(), &spec, &slices, "auto").unwrap();
        assert_eq!(names(folder.path()), whole);
        // A single file of another model would be read instead of the shards; shards of another number beside them.
        for bytes in [500, 1, 2000] {
            save_in_shards(folder.path(), &spec, &slices, "auto", bytes).unwrap();
            let found = names(folder.path());
            assert!(found.iter().any(|name| name == INDEX) && !found.iter().any(|name| name == whole[2]));
            let shards = found.iter().filter(|name| name.contains("-of-")).count();
            let last = format!("model-{shards:05}-of-{shards:05}.safetensors");
            assert!(shards > 1 && found.contains(&last), "{found:?}");
            assert_eq!(load(folder.path()).unwrap().params, values);
        }
        std::fs::write(folder.path().join("notes.safetensors"), "mine").unwrap();
        save(folder.path(), &spec, &slices, "auto").unwrap();
        assert_eq!(names(folder.path()), [&whole[..], &["notes.safetensors"]].concat());
        assert_eq!(load(folder.path()).unwrap().params, values);
    }

    #[test]
    fn values_that_are_not_the_models_are_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let spec = test_spec(4);
        let values = initial_values(&spec, 1);
        let mut slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        slices[0] = &values[0][1..];
        assert!(save(folder.path(), &spec, &slices, "auto").is_err());
        assert!(save(folder.path(), &spec, &slices[1..], "auto").is_err());
        slices[0] = &values[0];
        let text = save(folder.path(), &spec, &slices, "lama").unwrap_err().to_string();
        assert!(text.contains("lama") && text.contains("llama"), "{text}");
        assert!(names(folder.path()).is_empty());
    }
}
