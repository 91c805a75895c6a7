//! Reading a file: header, metadata, what tensors there are and where.

use std::collections::HashMap;
use std::ops::Range;

use senmon_kernels::blocks::{ElementType, ggml_type_name};

use crate::bytes::{Bad, Bytes};
use crate::error::{GgufError, Result, shown};
use crate::metadata::Metadata;
use crate::value;
use crate::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_DIMS};

/// What is in a file.
#[derive(Clone, Debug)]
pub struct Gguf {
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its shape, the dimension along which elements lie side by side last: the other way round than in ggml.
    pub shape: Vec<usize>,
    /// The type of its elements; the last dimension is whole blocks of it.
    pub element_type: ElementType,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

impl Tensor {
    /// Its bytes among all those of its file.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> Option<&'a [u8]> {
        file.get(self.range.clone())
    }
}

impl Gguf {
    /// Reads what is in a file from all its bytes; those of tensors are not looked at.
    pub fn read(file: &[u8]) -> Result<Self> {
        let mut bytes = Bytes::new(file);
        let version = header(&mut bytes)?;
        let end = |_: Bad| GgufError::file("the file ends within its header: it is cut short");
        // A name of no bytes, no dimensions, type and place; a key of no bytes, a type and a byte.
        let (tensor_count, key_count) = (bytes.u64().map_err(end)?, bytes.u64().map_err(end)?);
        let fits = |count: u64, each: usize| count <= (bytes.left() / each) as u64;
        if !fits(tensor_count, 24) || !fits(key_count, 13) {
            return Err(GgufError::file(format!(
                "the header promises {key_count} keys and {tensor_count} tensors, more than the {} bytes of the file can \
                 hold: it is cut short or damaged",
                file.len()
            )));
        }
        let metadata = read_metadata(&mut bytes, key_count)?;
        let alignment = alignment(&metadata)?;
        let described =
            (0..tensor_count).map(|i| Description::read(&mut bytes, i)).collect::<Result<Vec<_>>>()?;
        let start = (bytes.at() as u64).checked_next_multiple_of(alignment);
        let tensors = described
            .into_iter()
            .map(|tensor| tensor.place(start, alignment, file.len()))
            .collect::<Result<Vec<_>>>()?;
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), i).is_some() {
                return Err(GgufError::tensor(&tensor.name, "is there twice"));
            }
        }
        refuse_overlap(&tensors)?;
        Ok(Self { version, alignment, metadata, tensors, by_name })
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What the places of tensors are multiples of.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Values by key.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|i| &self.tensors[*i])
    }

    /// Metadata and tensors, to keep.
    pub fn into_parts(self) -> (Metadata, Vec<Tensor>) {
        (self.metadata, self.tensors)
    }
}

/// Magic and version.
fn header(bytes: &mut Bytes) -> Result<u32> {
    match bytes.array() {
        Ok([b'G', b'G', b'U', b'F']) => {}
        Ok([b'l', b'm', b'g', b'g'] | [b'f', b'm', b'g', b'g'] | [b't', b'j', b'g', b'g']) => {
            return Err(GgufError::file(
                "it is in the format that came before GGUF: convert the model again",
            ));
        }
        Ok(other) => {
            return Err(GgufError::file(format!(
                "it is not a GGUF file: begins with \"{}\", expected \"GGUF\"",
                other.escape_ascii()
            )));
        }
        Err(_) => return Err(GgufError::file("it is not a GGUF file: it has fewer than 4 bytes")),
    }
    let version =
        bytes.u32().map_err(|_| GgufError::file("the file ends within its header: it is cut short"))?;
    match version {
        2 | 3 => Ok(version),
        // The bytes of a small number the other way round.
        v if v & 0xffff == 0 && (1..=0xffff).contains(&v.swap_bytes()) => Err(GgufError::file(
            "it is big endian, only little endian is read: convert it with gguf_convert_endian.py of llama.cpp",
        )),
        1 => Err(GgufError::file("it is GGUF version 1, versions 2 and 3 are read: convert the model again")),
        other => Err(GgufError::file(format!("it is GGUF version {other}, versions 2 and 3 are read"))),
    }
}

