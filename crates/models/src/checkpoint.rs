//! Checkpoints in Hugging Face layout: `config.json` and safetensors, one file or several with an index.
//!
//! Tensors are read from their place in the file straight into the parameter that they are part of. Every tensor that the
//! model needs must be there once and with its shape, and none may be left over unexplained ([`crate::audit`]).

use crate::audit;
use crate::error::{ModelError, Result};
use crate::families::{self, Family, Json};
use crate::files::{is_file, write_whole};
use crate::names::{Order, Part, parts};
use crate::params::param_defs;
use crate::spec::ModelSpec;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A model as it lies in a folder.
#[derive(Debug)]
pub struct Checkpoint {
    /// What it is.
    pub spec: ModelSpec,
    /// The layout it was in.
    pub family: &'static Family,
    /// The values of [`param_defs`], in their order.
    pub params: Vec<Vec<f32>>,
    /// Its `tokenizer.json`, if it has one.
    pub tokenizer: Option<PathBuf>,
    /// What its `generation_config.json` says.
    pub generation: GenerationDefaults,
    /// Tensors that the model does not need, and why they may be there.
    pub unused: Vec<(String, &'static str)>,
}

/// What a model's makers advise for generation (`generation_config.json`); chat models often say only here what ends a turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling rather than the likeliest token.
    pub do_sample: Option<bool>,
    /// As in [`crate::sampling::Sampling`].
    pub temperature: Option<f64>,
    /// As in [`crate::sampling::Sampling`].
    pub top_k: Option<usize>,
    /// As in [`crate::sampling::Sampling`].
    pub top_p: Option<f64>,
    /// Tokens that end a text, besides those of the specification.
    pub eos: Vec<u32>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: u64,
}

/// The types that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn size(self) -> usize {
        if self == Dtype::F32 { 4 } else { 2 }
    }
}

/// The open files of a checkpoint and what is in them.
pub(crate) struct Files {
    pub paths: Vec<PathBuf>,
    files: Vec<File>,
    pub tensors: BTreeMap<String, Entry>,
}

/// Greatest size of the header of a safetensors file, as the format has it.
const MAX_HEADER: u64 = 100_000_000;
/// Greatest size of a JSON file that is read.
const MAX_JSON: u64 = 100_000_000;
/// Says which tensor is in which file.
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of one file of a checkpoint, about.
const SHARD: usize = 4 << 30;

/// Reads `config.json` alone.
pub fn load_spec(folder: &Path) -> Result<(ModelSpec, &'static Family)> {
    let path = folder.join("config.json");
    if !folder.is_dir() {
        let what = if folder.exists() { "is not a folder with a model" } else { "there is no such folder" };
        return Err(ModelError::File { path: folder.into(), what: what.into() });
    }
    if !is_file(&path)? {
        return Err(ModelError::File {
            path: folder.into(),
            what: "holds no model: config.json is missing".into(),
        });
    }
    let json = Json::new(&path, read_json(&path)?)?;
    let kind = json.text("model_type")?.ok_or_else(|| json.error("model_type is missing"))?;
    let family = families::family(kind).map_err(|e| json.error(e.to_string()))?;
    Ok(((family.read)(&json)?, family))
}

/// Loads and audits the model in a folder.
pub fn load(folder: &Path) -> Result<Checkpoint> {
    let (spec, family) = load_spec(folder)?;
    let files = Files::open(folder)?;
    let defs = param_defs(&spec);
    let parts = parts(&spec, &family.names);
    audit::structure(&spec, &parts, &files)?;
    // Only now, when every part is known to be there with its shape, is memory asked for.
    let mut params: Vec<Vec<f32>> = defs.iter().map(|def| vec![0.0; def.len()]).collect();
    for part in &parts {
        let into = &mut params[part.param][part.offset..][..part.len()];
        files.read_part(part, into)?;
        audit::finite(&files, &part.tensor, into)?;
    }
    let unused = audit::leftovers(&spec, &parts, &files, &params)?;
    audit::twins(&spec, family, folder, &params)?;
    let tokenizer = folder.join("tokenizer.json");
    let tokenizer = is_file(&tokenizer)?.then_some(tokenizer);
    let generation = generation_defaults(folder)?;
    Ok(Checkpoint { spec, family, params, tokenizer, generation, unused })
}

/// Reads `generation_config.json`, where there is one.
pub fn generation_defaults(folder: &Path) -> Result<GenerationDefaults> {
    let path = folder.join("generation_config.json");
    if !is_file(&path)? {
        return Ok(GenerationDefaults::default());
    }
    let json = Json::new(&path, read_json(&path)?)?;
    Ok(GenerationDefaults {
        do_sample: json.typed("do_sample", "true or false", Value::as_bool)?,
        temperature: json.typed("temperature", "a number", Value::as_f64)?,
        top_k: json.maybe_usize("top_k")?,
        top_p: json.typed("top_p", "a number", Value::as_f64)?,
        eos: json.tokens("eos_token_id")?,
    })
}

