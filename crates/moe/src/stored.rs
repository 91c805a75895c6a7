//! Weights that stay as they are in a file: matrices whose rows are decoded when they are multiplied. They have no gradient.

use crate::error::{MoeError, Result};
use candle_core::{Device, Tensor};
use senmon_files::Region;
use senmon_kernels::elements::{ElementType, Matrix};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Bytes that several weights lie in: a file that is mapped, or memory.
pub type Bytes = Arc<dyn Region>;

/// A matrix \[rows, cols\] among some bytes.
#[derive(Clone)]
pub struct StoredMatrix {
    /// Where it lies.
    pub bytes: Bytes,
    /// Its bytes among them.
    pub range: Range<usize>,
    /// The type of its elements.
    pub ty: ElementType,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
}

impl fmt::Debug for StoredMatrix {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} [{}, {}] at {:?}", self.ty.name(), self.rows, self.cols, self.range)
    }
}

impl StoredMatrix {
    /// Rows one after another.
    pub fn new(bytes: Bytes, range: Range<usize>, ty: ElementType, rows: usize, cols: usize) -> Self {
        let stride = ty.row_bytes(cols).unwrap_or(0);
        Self { bytes, range, ty, rows, cols, stride }
    }

    fn fits(&self) -> bool {
        let row = self.ty.row_bytes(self.cols);
        let within = (*self.bytes).as_ref().get(self.range.clone()).map(<[u8]>::len);
        row.zip(within).is_some_and(|(row, within)| {
            self.stride >= row && (self.rows == 0 || within >= (self.rows - 1) * self.stride + row)
        })
    }

    fn matrix(&self) -> Matrix<'_> {
        let bytes = &(*self.bytes).as_ref()[self.range.clone()];
        Matrix::coded(self.ty, bytes, self.rows, self.cols, self.stride)
    }
}

/// A weight \[.., R, C\] made of matrices of C columns, whose rows one after another are its rows.
#[derive(Debug)]
pub struct Stored {
    shape: Vec<usize>,
    parts: Vec<StoredMatrix>,
    decoded: OnceLock<Tensor>,
}

impl Stored {
    /// A weight of these matrices.
    pub fn new(shape: &[usize], parts: Vec<StoredMatrix>) -> Result<Self> {
        let cols = shape.last().copied().unwrap_or(0);
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        let whole = parts.iter().all(|part| part.cols == cols && part.fits());
        if !whole || rows * cols != shape.iter().product::<usize>() {
            let expected = format!("{shape:?}, of matrices of {cols} columns");
            return Err(MoeError::Shape { what: "a stored weight", found: vec![rows, cols], expected });
        }
        Ok(Self { shape: shape.to_vec(), parts, decoded: OnceLock::new() })
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What it is made of.
    pub fn parts(&self) -> &[StoredMatrix] {
        &self.parts
    }

    /// Its matrices.
    pub fn matrices(&self) -> Vec<Matrix<'_>> {
        self.parts.iter().map(StoredMatrix::matrix).collect()
    }

    /// All values, decoded.
    pub fn values(&self) -> Vec<f32> {
        let cols = self.shape.last().copied().unwrap_or(0);
        let mut values = vec![0.0; self.shape.iter().product()];
        let mut rows = values.chunks_exact_mut(cols.max(1));
        for matrix in self.matrices() {
            for (row, out) in (0..matrix.rows).zip(&mut rows) {
                matrix.row(row, out);
            }
        }
        values
    }

    /// All values as a tensor, decoded once and kept: for ops that have no other way.
    pub(crate) fn tensor(&self) -> &Tensor {
        self.decoded.get_or_init(|| {
            let tensor = Tensor::from_vec(self.values(), self.shape.as_slice(), &Device::Cpu);
            tensor.expect("there are as many values as the shape has")
        })
    }
}
