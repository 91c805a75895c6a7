//! The tensors of a checkpoint in safetensors: one file, or several with an index, mapped into memory.

use crate::error::{ModelError, Result};
use crate::files::is_file;
use senmon_files::Mapped;
use senmon_kernels::blocks::{ElementType, dequantize};
use senmon_moe::stored::Bytes;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// The types that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    /// Numbers of their own.
    Element(ElementType),
    /// 8-bit floats, which mean something with scales beside them.
    F8E4m3,
    /// Bytes: packed 4-bit floats, or their scales.
    U8,
}

impl Dtype {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Dtype::Element(ElementType::F32),
            "F16" => Dtype::Element(ElementType::F16),
            "BF16" => Dtype::Element(ElementType::Bf16),
            "F8_E4M3" => Dtype::F8E4m3,
            "U8" => Dtype::U8,
            _ => return None,
        })
    }

    fn size(self) -> usize {
        match self {
            Dtype::Element(element) => element.block_bytes(),
            Dtype::F8E4m3 | Dtype::U8 => 1,
        }
    }

    /// Its name in a file.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Element(element) => element.name(),
            Dtype::F8E4m3 => "F8_E4M3",
            Dtype::U8 => "U8",
        }
    }
}

/// The mapped files of a checkpoint and what is in them.
pub(crate) struct Files {
    pub paths: Vec<PathBuf>,
    maps: Vec<Arc<Mapped>>,
    pub tensors: BTreeMap<String, Entry>,
}

/// Greatest size of the header of a safetensors file, as the format has it.
const MAX_HEADER: u64 = 100_000_000;
/// Greatest size of a JSON file that is read.
const MAX_JSON: u64 = 100_000_000;
/// Says which tensor is in which file.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
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
    /// No files yet.
    pub fn none() -> Self {
        Files { paths: Vec::new(), maps: Vec::new(), tensors: BTreeMap::new() }
    }

    /// Maps a file, without looking at what is in it.
    pub fn map(&mut self, path: PathBuf) -> Result<Arc<Mapped>> {
        let file = File::open(&path).map_err(ModelError::io("read", &path))?;
        let map = Arc::new(senmon_files::map(&file).map_err(ModelError::io("read", &path))?);
        self.paths.push(path);
        self.maps.push(map.clone());
        Ok(map)
    }

    /// Puts in a tensor of a GGUF file that is mapped.
    pub fn put(&mut self, file: usize, tensor: senmon_gguf::Tensor) {
        let dtype = Dtype::Element(tensor.element_type);
        self.tensors.insert(tensor.name, Entry { file, dtype, shape: tensor.shape, range: tensor.range });
    }

    /// The files of a folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index = folder.join(INDEX);
        let mut files = Self::none();
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
        let file = File::open(&path).map_err(ModelError::io("read", &path))?;
        let map = match file.metadata().map_err(ModelError::io("read", &path))?.len() {
            size @ 0..8 => {
                return Err(broken(format!("is cut short: {size} bytes are no safetensors file")));
            }
            _ => senmon_files::map(&file).map_err(ModelError::io("read", &path))?,
        };
        let (size, header) = match map.first_chunk() {
            Some(length) => (map.len() as u64, u64::from_le_bytes(*length)),
            None => return Err(broken("is cut short: no safetensors file".into())),
        };
        if header > MAX_HEADER {
            return Err(broken(format!("says its header has {header} bytes: not a safetensors file")));
        }
        if 8 + header > size {
            return Err(broken(format!(
                "is cut short: {size} bytes, its header alone ends at {}",
                8 + header
            )));
        }
        let json: Map<String, Value> = serde_json::from_slice(&map[8..8 + header as usize])
            .map_err(|e| broken(format!("has a header that is not JSON: {e}")))?;
        let number = self.paths.len();
        let mut found = 0;
        let mut ranges = Vec::new();
        for (name, info) in json.iter().filter(|(name, _)| *name != "__metadata__") {
            let tensor = |what: String| ModelError::Tensor { path: path.clone(), tensor: name.clone(), what };
            let dtype = info.get("dtype").and_then(Value::as_str).unwrap_or("missing");
            let dtype = Dtype::of(dtype).ok_or_else(|| {
                tensor(format!("its type is {dtype}; F32, F16, BF16, F8_E4M3 and U8 can be read"))
            })?;
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
            let range = (8 + header + start) as usize..(8 + header + end) as usize;
            let entry = Entry { file: number, dtype, shape, range };
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
        self.maps.push(Arc::new(map));
        Ok(())
    }

    /// A tensor that is known to be there.
    pub fn entry(&self, tensor: &str) -> Result<&Entry> {
        self.tensors
            .get(tensor)
            .ok_or_else(|| ModelError::Internal { what: format!("tensor {tensor} was not audited") })
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.maps[entry.file][entry.range.clone()]
    }

    /// The bytes of all of a tensor's file, for weights that stay in it.
    pub fn all_bytes(&self, entry: &Entry) -> Bytes {
        self.maps[entry.file].clone()
    }

    /// Decodes a tensor of numbers.
    pub fn decode(&self, tensor: &str, into: &mut [f32]) -> Result<()> {
        let entry = self.entry(tensor)?;
        let Dtype::Element(ty) = entry.dtype else {
            return Err(self.refuse(
                tensor,
                format!("its type is {}, which is no number by itself", entry.dtype.name()),
            ));
        };
        self.decode_entry(tensor, entry, ty, into)
    }

    /// Decodes what lies at an entry.
    pub fn decode_entry(&self, tensor: &str, entry: &Entry, ty: ElementType, into: &mut [f32]) -> Result<()> {
        let bytes = self.bytes(entry);
        if ty.row_bytes(into.len()) != Some(bytes.len()) {
            return Err(ModelError::Internal { what: format!("tensor {tensor} was not audited") });
        }
        dequantize(ty, bytes, into);
        Ok(())
    }

    /// An error about a tensor.
    pub fn refuse(&self, tensor: &str, what: String) -> ModelError {
        ModelError::Tensor { path: self.path_of(tensor), tensor: tensor.into(), what }
    }

    /// The file that a tensor is in.
    pub fn path_of(&self, tensor: &str) -> PathBuf {
        let file = self.tensors.get(tensor).map_or(0, |entry| entry.file);
        self.paths.get(file).cloned().unwrap_or_default()
    }
}