fn read_json(path: &Path) -> Result<Value> {
    let size = std::fs::metadata(path).map_err(ModelError::io("read", path))?.len();
    if size > MAX_JSON {
        return Err(ModelError::File {
            path: path.into(),
            what: format!("is {size} bytes long: not a configuration"),
        });
    }
    let text = std::fs::read(path).map_err(ModelError::io("read", path))?;
    serde_json::from_slice(&text)
        .map_err(|e| ModelError::File { path: path.into(), what: format!("is not JSON: {e}") })
}

impl Files {
    fn open(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index = folder.join(INDEX);
        let mut files = Files { paths: Vec::new(), files: Vec::new(), tensors: BTreeMap::new() };
        if is_file(&single)? {
            files.add(single, None)?;
            return Ok(files);
        }
        if !is_file(&index)? {
            let mut what = "has no model.safetensors and no model.safetensors.index.json".to_owned();
            if folder.join("pytorch_model.bin").is_file()
                || folder.join("pytorch_model.bin.index.json").is_file()
            {
                what.push_str("; pytorch_model.bin is not read: save the model as safetensors");
            }
            return Err(ModelError::File { path: folder.into(), what });
        }
        let json = read_json(&index)?;
        let broken = |what: String| ModelError::File { path: index.clone(), what };
        let map = json.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| broken("has no weight_map".into()))?;
        if map.is_empty() {
            return Err(broken("has a weight_map without tensors".into()));
        }
        let mut by_file: BTreeMap<&str, HashSet<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            let file =
                file.as_str().ok_or_else(|| broken(format!("weight_map.{tensor} is not a file name")))?;
            if Path::new(file).file_name().is_none_or(|name| name != file) {
                return Err(broken(format!("weight_map.{tensor} = \"{file}\" is not a file beside it")));
            }
            by_file.entry(file).or_default().insert(tensor);
        }
        for (file, tensors) in by_file {
            files.add(folder.join(file), Some(&tensors))?;
        }
        Ok(files)
    }

    /// Reads the header of a file; with an index, it must hold just the tensors that the index says.
    fn add(&mut self, path: PathBuf, expected: Option<&HashSet<&str>>) -> Result<()> {
        let broken = |what: String| ModelError::File { path: path.clone(), what };
        let mut file = File::open(&path).map_err(ModelError::io("read", &path))?;
        let size = file.metadata().map_err(ModelError::io("read", &path))?.len();
        let mut length = [0; 8];
        if size < 8 {
            return Err(broken(format!("is cut short: {size} bytes are no safetensors file")));
        }
        file.read_exact(&mut length).map_err(ModelError::io("read", &path))?;
        let header = u64::from_le_bytes(length);
        if header > MAX_HEADER {
            return Err(broken(format!("says its header has {header} bytes: not a safetensors file")));
        }
        if 8 + header > size {
            return Err(broken(format!(
                "is cut short: {size} bytes, its header alone ends at {}",
                8 + header
            )));
        }
        let mut text = vec![0; header as usize];
        file.read_exact(&mut text).map_err(ModelError::io("read", &path))?;
        let json: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|e| broken(format!("has a header that is not JSON: {e}")))?;
        let number = self.paths.len();
        let mut found = 0;
        let mut ranges = Vec::new();
        for (name, info) in json.iter().filter(|(name, _)| *name != "__metadata__") {
            let tensor = |what: String| ModelError::Tensor { path: path.clone(), tensor: name.clone(), what };
            let dtype = match info.get("dtype").and_then(Value::as_str) {
                Some("F32") => Dtype::F32,
                Some("F16") => Dtype::F16,
                Some("BF16") => Dtype::Bf16,
                other => {
                    let other = other.unwrap_or("missing");
                    return Err(tensor(format!("its type is {other}; F32, F16 and BF16 can be read")));
                }
            };
            let numbers = |key: &str| -> Option<Vec<u64>> {
                info.get(key)?.as_array()?.iter().map(Value::as_u64).collect()
            };
            let shape = numbers("shape").ok_or_else(|| tensor("its shape is not a list of sizes".into()))?;
            let offsets = numbers("data_offsets").unwrap_or_default();
            let &[start, end] = offsets.as_slice() else {
                return Err(tensor("its data_offsets are not two numbers".into()));
            };
            let elements = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n));
            let bytes = elements.and_then(|n| n.checked_mul(dtype.size() as u64));
            if start > end || bytes != Some(end - start) {
                return Err(tensor(format!("its shape {shape:?} does not fit bytes {start} to {end}")));
            }
            if end > size - 8 - header {
                return Err(tensor(format!(
                    "the file is cut short: it ends at byte {}, its header says {end}",
                    size - 8 - header
                )));
            }
            if expected.is_some_and(|expected| !expected.contains(&name.as_str())) {
                return Err(tensor("the index does not say that it is in this file".into()));
            }
            ranges.push((start, end, name));
            let shape = shape.into_iter().map(|n| n as usize).collect();
            let entry = Entry { file: number, dtype, shape, start: 8 + header + start };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(tensor("is in two files".into()));
            }
            found += 1;
        }
        // The format has no gaps, no overlaps and nothing behind the last tensor: any of them is a broken file.
        ranges.sort_unstable();
        let mut at = 0;
        for (start, end, name) in ranges {
            if start != at {
                let what = format!("begins at byte {start} of the data, the tensor before it ends at {at}");
                return Err(ModelError::Tensor { path, tensor: name.clone(), what });
            }
            at = end;
        }
        if at != size - 8 - header {
            let what = format!("holds {} bytes behind its last tensor", size - 8 - header - at);
            return Err(ModelError::File { path, what });
        }
        if let Some(expected) = expected
            && found != expected.len()
        {
            let missing = expected.iter().find(|name| !json.contains_key(**name)).unwrap_or(&"");
            let (tensor, what) =
                (missing.to_string(), "the index says it is in this file, and it is not".into());
            return Err(ModelError::Tensor { path, tensor, what });
        }
        self.paths.push(path);
        self.files.push(file);
        Ok(())
    }

    /// Reads the elements of a tensor, which is known to be there and to have as many.
    pub fn read(&self, tensor: &str, into: &mut [f32]) -> Result<()> {
        let Some(entry) = self.tensors.get(tensor) else {
            return Err(ModelError::Internal { what: format!("tensor {tensor} was not audited") });
        };
        let (file, path) = (&self.files[entry.file], &self.paths[entry.file]);
        let per_chunk = 1 << 18;
        let mut bytes = vec![0; per_chunk.min(into.len()) * entry.dtype.size()];
        let mut at = entry.start;
        for chunk in into.chunks_mut(per_chunk) {
            let bytes = &mut bytes[..chunk.len() * entry.dtype.size()];
            read_at(file, bytes, at).map_err(ModelError::io("read", path))?;
            at += bytes.len() as u64;
            match entry.dtype {
                Dtype::F32 => {
                    for (x, b) in chunk.iter_mut().zip(bytes.as_chunks::<4>().0) {
                        *x = f32::from_le_bytes(*b);
                    }
                }
                Dtype::F16 => {
                    for (x, b) in chunk.iter_mut().zip(bytes.as_chunks::<2>().0) {
                        *x = half::f16::from_le_bytes(*b).to_f32();
                    }
                }
                Dtype::Bf16 => {
                    for (x, b) in chunk.iter_mut().zip(bytes.as_chunks::<2>().0) {
                        *x = half::bf16::from_le_bytes(*b).to_f32();
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads a part of a parameter, in the parameter's order.
    pub fn read_part(&self, part: &Part, into: &mut [f32]) -> Result<()> {
        if part.order == Order::Straight {
            return self.read(&part.tensor, into);
        }
        let mut in_file = vec![0.0; into.len()];
        self.read(&part.tensor, &mut in_file)?;
        part.order.read(&part.shape, &in_file, into);
        Ok(())
    }

    /// The file that a tensor is in.
    pub fn path_of(&self, tensor: &str) -> PathBuf {
        let file = self.tensors.get(tensor).map_or(0, |entry| entry.file);
        self.paths.get(file).cloned().unwrap_or_default()
    }
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, at)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, into: &mut [u8], at: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(into)
}

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
    let bytes = |part: &Part| 4 * part.len();
    let mut shards: Vec<Vec<&Part>> = vec![Vec::new()];
    let mut filled = 0;
    for part in &parts {
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
                json!({ "dtype": "F32", "shape": part.shape, "data_offsets": [at, end] }),
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
            let mut buffer = Vec::new();
            for part in shard {
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
                for chunk in values.chunks(1 << 16) {
                    buffer.clear();
                    buffer.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
                    w.write_all(&buffer)?;
                }
            }
            Ok(())
        })?;
        written.insert(name);
    }
    if shards.len() > 1 {
        let total: usize = parts.iter().map(bytes).sum();
        let json = json!({ "metadata": { "total_size": total }, "weight_map": index });
        write_json(&folder.join(INDEX), &json)?;
        written.insert(INDEX.into());
    }
    remove_stale(folder, &written)?;
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
    write_json(&folder.join("generation_config.json"), &Value::Object(generation))?;
    write_json(&folder.join("config.json"), &config)?;
    Ok(family)
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

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let text = format!("{json:#}\n");
    write_whole(path, |w| w.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
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
