//! Where the values of a part of a parameter come from: a tensor of numbers, 8-bit floats with scales for blocks of 128 × 128
//! (as DeepSeek publishes), or packed 4-bit floats with scales (as gpt-oss has its experts).

use crate::error::{ModelError, Result};
use crate::names::{Order, Part};
use crate::tensor_files::{Dtype, Entry, Files};
use senmon_kernels::blocks::{ElementType, dequantize, fp8_e4m3_to_f32};
use senmon_moe::stored::{Bytes, StoredMatrix};
use std::sync::Arc;

/// Side of the blocks that share a scale.
const FP8_BLOCK: usize = 128;
/// Elements of four bits that share a scale.
const FP4_BLOCK: usize = 32;

/// Where a part comes from.
#[derive(Clone)]
pub(crate) enum Source<'a> {
    /// A tensor of numbers, or one of a stack of them.
    Numbers(Entry, ElementType),
    /// \[R, C\] 8-bit floats and \[R / 128, C / 128\] factors.
    Fp8(&'a Entry, &'a Entry),
    /// \[E, rows, cols / 32, 16\] bytes, and \[E, rows, cols / 32\] scales.
    Mxfp4(&'a Entry, &'a Entry),
}

/// The names of the tensors that a part may be made of: itself, and what may be there beside or instead of it.
fn companions(tensor: &str) -> [String; 3] {
    [format!("{tensor}_scale_inv"), format!("{tensor}_blocks"), format!("{tensor}_scales")]
}

/// The source of a part, with the right shape; and the names of its tensors.
pub(crate) fn source<'a>(files: &'a Files, part: &Part) -> Result<(Source<'a>, Vec<String>)> {
    let [fp8, blocks, scales] = companions(&part.tensor);
    let get = |name: &str| files.tensors.get(name);
    let same = |name: &str, entry: &Entry, expected: &[usize]| {
        if entry.shape == expected {
            return Ok(());
        }
        let mut turned = entry.shape.clone();
        turned.reverse();
        let hint = if turned == expected { ": it is transposed" } else { "" };
        Err(files.refuse(name, format!("has shape {:?}, the model's is {expected:?}{hint}", entry.shape)))
    };
    let of_type = |name: &str, entry: &Entry, dtype: Dtype| match entry.dtype == dtype {
        true => Ok(()),
        false => Err(files.refuse(name, format!("its type is {}, not {}", entry.dtype.name(), dtype.name()))),
    };
    if let Some(entry) = get(&part.tensor) {
        same(&part.tensor, entry, &part.whole_shape())?;
        return match (entry.dtype, get(&fp8)) {
            (Dtype::Element(ty), None) => {
                let mut entry = entry.clone();
                if let Some((number, count)) = part.stack {
                    let (size, first) = (entry.range.len() / count.max(1), entry.range.start);
                    entry.range = first + number * size..first + (number + 1) * size;
                    entry.shape.remove(0);
                }
                Ok((Source::Numbers(entry, ty), vec![part.tensor.clone()]))
            }
            (Dtype::F8E4m3, Some(factors)) => {
                let &[rows, cols] = part.shape.as_slice() else {
                    return Err(files.refuse(&part.tensor, "is no matrix, and of 8-bit floats".into()));
                };
                same(&fp8, factors, &[rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)])?;
                of_type(&fp8, factors, Dtype::Element(ElementType::F32))?;
                Ok((Source::Fp8(entry, factors), vec![part.tensor.clone(), fp8]))
            }
            (Dtype::F8E4m3, None) => {
                Err(files.refuse(&part.tensor, format!("is of 8-bit floats, and {fp8} is missing")))
            }
            (dtype, _) => {
                Err(files.refuse(&part.tensor, format!("its type is {}, which does not fit", dtype.name())))
            }
        };
    }
    if let (Some(packed), Some(powers), &[experts, inputs, outputs]) =
        (get(&blocks), get(&scales), part.shape.as_slice())
        && inputs.is_multiple_of(FP4_BLOCK)
    {
        same(&blocks, packed, &[experts, outputs, inputs / FP4_BLOCK, FP4_BLOCK / 2])?;
        same(&scales, powers, &[experts, outputs, inputs / FP4_BLOCK])?;
        of_type(&blocks, packed, Dtype::U8)?;
        of_type(&scales, powers, Dtype::U8)?;
        return Ok((Source::Mxfp4(packed, powers), vec![blocks, scales]));
    }
    Err(files.refuse(&part.tensor, "is missing".into()))
}

