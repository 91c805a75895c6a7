//! Activations in the form that packed weights are multiplied with.

use super::{CHUNK, Format};
use crate::by_level;
use crate::pool::{self, Shared};
use crate::simd::{Dots, Level};
use std::marker::PhantomData;

/// Rows that one task brings to their form.
const ROWS: usize = 16;
/// Bytes behind each row: rows a multiple of 4 KiB apart would fall into one set of the first-level cache.
const PAD: usize = 64;

/// Rows of activations \[M, K\] for the products with weights of one format.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    k: usize,
    /// Elements: f32, bf16 or 8 bits, `stride` bytes from row to row.
    elements: Vec<u64>,
    stride: usize,
    /// Of 8-bit elements: a scale for each 32 or 256, `groups` of them a row.
    scales: Vec<f32>,
    groups: usize,
    /// What the sums of groups start from, `starts_stride` a row: minus the zero of the codes times the sum of the elements; for
    /// Q4_K the sums of 32 elements in 16 bits, two beside each other.
    starts: Vec<i32>,
    starts_stride: usize,
}

/// What the elements of activations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    /// Rounded to bf16, but held as f32, for levels without dot products of bf16.
    Rounded,
    Bf16,
    Bits8,
}

pub(super) fn form(level: Level, format: Format) -> Form {
    match format {
        Format::F32 => Form::F32,
        Format::Bf16 if Dots::of(level).bf16 => Form::Bf16,
        Format::Bf16 => Form::Rounded,
        _ => Form::Bits8,
    }
}

impl Activations {
    /// Brings `x` \[M, K\] to the form that weights of `format` are multiplied with at `level`.
    pub fn new(level: Level, format: Format, x: &[f32], k: usize) -> Self {
        let mut this = Self::default();
        this.fill(level, format, x, k);
        this
    }

    /// [`new`](Self::new), in memory that is there.
    pub fn fill(&mut self, level: Level, format: Format, x: &[f32], k: usize) {
        assert!(format.fits(k), "rows of {k} elements for weights in {format:?}");
        assert!(x.len().is_multiple_of(k), "{} elements are no rows of {k}", x.len());
        let rows = x.len() / k;
        self.shape(level, format, rows, k);
        let shares = self.shares();
        pool::for_each(rows.div_ceil(ROWS), |block| {
            for row in block * ROWS..rows.min((block + 1) * ROWS) {
                // SAFETY: a row is one task's.
                unsafe { shares.fill(level, format, row, &x[row * k..][..k]) };
            }
        });
    }

    /// Space for `rows` rows, whose elements are whatever they were.
    pub(super) fn shape(&mut self, level: Level, format: Format, rows: usize, k: usize) {
        let size = match form(level, format) {
            Form::F32 | Form::Rounded => 4,
            Form::Bf16 => 2,
            Form::Bits8 => 1,
        };
        // Of bf16 a last element without a partner has 0 beside it.
        let elements = if size == 2 { k.next_multiple_of(2) } else { k };
        self.stride = (elements * size).next_multiple_of(8) + PAD;
        (self.rows, self.k) = (rows, k);
        (self.groups, self.starts_stride) = match format {
            Format::F32 | Format::Bf16 => (0, 0),
            Format::Q8_0 | Format::Q4_0 | Format::Mxfp4 => (k / 32, k / 32),
            Format::Q4K => (k / CHUNK, k / 64),
            Format::Q6K => (k / CHUNK, k / 16),
        };
        let grow = |len: usize, has: usize| len.max(has);
        self.elements.resize(grow(rows * self.stride / 8, self.elements.len()), 0);
        self.scales.resize(grow(rows * self.groups, self.scales.len()), 0.0);
        self.starts.resize(grow(rows * self.starts_stride, self.starts.len()), 0);
    }