fn read_metadata(bytes: &mut Bytes, count: u64) -> Result<Metadata> {
    let mut metadata = Metadata::default();
    for i in 0..count {
        let at = |bad: Bad| GgufError::file(format!("the name of key {} of {count}: {}", i + 1, bad.what()));
        let key = bytes.text().map_err(at)?;
        if key.is_empty() {
            return Err(GgufError::file(format!("key {} of {count} has no name", i + 1)));
        }
        let value = value::read(bytes).map_err(|bad| GgufError::key(key, bad.what()))?;
        metadata.add(key.to_owned(), value).map_err(|key| GgufError::key(&key, "is there twice"))?;
    }
    Ok(metadata)
}

/// What the places of tensors are multiples of.
pub(crate) fn alignment(metadata: &Metadata) -> Result<u64> {
    let alignment = metadata.find(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() {
        return Err(GgufError::key(ALIGNMENT_KEY, format!("is {alignment}, expected a power of two")));
    }
    Ok(alignment)
}

/// What a file says of a tensor.
struct Description {
    name: String,
    shape: Vec<usize>,
    element_type: ElementType,
    bytes: usize,
    /// From the beginning of all tensors.
    offset: u64,
}

impl Description {
    fn read(bytes: &mut Bytes, i: u64) -> Result<Self> {
        let name = bytes
            .text()
            .map_err(|bad| GgufError::file(format!("the name of tensor {}: {}", i + 1, bad.what())))?;
        let wrong = |what: String| GgufError::tensor(name, what);
        let bad = |bad: Bad| wrong(bad.what().to_owned());
        let dims = bytes.u32().map_err(bad)? as usize;
        if dims > MAX_DIMS {
            return Err(wrong(format!("has {dims} dimensions, expected at most {MAX_DIMS}")));
        }
        let mut shape = (0..dims).map(|_| bytes.u64().map_err(bad)).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        let (id, offset) = (bytes.u32().map_err(bad)?, bytes.u64().map_err(bad)?);
        let element_type = ElementType::from_ggml_id(id).ok_or_else(|| match ggml_type_name(id) {
            Some(other) => wrong(format!("has elements of type {other}, which Senmon does not read")),
            None => wrong(format!("has elements of the unknown type {id}")),
        })?;
        let too_large = || wrong(format!("has shape {shape:?}, more than memory can hold"));
        let sizes: Option<Vec<usize>> = shape.iter().map(|n| usize::try_from(*n).ok()).collect();
        let sizes = sizes.ok_or_else(too_large)?;
        let cols = sizes.last().copied().unwrap_or(1);
        if !cols.is_multiple_of(element_type.block_len()) {
            return Err(wrong(format!(
                "has shape {shape:?}, expected rows of whole blocks of {} for {element_type}",
                element_type.block_len()
            )));
        }
        let elements = sizes.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
        let size = elements.and_then(|n| element_type.row_bytes(n)).ok_or_else(too_large)?;
        Ok(Self { name: name.to_owned(), shape: sizes, element_type, bytes: size, offset })
    }

    /// Where it lies in a file of `len` bytes whose tensors begin at `start`.
    fn place(self, start: Option<u64>, alignment: u64, len: usize) -> Result<Tensor> {
        if !self.offset.is_multiple_of(alignment) {
            return Err(GgufError::tensor(
                &self.name,
                format!("begins at {}, expected a multiple of the alignment {alignment}", self.offset),
            ));
        }
        let first = start.and_then(|start| usize::try_from(start.checked_add(self.offset)?).ok());
        let range = first.and_then(|first| Some(first..first.checked_add(self.bytes)?));
        // A tensor of nothing may be placed behind the last byte of a file that is not padded.
        let range = range.filter(|range| range.end <= len || self.bytes == 0);
        let Some(range) = range else {
            return Err(GgufError::tensor(
                &self.name,
                format!(
                    "has {} bytes from {} on, the file has {len}: it is cut short or damaged",
                    self.bytes,
                    first.map_or_else(|| "beyond all memory".to_owned(), |first| first.to_string())
                ),
            ));
        };
        let range = if self.bytes == 0 { range.start.min(len)..range.start.min(len) } else { range };
        Ok(Tensor { name: self.name, shape: self.shape, element_type: self.element_type, range })
    }
}

fn refuse_overlap(tensors: &[Tensor]) -> Result<()> {
    let mut order: Vec<&Tensor> = tensors.iter().filter(|tensor| !tensor.range.is_empty()).collect();
    order.sort_by_key(|tensor| tensor.range.start);
    for pair in order.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(GgufError::tensor(
                &pair[1].name,
                format!("shares bytes with tensor {}: the file is damaged", shown(&pair[0].name)),
            ));
        }
    }
    Ok(())
}