impl<'a> Source<'a> {
    /// The bytes of the source, of each of its tensors.
    pub fn bytes<'f>(&self, files: &'f Files) -> Vec<&'f [u8]> {
        match self {
            Source::Numbers(entry, _) => vec![files.bytes(entry)],
            Source::Fp8(a, b) | Source::Mxfp4(a, b) => vec![files.bytes(a), files.bytes(b)],
        }
    }

    /// A part is used where it lies.
    pub fn stays(&self, part: &Part) -> bool {
        matches!(self, Source::Numbers(..)) && part.order == Order::Straight
    }

    /// The values, in the order of the parameter.
    pub fn read(&self, files: &Files, part: &Part, into: &mut [f32]) -> Result<()> {
        match self {
            Source::Numbers(entry, ty) if part.order == Order::Straight => {
                files.decode_entry(&part.tensor, entry, *ty, into)
            }
            Source::Numbers(entry, ty) => {
                let mut in_file = vec![0.0; into.len()];
                files.decode_entry(&part.tensor, entry, *ty, &mut in_file)?;
                part.order.read(&part.shape, &in_file, into);
                Ok(())
            }
            Source::Fp8(entry, factors) => {
                let (rows, cols) = (part.shape[0], part.shape[1]);
                let scales = files.bytes(factors).as_chunks::<4>().0;
                let across = cols.div_ceil(FP8_BLOCK);
                let bytes = files.bytes(entry);
                for (r, row) in into.chunks_exact_mut(cols.max(1)).enumerate().take(rows) {
                    for (c, x) in row.iter_mut().enumerate() {
                        let scale = f32::from_le_bytes(scales[r / FP8_BLOCK * across + c / FP8_BLOCK]);
                        *x = fp8_e4m3_to_f32(bytes[r * cols + c]) * scale;
                    }
                }
                Ok(())
            }
            Source::Mxfp4(..) => {
                let mut at = 0;
                for matrix in self.store(files, part)? {
                    let bytes = &(*matrix.bytes).as_ref()[matrix.range.clone()];
                    dequantize(matrix.ty, bytes, &mut into[at..][..matrix.rows * matrix.cols]);
                    at += matrix.rows * matrix.cols;
                }
                Ok(())
            }
        }
    }

    /// The matrices of a part \[.., R, C\] of a parameter, as they are stored: where they lie in the file if that is the order of
    /// the parameter, else copied.
    pub fn store(&self, files: &Files, part: &Part) -> Result<Vec<StoredMatrix>> {
        let (rows, cols) = match *part.shape.as_slice() {
            [.., rows, cols] if part.order.keeps_rows() => (rows, cols),
            [.., cols, rows] => (rows, cols),
            _ => return Err(ModelError::Internal { what: format!("{} is no matrix", part.tensor) }),
        };
        let count = part.shape.iter().rev().skip(2).product::<usize>();
        let split = |bytes: Bytes, first: usize, ty: ElementType| -> Result<Vec<StoredMatrix>> {
            let size = ty.row_bytes(rows * cols).ok_or_else(|| {
                files.refuse(&part.tensor, format!("rows of {cols} are no whole blocks of {}", ty.name()))
            })?;
            let one = |n: usize| {
                let range = first + n * size..first + (n + 1) * size;
                StoredMatrix::new(bytes.clone(), range, ty, rows, cols)
            };
            Ok((0..count).map(one).collect())
        };
        match self {
            Source::Numbers(entry, ty) if part.order == Order::Straight => {
                split(files.all_bytes(entry), entry.range.start, *ty)
            }
            Source::Numbers(entry, ty) if part.order.keeps_rows() => {
                let bytes = files.bytes(entry);
                let size = (bytes.len() / (count * rows).max(1)).max(1);
                let mut moved = vec![0; bytes.len()];
                for (row, from) in bytes.chunks_exact(size).enumerate() {
                    moved[part.order.row(row) * size..][..size].copy_from_slice(from);
                }
                split(Arc::new(moved), 0, *ty)
            }
            // What is coded in blocks along one dimension cannot stay so along the other.
            Source::Numbers(_, ty) if ty.block_len() > 1 => self.as_numbers(files, part, &split),
            Source::Numbers(entry, ty) => {
                let (bytes, size) = (files.bytes(entry), ty.block_bytes());
                let mut turned = vec![0; bytes.len()];
                for (at, element) in bytes.chunks_exact(size).enumerate() {
                    let to = part.order.place(&part.shape, at) * size;
                    turned[to..to + size].copy_from_slice(element);
                }
                split(Arc::new(turned), 0, *ty)
            }
            Source::Fp8(..) => self.as_numbers(files, part, &split),
            Source::Mxfp4(packed, powers) => {
                let (packed, powers) = (files.bytes(packed), files.bytes(powers));
                let (per_row, size) = (cols / FP4_BLOCK, ElementType::Mxfp4.block_bytes());
                let mut bytes = vec![0; count * rows * per_row * size];
                for (row, blocks) in packed.chunks_exact((per_row * FP4_BLOCK / 2).max(1)).enumerate() {
                    let (expert, row_in) = (row / rows, row % rows);
                    let to = match part.order {
                        Order::TurnedByTurns => row_in / 2 + row_in % 2 * (rows / 2),
                        _ => row_in,
                    };
                    for (b, block) in blocks.as_chunks::<{ FP4_BLOCK / 2 }>().0.iter().enumerate() {
                        let out = &mut bytes[((expert * rows + to) * per_row + b) * size..][..size];
                        out[0] = powers[row * per_row + b];
                        // Neighbours share a byte in the file; here elements half a block apart do.
                        let nibble = |i: usize| block[i / 2] >> (4 * (i % 2)) & 15;
                        for i in 0..FP4_BLOCK / 2 {
                            out[1 + i] = nibble(i) | nibble(i + FP4_BLOCK / 2) << 4;
                        }
                    }
                }
                split(Arc::new(bytes), 0, ElementType::Mxfp4)
            }
        }
    }

    /// [`Source::store`] of the decoded values.
    fn as_numbers(
        &self,
        files: &Files,
        part: &Part,
        split: &dyn Fn(Bytes, usize, ElementType) -> Result<Vec<StoredMatrix>>,
    ) -> Result<Vec<StoredMatrix>> {
        let mut values = vec![0.0; part.len()];
        self.read(files, part, &mut values)?;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        split(Arc::new(bytes), 0, ElementType::F32)
    }
}