    /// For tasks that fill rows of their own.
    pub(super) fn shares(&mut self) -> Shares<'_> {
        Shares {
            rows: self.rows,
            k: self.k,
            stride: self.stride,
            groups: self.groups,
            starts_stride: self.starts_stride,
            elements: Shared::new(&mut self.elements),
            scales: Shared::new(&mut self.scales),
            starts: Shared::new(&mut self.starts),
        }
    }

    /// For those who read.
    pub(super) fn view(&self) -> View<'_> {
        View {
            rows: self.rows,
            k: self.k,
            stride: self.stride,
            groups: self.groups,
            starts_stride: self.starts_stride,
            elements: self.elements.as_ptr(),
            scales: self.scales.as_ptr(),
            starts: self.starts.as_ptr(),
            lifetime: PhantomData,
        }
    }
}

/// Activations as kernels read them: of a row that is still being written nothing may be read.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub rows: usize,
    pub k: usize,
    stride: usize,
    pub groups: usize,
    pub starts_stride: usize,
    elements: *const u64,
    scales: *const f32,
    starts: *const i32,
    lifetime: PhantomData<&'a Activations>,
}

// SAFETY: a view only gives pointers; who reads through them while others write promises to read finished rows alone.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl View<'_> {
    /// Where the elements of a row begin.
    pub fn row(&self, row: usize) -> *const u8 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.elements.wrapping_add(row * self.stride / 8).cast()
    }

    /// Where the scales of a row begin.
    pub fn scales(&self, row: usize) -> *const f32 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.scales.wrapping_add(row * self.groups)
    }

    /// Where the starts of a row begin.
    pub fn starts(&self, row: usize) -> *const i32 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.starts.wrapping_add(row * self.starts_stride)
    }
}

/// The parts of activations that tasks write, each its rows.
#[derive(Clone, Copy)]
pub(super) struct Shares<'a> {
    rows: usize,
    k: usize,
    stride: usize,
    groups: usize,
    starts_stride: usize,
    elements: Shared<'a, u64>,
    scales: Shared<'a, f32>,
    starts: Shared<'a, i32>,
}

impl<'a> Shares<'a> {
    /// For those who read rows that are finished.
    pub fn view(&self) -> View<'a> {
        View {
            rows: self.rows,
            k: self.k,
            stride: self.stride,
            groups: self.groups,
            starts_stride: self.starts_stride,
            elements: self.elements.as_ptr(),
            scales: self.scales.as_ptr(),
            starts: self.starts.as_ptr(),
            lifetime: PhantomData,
        }
    }

    /// Fills a row from `x` \[K\].
    ///
    /// # Safety
    /// No other thread fills or reads that row meanwhile.
    pub unsafe fn fill(&self, level: Level, format: Format, row: usize, x: &[f32]) {
        assert_eq!(x.len(), self.k, "a row of {}", self.k);
        // SAFETY: rows do not overlap, and this one is the caller's.
        let (elements, scales, starts) = unsafe {
            (
                self.elements.part(row * self.stride / 8, self.stride / 8),
                self.scales.part(row * self.groups, self.groups),
                self.starts.part(row * self.starts_stride, self.starts_stride),
            )
        };
        let bytes: *mut u8 = elements.as_mut_ptr().cast();
        let len = self.stride - PAD;
        match form(level, format) {
            Form::F32 | Form::Rounded => {
                // SAFETY: the row has `4·k` bytes at least, and the alignment of a u64.
                let to = unsafe { std::slice::from_raw_parts_mut(bytes.cast::<f32>(), self.k) };
                match format {
                    Format::F32 => to.copy_from_slice(x),
                    _ => round(level, x, to),
                }
            }
            Form::Bf16 => {
                // SAFETY: as above, with two bytes an element.
                let to = unsafe { std::slice::from_raw_parts_mut(bytes.cast::<u16>(), len / 2) };
                to[self.k..].fill(0);
                narrow(level, x, &mut to[..self.k]);
            }
            Form::Bits8 => {
                // SAFETY: as above, with one byte an element.
                let to = unsafe { std::slice::from_raw_parts_mut(bytes.cast::<i8>(), self.k) };
                match format {
                    Format::Q4K => {
                        eight_bits_256(level, x, to, scales);
                        for (two, start) in to.as_chunks::<64>().0.iter().zip(starts) {
                            let sum = |x: &[i8]| x.iter().map(|x| i32::from(*x)).sum::<i32>();
                            *start = sum(&two[..32]) & 0xffff | sum(&two[32..]) << 16;
                        }
                    }
                    Format::Q6K => {
                        eight_bits_256(level, x, to, scales);
                        sums::<16>(level, to, -32, starts);
                    }
                    _ => {
                        eight_bits_32(level, x, to, scales);
                        sums::<32>(level, to, -format.zero(), starts);
                    }
                }
            }
        }
    }
}

