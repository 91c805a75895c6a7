//! Models from one layout and type to another: folders in Hugging Face layout and GGUF, f32, f16, bf16 and blocks of integers.
//!
//! What stays in its type stays in its bits. One layer at a time is looked at, so that a model larger than memory passes.

use crate::audit::{self, Audit};
use crate::chat;
use crate::checkpoint::{Found, Layout, Memory, by_param, find, weight};
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::families;
use crate::gguf;
use crate::names::{Part, parts};
use crate::params::{ParamDef, param_defs};
use crate::save::{SHARD, generation_config, write_json, write_weights};
use crate::sources::{Source, source};
use crate::text::TokenizerSource;
use rayon::prelude::*;
use senmon_gguf::{Value as Key, Writer, split};
use senmon_kernels::blocks::{ElementType, quantize};
use senmon_kernels::elements::Matrix;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The types that a model is written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Types {
    /// Those that it has, but that blocks which lie in another order are decoded (DeepSeek's keys in GGUF). In a folder, what is in blocks becomes the narrowest float that holds it: bf16 for MXFP4, else f32.
    #[default]
    Keep,
    /// Matrices in this type, the head in Q6_K where that is Q4_K; Q8_0, or else F16, where rows are no whole blocks of it. Norms, biases and
    /// routers are F32 in GGUF. In a folder only floats, and what is no matrix stays as it is.
    Matrices(ElementType),
}

impl Types {
    /// The types by name: `keep`, `f32`, `f16`, `bf16`, `q8_0`, `q4_k`.
    pub fn named(name: &str) -> Option<Self> {
        use ElementType::{Bf16, F16, F32, Q4K, Q8_0};
        if name == "keep" {
            return Some(Types::Keep);
        }
        [F32, F16, Bf16, Q8_0, Q4K]
            .into_iter()
            .find(|ty| ty.name().eq_ignore_ascii_case(name))
            .map(Types::Matrices)
    }
}

/// What came of a conversion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The layout that was written.
    pub layout: String,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of tensors.
    pub bytes: u64,
    /// Tensors by type.
    pub types: Vec<(&'static str, usize)>,
    /// What the layout could not say, without changing what the model computes where it is used within it.
    pub notes: Vec<String>,
}

/// How far a conversion is: bytes done, of how many. False ends it.
pub type Progress<'a> = dyn Fn(u64, u64) -> bool + Sync + 'a;

/// Writes the model at `from` to `to`: to GGUF if its name ends so, else to a folder. Nothing is there before it is whole.
///
/// `family` is the Hugging Face family of a folder, or `auto`.
pub fn convert(
    from: &Path,
    to: &Path,
    types: Types,
    family: &str,
    audit: Audit,
    progress: &Progress,
) -> Result<Report> {
    if to.exists() {
        let what = "is there already: name another place, or remove it".into();
        return Err(ModelError::File { path: to.into(), what });
    }
    let found = find(from, false)?;
    if audit == Audit::Full || audit == Audit::Once && !audit::passed(&found.files) {
        found.audit()?;
        audit::remember(&found.files);
    }
    let to_gguf = to.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    match (to_gguf, types) {
        (true, _) => into_gguf(from, &found, to, types, progress),
        (false, Types::Matrices(ty)) if ty.block_len() > 1 => Err(ModelError::Option {
            what: format!("{} is a type of GGUF: name a file that ends in .gguf", ty.name()),
        }),
        (false, _) => into_folder(from, &found, to, types, family, progress),
    }
}

/// A tensor to be written: the parts of one parameter that it is made of, in its order.
struct Tensor<'a> {
    parts: Vec<&'a Part>,
    ty: ElementType,
}

impl Tensor<'_> {
    fn first(&self) -> &Part {
        self.parts[0]
    }

    fn elements(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }
}

/// The parameters of a model as they are read, those of a layer at a time.
struct Params<'a> {
    found: &'a Found,
    defs: Vec<ParamDef>,
    /// For each parameter of what is written, the one that is read.
    from: Vec<usize>,
    by_param: Vec<Vec<&'a Part>>,
    /// The layer whose parameters are held.
    layer: String,
    held: HashMap<usize, Weight>,
}

impl<'a> Params<'a> {
    /// `written` are the parameters of what is written: those of the model, and perhaps a head where the embedding is it.
    fn new(found: &'a Found, written: &[ParamDef]) -> Result<Self> {
        let defs = param_defs(&found.spec);
        let index: HashMap<&str, usize> =
            defs.iter().enumerate().map(|(index, def)| (def.name.as_str(), index)).collect();
        let from = written.iter().map(|def| {
            let name = match index.contains_key(def.name.as_str()) {
                false if def.name == "head" => "embed",
                _ => &def.name,
            };
            let same = index.get(name).copied().filter(|index| defs[*index].shape == def.shape);
            same.ok_or_else(|| ModelError::Internal { what: format!("no parameter {name} to convert") })
        });
        let from = from.collect::<Result<Vec<_>>>()?;
        let by_param = by_param(defs.len(), &found.parts);
        Ok(Self { found, defs, from, by_param, layer: String::new(), held: HashMap::new() })
    }

