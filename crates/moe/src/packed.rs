//! Weights packed for fast products ([`senmon_kernels::packed`]). They have no gradient.

use crate::error::{MoeError, Result};
use crate::stored::Stored;
use candle_core::{Device, Tensor};
use senmon_files::Pages;
use senmon_kernels::elements::{ElementType, Matrix};
use senmon_kernels::packed::{Format, Packed, pack};
use std::sync::OnceLock;

/// A weight \[.., R, C\] as packed matrices of C columns, whose rows one after another are its rows.
#[derive(Debug)]
pub struct PackedWeight {
    shape: Vec<usize>,
    format: Format,
    /// Rows of each matrix.
    rows: Vec<usize>,
    memory: Pages,
    decoded: OnceLock<Tensor>,
}

/// How a weight can be packed: see [`PackedWeight::plan`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    format: Format,
    /// The matrices that are packed: part of the stored weight, first row in it, rows.
    pieces: Vec<(usize, usize, usize)>,
}

impl Plan {
    /// Bytes that it takes for sums of `k` elements.
    pub fn bytes(&self, k: usize) -> usize {
        self.pieces.iter().map(|(_, _, rows)| self.format.bytes(*rows, k)).sum()
    }
}

impl PackedWeight {
    /// How `stored` can be packed, as matrices of `rows` rows each (0: as it is stored): with its elements as they are, or coded
    /// to `to` where they are wider and rows are whole blocks of it. None where they are of several types or of one that has no
    /// packed form, or where a matrix lies in several parts.
    pub fn plan(stored: &Stored, rows: usize, to: Option<ElementType>) -> Option<Plan> {
        let k = stored.shape().last().copied().unwrap_or(0);
        let parts = stored.parts();
        let ty = parts.first()?.ty;
        let bits = |ty: ElementType| ty.block_bytes() * 8 * 256 / ty.block_len();
        let coded = to.filter(|to| bits(*to) < bits(ty)).and_then(Format::of).filter(|format| format.fits(k));
        let format = match coded {
            Some(format) => format,
            None if parts.iter().all(|part| part.ty == ty) => Format::of(ty)?,
            None => return None,
        };
        let mut pieces = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            let rows = if rows == 0 { part.rows } else { rows };
            if rows == 0 || !part.rows.is_multiple_of(rows) {
                return None;
            }
            pieces.extend((0..part.rows).step_by(rows).map(|first| (number, first, rows)));
        }
        format.fits(k).then_some(Plan { format, pieces })
    }

    /// Packs a weight, and lets go of the memory of the file that it was read from. An error where there is no memory for it.
    pub fn new(stored: &Stored, plan: &Plan) -> Result<Self> {
        let k = stored.shape().last().copied().unwrap_or(0);
        let bytes = plan.bytes(k);
        let mut memory = pages(bytes)?;
        let (matrices, mut rest) = (stored.matrices(), &mut memory[..]);
        for (at, (part, first, rows)) in plan.pieces.iter().enumerate() {
            let (out, behind) = rest.split_at_mut(plan.format.bytes(*rows, k));
            rest = behind;
            pack(plan.format, matrices[*part].some(*first..first + rows), out);
            if plan.pieces.get(at + 1).is_none_or(|(next, ..)| next != part) {
                let part = &stored.parts()[*part];
                part.bytes.release(part.range.clone());
            }
        }
        let rows = plan.pieces.iter().map(|(_, _, rows)| *rows).collect();
        Ok(Self {
            shape: stored.shape().to_vec(),
            format: plan.format,
            rows,
            memory,
            decoded: OnceLock::new(),
        })
    }

    /// Packs matrices of numbers \[rows, C\] each, coded to `format`. Panics where sums do not fit it.
    pub fn from_values(format: Format, shape: &[usize], rows: usize, values: &[f32]) -> Result<Self> {
        let k = shape.last().copied().unwrap_or(0);
        let matrices = Matrix::each(values, rows, k);
        let size = format.bytes(rows, k);
        let mut memory = pages(size * matrices.len())?;
        for (m, out) in matrices.iter().zip(memory.chunks_exact_mut(size)) {
            pack(format, *m, out);
        }
        let rows = vec![rows; matrices.len()];
        Ok(Self { shape: shape.to_vec(), format, rows, memory, decoded: OnceLock::new() })
    }

    /// A weight of matrices of `rows` rows whose bytes `fill` writes, for measurements: any bytes are some weight.
    pub fn from_bytes(
        format: Format,
        shape: &[usize],
        rows: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Self> {
        let (k, count) = (shape.last().copied().unwrap_or(0), shape.iter().rev().skip(1).product::<usize>());
        let rows = vec![rows; count / rows.max(1)];
        let mut memory = pages(rows.iter().map(|rows| format.bytes(*rows, k)).sum())?;
        fill(&mut memory);
        Ok(Self { shape: shape.to_vec(), format, rows, memory, decoded: OnceLock::new() })
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How its elements are held.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.rows.iter().map(|rows| self.format.bytes(*rows, self.columns())).sum()
    }

    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Its matrices.
    pub fn matrices(&self) -> Vec<Packed<'_>> {
        let (k, mut at) = (self.columns(), 0);
        let mut matrices = Vec::with_capacity(self.rows.len());
        for rows in &self.rows {
            let size = self.format.bytes(*rows, k);
            matrices.push(Packed::new(self.format, *rows, k, &self.memory[at..][..size]));
            at += size;
        }
        matrices
    }

    /// All values, decoded once and kept: for ops that have no other way.
    pub(crate) fn tensor(&self) -> &Tensor {
        self.decoded.get_or_init(|| {
            let mut values = vec![0.0; self.shape.iter().product()];
            let mut out = values.chunks_exact_mut(self.columns().max(1));
            for matrix in self.matrices() {
                (0..matrix.n()).zip(&mut out).for_each(|(row, out)| matrix.row(row, out));
            }
            let tensor = Tensor::from_vec(values, self.shape.as_slice(), &Device::Cpu);
            tensor.expect("there are as many values as the shape has")
        })
    }
}

/// Memory for packed weights.
fn pages(bytes: usize) -> Result<Pages> {
    Pages::zeroed(bytes)
        .map_err(|e| MoeError::Config { what: format!("no memory for {bytes} bytes of packed weights: {e}") })
}