/// The bits of the bf16 that is nearest, ties to even; a NaN stays one.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

by_level! {
    fn narrow(x: &[f32], to: &mut [u16]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = nearest(*x) as u16;
        }
    }
}

by_level! {
    fn round(x: &[f32], to: &mut [f32]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = f32::from_bits(nearest(*x) << 16);
        }
    }
}

by_level! {
    /// 8 bits with a scale for 32 elements.
    fn eight_bits_32(x: &[f32], to: &mut [i8], scales: &mut [f32]) {
        for ((x, to), scale) in x.as_chunks::<32>().0.iter().zip(to.as_chunks_mut::<32>().0).zip(scales) {
            *scale = eight_bits::<32>(x, to);
        }
    }
}

by_level! {
    /// 8 bits with a scale for 256 elements.
    fn eight_bits_256(x: &[f32], to: &mut [i8], scales: &mut [f32]) {
        for ((x, to), scale) in x.as_chunks::<256>().0.iter().zip(to.as_chunks_mut::<256>().0).zip(scales) {
            *scale = eight_bits::<256>(x, to);
        }
    }
}

/// The scale with which the furthest element becomes ±127; not a number where some element is not finite.
#[inline(always)]
fn eight_bits<const N: usize>(x: &[f32; N], to: &mut [i8; N]) -> f32 {
    let (mut most, mut odd) = ([0.0f32; 16], [0.0f32; 16]);
    for part in x.as_chunks::<16>().0 {
        for i in 0..16 {
            let size = part[i].abs();
            most[i] = if size > most[i] { size } else { most[i] };
            odd[i] += part[i] * 0.0;
        }
    }
    let furthest = most.iter().fold(0.0f32, |m, x| if *x > m { *x } else { m });
    let by = if furthest > 0.0 { 127.0 / furthest } else { 0.0 };
    for i in 0..N {
        // Adding and taking away 1.5·2²³ rounds to the nearest integer; the integer is in the low bits.
        const ROUND: f32 = 12_582_912.0;
        to[i] = (x[i] * by + ROUND).to_bits() as i8;
    }
    furthest / 127.0 + odd.iter().sum::<f32>()
}

/// `by` times the sum of each `N` elements.
fn sums<const N: usize>(level: Level, x: &[i8], by: i32, to: &mut [i32]) {
    by_level! {
        fn of_16(x: &[i8], by: i32, to: &mut [i32]) {
            for (x, to) in x.as_chunks::<16>().0.iter().zip(to) {
                *to = by * x.iter().map(|x| i32::from(*x)).sum::<i32>();
            }
        }
    }
    by_level! {
        fn of_32(x: &[i8], by: i32, to: &mut [i32]) {
            for (x, to) in x.as_chunks::<32>().0.iter().zip(to) {
                *to = by * x.iter().map(|x| i32::from(*x)).sum::<i32>();
            }
        }
    }
    match N {
        16 => of_16(level, x, by, to),
        _ => of_32(level, x, by, to),
    }
}
