//! Writing a file: metadata, what tensors there are, then their data one after another.

use std::collections::HashSet;
use std::io::{self, Write};

use senmon_kernels::blocks::ElementType;

use crate::error::{GgufError, Result};
use crate::metadata::Metadata;
use crate::value::{self, Value};
use crate::{MAX_DIMS, read};

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its shape, the dimension along which elements lie side by side last.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub element_type: ElementType,
    /// How many bytes its data have.
    pub bytes: usize,
}

/// A file to be: metadata and tensors in the order in which they are named here.
///
/// Names and shapes are within what ggml reads: see [`Writer::tensor`].
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    names: HashSet<String>,
}

/// Bytes that a name of a tensor has at most, in ggml.
const MAX_NAME: usize = 63;

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key. `general.alignment` has its effect, and must be a UINT32.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<&mut Self> {
        let value = value.into();
        if key.is_empty() || key.len() > 65535 {
            return Err(GgufError::key(key, format!("has {} bytes, expected 1 to 65535", key.len())));
        }
        if value::too_deep(&value) {
            return Err(GgufError::key(key, "has arrays in arrays too deep to be read"));
        }
        if key == crate::ALIGNMENT_KEY && !matches!(value, Value::U32(n) if n.is_power_of_two()) {
            return Err(GgufError::key(key, "expected a UINT32 that is a power of two"));
        }
        self.metadata.add(key.to_owned(), value).map_err(|key| GgufError::key(&key, "is set twice"))?;
        Ok(self)
    }

    /// Adds a tensor: a name of 1 to 63 bytes, at most four dimensions of at least 1, rows of whole blocks.
    pub fn tensor(&mut self, name: &str, shape: &[usize], element_type: ElementType) -> Result<&mut Self> {
        let wrong = |what: String| GgufError::tensor(name, what);
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(wrong(format!("its name has {} bytes, expected 1 to {MAX_NAME}", name.len())));
        }
        if shape.len() > MAX_DIMS || shape.contains(&0) {
            return Err(wrong(format!(
                "has shape {shape:?}, expected at most {MAX_DIMS} dimensions, none 0"
            )));
        }
        let unit = element_type.block_len();
        if !shape.last().unwrap_or(&1).is_multiple_of(unit) {
            return Err(wrong(format!(
                "has shape {shape:?}, expected rows of whole blocks of {unit} for {element_type}"
            )));
        }
        let elements = shape.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
        let bytes = elements.and_then(|n| element_type.row_bytes(n));
        let bytes = bytes.ok_or_else(|| wrong(format!("has shape {shape:?}, more than memory can hold")))?;
        if !self.names.insert(name.to_owned()) {
            return Err(wrong("is named twice".to_owned()));
        }
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.tensors.push(TensorInfo { name, shape, element_type, bytes });
        Ok(self)
    }

    /// The metadata so far.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors so far.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Writes the file; returns how many bytes it has. `data` is called for each tensor in order, and writes
    /// its bytes: exactly [`TensorInfo::bytes`] of them.
    pub fn write<W: Write>(
        &self,
        mut out: W,
        mut data: impl FnMut(&TensorInfo, &mut dyn Write) -> io::Result<()>,
    ) -> Result<u64> {
        let alignment = read::alignment(&self.metadata)?;
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            value::write_text(key, &mut head);
            value::write(value, &mut head);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            value::write_text(&tensor.name, &mut head);
            head.extend((tensor.shape.len() as u32).to_le_bytes());
            for n in tensor.shape.iter().rev() {
                head.extend((*n as u64).to_le_bytes());
            }
            head.extend(tensor.element_type.ggml_id().to_le_bytes());
            head.extend(offset.to_le_bytes());
            let next = offset.checked_add(tensor.bytes as u64);
            let next = next.and_then(|end| end.checked_next_multiple_of(alignment));
            offset =
                next.ok_or_else(|| GgufError::tensor(&tensor.name, "ends beyond what a file can have"))?;
        }
        out.write_all(&head)?;
        let mut written = head.len() as u64;
        written += pad(&mut out, written, alignment)?;
        for tensor in &self.tensors {
            let mut exact = Exact { out: &mut out, left: tensor.bytes as u64 };
            data(tensor, &mut exact)?;
            if exact.left > 0 {
                let what = format!("{} of {} bytes were not written", exact.left, tensor.bytes);
                return Err(GgufError::tensor(&tensor.name, what));
            }
            written += tensor.bytes as u64;
            written += pad(&mut out, written, alignment)?;
        }
        out.flush()?;
        Ok(written)
    }
}

/// Zeros up to the next multiple of the alignment.
fn pad(out: &mut impl Write, written: u64, alignment: u64) -> io::Result<u64> {
    let n = written.next_multiple_of(alignment) - written;
    io::copy(&mut io::Read::take(io::repeat(0), n), out)
}

/// Takes so many bytes and no more.
struct Exact<W> {
    out: W,
    left: u64,
}

impl<W: Write> Write for Exact<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(io::Error::other(format!(
                "{} bytes more than the tensor has",
                bytes.len() as u64 - self.left
            )));
        }
        let n = self.out.write(bytes)?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
