//! Models from one layout and type to another: folders in Hugging Face layout and GGUF, f32, f16, bf16 and blocks of integers.
//!
//! What stays in its type stays in its bits. One layer at a time is looked at, so that a model larger than memory passes.

mod folder;
mod gguf_file;

use crate::audit::{self, Audit};
use crate::checkpoint::{Found, Memory, by_param, find, weight};
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::names::Part;
use crate::params::{ParamDef, param_defs};
use crate::sources::{Source, source};
use folder::into_folder;
use gguf_file::into_gguf;
use rayon::prelude::*;
use senmon_kernels::blocks::{ElementType, quantize};
use senmon_kernels::elements::Matrix;
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
                    Weight::Packed(_) => {
                        let what = format!("{} is packed: only what is stored is written", def.name);
                        return Err(ModelError::Internal { what });
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
