//! Weights as they lie in a file: element types, and matrices whose rows are decoded when they are used.

/// The type of a weight's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `F32`.
    Bf16,
    /// Blocks of 32: a power of two, and for each element four bits (OCP Microscaling FP4), in GGUF's order: a byte's low bits
    /// are element i, its high bits element i + 16.
    Mxfp4,
}

impl ElementType {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "F32",
            ElementType::F16 => "F16",
            ElementType::Bf16 => "BF16",
            ElementType::Mxfp4 => "MXFP4",
        }
    }

    /// Elements that are coded together: rows are whole blocks.
    pub fn block_len(self) -> usize {
        if self == ElementType::Mxfp4 { 32 } else { 1 }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
            ElementType::Mxfp4 => 17,
        }
    }

    /// Bytes of `elements` elements, which are whole blocks; `None` where they are not, or too many.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let blocks = elements.is_multiple_of(self.block_len()).then(|| elements / self.block_len())?;
        blocks.checked_mul(self.block_bytes())
    }

    /// Decodes whole blocks. Panics where `out` has not as many elements as `bytes` codes.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(self.bytes(out.len()), Some(bytes.len()), "{} bytes of {}", bytes.len(), self.name());
        match self {
            ElementType::F32 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*b);
                }
            }
            ElementType::F16 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f16_to_f32(u16::from_le_bytes(*b));
                }
            }
            ElementType::Bf16 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                }
            }
            ElementType::Mxfp4 => {
                for (out, block) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<17>().0) {
                    let scale = e8m0_to_f32(block[0]);
                    for (i, byte) in block[1..].iter().enumerate() {
                        out[i] = scale * FP4[usize::from(byte & 15)];
                        out[i + 16] = scale * FP4[usize::from(byte >> 4)];
                    }
                }
            }
        }
    }
}

/// The values of four bits: a sign, two bits of exponent, one of fraction.
pub const FP4: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A power of two in eight bits: 2^(bits - 127); 255 is not a number.
pub fn e8m0_to_f32(bits: u8) -> f32 {
    match bits {
        // 2^-127 is subnormal.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(bits) << 23),
    }
}

/// Eight bits with four of exponent and three of fraction, without infinities (E4M3, "FN").
pub fn f8e4m3_to_f32(bits: u8) -> f32 {
    let (exponent, fraction) = (bits >> 3 & 15, f32::from(bits & 7));
    let value = match exponent {
        0 => fraction * f32::from_bits((127 - 9) << 23),
        15 if bits & 7 == 7 => f32::NAN,
        _ => (8.0 + fraction) * f32::from_bits((u32::from(exponent) + 127 - 10) << 23),
    };
    if bits & 0x80 != 0 { -value } else { value }
}

/// Half precision to single, exactly; without branches, so that loops of it vectorise.
#[inline(always)]
pub fn f16_to_f32(half: u16) -> f32 {
    let (sign, rest) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff));
    // The exponent's bias is 112 less; a product with a power of two puts it right for subnormal numbers too.
    let finite = f32::from_bits(rest << 13) * f32::from_bits(239 << 23);
    let special = (rest << 13) | 0x7f80_0000;
    f32::from_bits(sign | if rest >= 0x7c00 { special } else { finite.to_bits() })
}

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
        let row = ty.bytes(cols).expect("rows are whole blocks");
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
                let len = ty.bytes(self.cols).unwrap_or(0);
                ty.decode(&bytes[row * self.stride..][..len], out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_what_ieee_says() {
        for half in 0..=u16::MAX {
            let (sign, exponent, fraction) = (half >> 15, i32::from(half >> 10 & 31), f64::from(half & 1023));
            let value = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
            };
            let value = if sign == 1 { -value } else { value };
            let got = f16_to_f32(half);
            assert!(got as f64 == value || got.is_nan() && value.is_nan(), "{half:#x}: {got}, not {value}");
            assert_eq!(got.is_sign_negative(), sign == 1);
        }
    }

    #[test]
    fn small_floats_are_what_they_say() {
        for bits in 0..=255u8 {
            let power = 2f64.powi(i32::from(bits) - 127);
            assert!(bits == 255 && e8m0_to_f32(bits).is_nan() || e8m0_to_f32(bits) as f64 == power);
            let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
            let value = match exponent {
                0 => fraction / 8.0 * 2f64.powi(-6),
                _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
            };
            let (value, got) = (if bits > 127 { -value } else { value }, f8e4m3_to_f32(bits));
            assert!(
                bits & 127 == 127 && got.is_nan() || got as f64 == value,
                "{bits:#x}: {got}, not {value}"
            );
        }
        // 448 is the greatest E4M3.
        assert_eq!(f8e4m3_to_f32(0x7e), 448.0);
        // One block: scale 2, elements 0 to 15 of one kind, the others of another.
        let mut block = [0x2f; 17];
        block[0] = 128;
        let mut out = [0.0; 32];
        ElementType::Mxfp4.decode(&block, &mut out);
        assert!(out[..16].iter().all(|x| *x == -12.0) && out[16..].iter().all(|x| *x == 2.0));
    }

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