    /// The parameter of what is written.
    fn get(&mut self, written: usize) -> Result<(&ParamDef, &Weight)> {
        let index = self.from[written];
        let def = &self.defs[index];
        let layer =
            def.name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()).unwrap_or(&def.name);
        if layer != self.layer {
            self.held.clear();
            self.layer = layer.to_owned();
        }
        if !self.held.contains_key(&index) {
            let parts = &self.by_param[index];
            self.held.insert(index, weight(def, parts, &self.found.files, &mut Memory::default())?);
        }
        Ok((def, &self.held[&index]))
    }

    /// The type that a part of what is written has where it is read, if it is one.
    fn type_of(&self, part: &Part) -> Result<Option<ElementType>> {
        let index = self.from[part.param];
        let range = part.offset..part.offset + part.len();
        let mut types = Vec::new();
        for from in &self.by_param[index] {
            if from.offset < range.end && range.start < from.offset + from.len() {
                types.push(match source(&self.found.files, from)?.0 {
                    Source::Numbers(_, ty) if ty.block_len() == 1 || from.order.keeps_rows() => ty,
                    Source::Mxfp4(..) => ElementType::Mxfp4,
                    _ => ElementType::F32,
                });
            }
        }
        types.dedup();
        Ok(match types.as_slice() {
            [one] => Some(*one),
            _ => None,
        })
    }

    /// Writes the elements of a part.
    fn write(&mut self, part: &Part, ty: ElementType, out: &mut dyn Write) -> Result<()> {
        let (def, weight) = self.get(part.param)?;
        let size = ty.row_bytes(part.len()).unwrap_or(0);
        let mut bytes = vec![0; size];
        match weight {
            Weight::Stored(stored) if part.order.keeps_rows() => {
                let cols = def.shape.last().copied().unwrap_or(1).max(1);
                let (first, row_bytes) = (part.offset / cols, ty.row_bytes(cols).unwrap_or(0));
                // Where each row is: its matrix, and its number in it.
                let matrices = stored.matrices();
                let mut starts = vec![0];
                starts.extend(matrices.iter().scan(0, |rows, matrix| {
                    *rows += matrix.rows;
                    Some(*rows)
                }));
                bytes.par_chunks_exact_mut(row_bytes.max(1)).enumerate().for_each(|(row, bytes)| {
                    let row = first + part.order.row(row);
                    let at = starts.partition_point(|start| *start <= row) - 1;
                    match matrices[at].raw_row(row - starts[at], ty) {
                        Some(raw) => bytes.copy_from_slice(raw),
                        None => {
                            let mut values = vec![0.0; cols];
                            matrices[at].row(row - starts[at], &mut values);
                            quantize(ty, &values, bytes);
                        }
                    }
                });
            }
            weight => {
                let decoded;
                let values: &[f32] = match weight {
                    Weight::Values(values) => &values[part.offset..][..part.len()],
                    Weight::Stored(stored) => {
                        decoded = rows(&stored.matrices(), def, part);
                        &decoded
                    }
                };
                let mut in_file = vec![0.0; values.len()];
                part.order.write(&part.shape, values, &mut in_file);
                quantize(ty, &in_file, &mut bytes);
            }
        }
        out.write_all(&bytes).map_err(ModelError::io("write", PathBuf::new()))
    }
}

/// The decoded rows of a part.
fn rows(matrices: &[Matrix], def: &ParamDef, part: &Part) -> Vec<f32> {
    let cols = def.shape.last().copied().unwrap_or(1).max(1);
    let (first, mut values) = (part.offset / cols, vec![0.0; part.len()]);
    let mut start = 0;
    for matrix in matrices {
        for (n, out) in values.chunks_exact_mut(cols).enumerate() {
            if let Some(row) = (first + n).checked_sub(start).filter(|row| *row < matrix.rows) {
                matrix.row(row, out);
            }
        }
        start += matrix.rows;
    }
    values
}

/// Counts bytes, and ends when it is told to.
struct Meter<'a> {
    done: u64,
    total: u64,
    progress: &'a Progress<'a>,
}

impl Meter<'_> {
    fn add(&mut self, bytes: usize) -> io::Result<()> {
        self.done += bytes as u64;
        match (self.progress)(self.done, self.total) {
            true => Ok(()),
            false => Err(io::ErrorKind::Interrupted.into()),
        }
    }
}

/// Errors pass through writers that know only those of files.
fn as_io(error: ModelError) -> io::Error {
    match error {
        ModelError::Io { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

fn by_type(tensors: &[Tensor]) -> Vec<(&'static str, usize)> {
    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    for ty in ElementType::ALL {
        let count = tensors.iter().filter(|tensor| tensor.ty == ty).count();
        if count > 0 {
            counts.push((ty.name(), count));
        }
    }
    counts
}

/// The type of most elements.
fn commonest(tensors: &[Tensor]) -> Option<ElementType> {
    ElementType::ALL.into_iter().max_by_key(|ty| {
        tensors.iter().filter(|tensor| tensor.ty == *ty).map(Tensor::elements).sum::<usize>()
    })
}

fn bytes_of(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|tensor| tensor.ty.row_bytes(tensor.elements()).unwrap_or(0) as u64).sum()
}

fn into_gguf(from: &Path, found: &Found, to: &Path, types: Types, progress: &Progress) -> Result<Report> {
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

fn into_folder(
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
