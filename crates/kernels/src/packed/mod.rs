//! Weights packed once, at load, and the products with them: from one row of activations to thousands.
//!
//! A weight \[N, K\] is cut into panels of 16 rows of it (16 columns of the result). A cache line of a panel holds what
//! one instruction multiplies: 16 numbers of one k in f32, 16 pairs of k in bf16, 16 quads of k in 8 bits or two times
//! 16 quads in 4 bits. So the same loop serves one row, which streams the panel from memory, and many, which meet it in
//! the caches; and the bits of a row of the result do not depend on how many rows there are.
//!
//! Coded weights stay what they are: their codes are only put in another order. Activations are brought to the form that
//! a format is multiplied with once for all products that share them: rounded to bf16, or to 8 bits
//! with a scale for 32 elements (Q8_0, Q4_0, MXFP4) or 256 (Q4_K, Q6_K). Sums of 8-bit products are exact in 32 bits; what
//! is done with them in f32 is done in the order of k.

mod activations;
mod experts;
mod floats;
mod ints;
mod pack;
mod product;
mod unpack;

pub use experts::{Expert, MlpBiases, mlp};
pub use pack::pack;
pub use product::{Linear, linear};

use crate::blocks::ElementType;

/// Columns of a panel.
pub const PANEL: usize = 16;
/// Elements of k in a chunk of a coded panel.
pub(crate) const CHUNK: usize = 256;

/// How a packed weight holds its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Single precision.
    F32,
    /// Half precision; activations stay in single.
    F16,
    /// The upper half of it.
    Bf16,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 4 bits, a scale for 32.
    Q4_0,
    /// 4 bits of floating point, a power of two for 32.
    Mxfp4,
    /// 4 bits, a scale and a minimum for 32, themselves coded for 256.
    Q4K,
    /// 6 bits, a scale for 16, itself coded for 256.
    Q6K,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 8] = [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Q8_0,
        Format::Q4_0,
        Format::Mxfp4,
        Format::Q4K,
        Format::Q6K,
    ];

    /// The format that holds elements of this type as they are.
    pub fn of(ty: ElementType) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.element_type() == ty)
    }

    /// The type of its elements.
    pub fn element_type(self) -> ElementType {
        match self {
            Format::F32 => ElementType::F32,
            Format::F16 => ElementType::F16,
            Format::Bf16 => ElementType::Bf16,
            Format::Q8_0 => ElementType::Q8_0,
            Format::Q4_0 => ElementType::Q4_0,
            Format::Mxfp4 => ElementType::Mxfp4,
            Format::Q4K => ElementType::Q4K,
            Format::Q6K => ElementType::Q6K,
        }
    }

    /// Whether sums of `k` elements can be made with it.
    pub fn fits(self, k: usize) -> bool {
        k > 0 && k.is_multiple_of(self.element_type().block_len())
    }

    /// Its elements are coded in at most 8 bits.
    pub(crate) fn is_coded(self) -> bool {
        !matches!(self, Format::F32 | Format::F16 | Format::Bf16)
    }

    /// What an 8-bit code of 0 stands for, below zero; the codes of Q4_K begin at their minimum.
    pub(crate) fn zero(self) -> i32 {
        match self {
            Format::Q8_0 => 128,
            Format::Q4_0 => 8,
            Format::Mxfp4 => 12,
            Format::Q6K => 32,
            Format::F32 | Format::F16 | Format::Bf16 | Format::Q4K => 0,
        }
    }

    /// Bytes of a chunk of `len` elements of k of a coded panel: whole cache lines.
    pub(crate) fn chunk_bytes(self, len: usize) -> usize {
        let groups = len / 32;
        let bytes = match self {
            Format::F32 | Format::F16 | Format::Bf16 => 0,
            Format::Q8_0 => groups * (512 + 32),
            Format::Q4_0 => groups * (256 + 32),
            Format::Mxfp4 => groups * (256 + 16),
            Format::Q4K => groups * 256 + 192 + 64,
            Format::Q6K => groups * 384 + 256 + 32,
        };
        bytes.next_multiple_of(64)
    }

    /// Bytes of a panel.
    pub fn panel_bytes(self, k: usize) -> usize {
        match self {
            Format::F32 => k * 64,
            Format::F16 => k * 32,
            Format::Bf16 => k.div_ceil(2) * 64,
            _ => match k % CHUNK {
                0 => k / CHUNK * self.chunk_bytes(CHUNK),
                rest => k / CHUNK * self.chunk_bytes(CHUNK) + self.chunk_bytes(rest),
            },
        }
    }

    /// Bytes of a packed weight \[n, k\].
    pub fn bytes(self, n: usize, k: usize) -> usize {
        n.div_ceil(PANEL) * self.panel_bytes(k)
    }
}

/// A packed weight \[N, K\].
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    format: Format,
    n: usize,
    k: usize,
    data: &'a [u8],
}

impl<'a> Packed<'a> {
    /// What [`pack`] made. Panics where `data` has another length than such a weight.
    pub fn new(format: Format, n: usize, k: usize, data: &'a [u8]) -> Self {
        assert!(format.fits(k), "sums of {k} elements in {format:?}");
        assert_eq!(data.len(), format.bytes(n, k), "a packed weight [{n}, {k}] in {format:?}");
        Self { format, n, k, data }
    }

    /// How its elements are held.
    pub fn format(&self) -> Format {
        self.format
    }

    /// N.
    pub fn n(&self) -> usize {
        self.n
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Panels.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Decodes a row: the values that were packed.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row {row} of {}", self.n);
        pack::unpack_row(self.format, self.k, self.panel(row / PANEL), row % PANEL, out);
    }

    /// The bytes of a panel.
    fn panel(&self, index: usize) -> &'a [u8] {
        let size = self.format.panel_bytes(self.k);
        &self.data[index * size..][..size]
    }
}

#[cfg(test)]
mod tests;
