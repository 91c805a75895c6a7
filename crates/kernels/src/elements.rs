//! Weights as they lie in memory or in a file: matrices whose rows are decoded when they are used.

pub use crate::blocks::ElementType;
use crate::blocks::dequantize;

/// Elements in memory.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// Ready for use.
    F32(&'a [f32]),
    /// As in a file.
    Coded(ElementType, &'a [u8]),
}

/// A weight \[rows, cols\] that is multiplied from the right, transposed: `y = x · Wᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The elements of all rows.
    pub data: Elements<'a>,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// From one row to the next: elements of `F32`, bytes of `Coded`.
    pub stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after another in memory.
    pub fn plain(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix of {rows} rows and {cols} columns");
        Self { data: Elements::F32(data), rows, cols, stride: cols }
    }

    /// Rows as in a file, `stride` bytes apart. Panics where `bytes` are too few, or a row is no whole number of blocks.
    pub fn coded(ty: ElementType, bytes: &'a [u8], rows: usize, cols: usize, stride: usize) -> Self {
        let row = ty.row_bytes(cols).expect("rows are whole blocks");
        assert!(
            stride >= row && (rows == 0 || bytes.len() >= (rows - 1) * stride + row),
            "rows of {row} bytes"
        );
        Self { data: Elements::Coded(ty, bytes), rows, cols, stride }
    }

    /// Some of its rows.
    pub fn some(self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "{rows:?} of {} rows", self.rows);
        let at = rows.start * self.stride;
        let data = match self.data {
            Elements::F32(data) => Elements::F32(&data[at.min(data.len())..]),
            Elements::Coded(ty, bytes) => Elements::Coded(ty, &bytes[at.min(bytes.len())..]),
        };
        Self { data, rows: rows.len(), ..self }
    }

    /// The matrices \[rows, cols\] that lie one after another in `data`.
    pub fn each(data: &'a [f32], rows: usize, cols: usize) -> Vec<Self> {
        match rows * cols {
            0 => Vec::new(),
            size => data.chunks_exact(size).map(|data| Self::plain(data, rows, cols)).collect(),
        }
    }

    /// Decodes a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {}", self.rows);
        match self.data {
            Elements::F32(data) => out.copy_from_slice(&data[row * self.stride..][..self.cols]),
            Elements::Coded(ty, bytes) => {
                let len = ty.row_bytes(self.cols).unwrap_or(0);
                dequantize(ty, &bytes[row * self.stride..][..len], out);
            }
        }
    }

    /// The bytes of row `row`, if its elements are stored as `ty`.
    pub fn raw_row(&self, row: usize, ty: ElementType) -> Option<&'a [u8]> {
        match self.data {
            Elements::Coded(own, bytes) if own == ty && row < self.rows => {
                bytes.get(row * self.stride..)?.get(..ty.row_bytes(self.cols)?)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_decoded_where_they_lie() {
        let numbers = [1.5f32, -2.0, 0.25, 8.0, -0.5, 3.0];
        let brain: Vec<u8> =
            numbers.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let m = Matrix::coded(ElementType::Bf16, &brain, 3, 2, 4);
        let mut row = [0.0; 2];
        m.some(1..3).row(1, &mut row);
        assert_eq!(row, [-0.5, 3.0]);
        // Every other row.
        let m = Matrix::coded(ElementType::Bf16, &brain, 2, 2, 8);
        m.row(1, &mut row);
        assert_eq!(row, [-0.5, 3.0]);
        Matrix::each(&numbers, 1, 2)[1].row(0, &mut row);
        assert_eq!(row, [0.25, 8.0]);
    }
}
