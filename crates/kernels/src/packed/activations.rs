//! Activations in the form that packed weights are multiplied with.
//!
//! Elements lie by chunks of k: the first 256 of all rows, then the next 256 of all rows. What a kernel reads of many rows at
//! once is then close together, on few pages of memory.

use super::{CHUNK, Format};
use crate::by_level;
use crate::pool::{self, Shared};
use crate::simd::{Dots, Level};
use std::marker::PhantomData;

/// Rows that one task brings to their form.
const ROWS: usize = 16;

/// Rows of activations \[M, K\] for the products with weights of one format.
#[derive(Debug, Default)]
pub struct Activations {
    shape: Layout,
    /// Elements: f32, bf16 or 8 bits, \[chunks, M, 256\].
    elements: Vec<u64>,
    /// Of 8-bit elements: a scale for each 32 or 256, \[chunks, M, scales of a chunk\].
    scales: Vec<f32>,
    /// What the sums of groups start from, \[chunks, M, starts of a chunk\]: minus the zero of the codes times the sum of the
    /// elements; for Q4_K the sums of 32 elements in 16 bits, two beside each other.
    starts: Vec<i32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    rows: usize,
    k: usize,
    /// Bytes of an element.
    size: usize,
    /// Scales and starts of a chunk.
    scales: usize,
    starts: usize,
}

impl Layout {
    fn of(level: Level, format: Format, rows: usize, k: usize) -> Self {
        let size = match form(level, format) {
            Form::F32 | Form::Rounded => 4,
            Form::Bf16 => 2,
            Form::Bits8 => 1,
        };
        let (scales, starts) = match format {
            Format::F32 | Format::F16 | Format::Bf16 => (0, 0),
            Format::Q8_0 | Format::Q4_0 | Format::Mxfp4 => (8, 8),
            Format::Q4K => (1, 4),
            Format::Q6K => (1, 16),
        };
        Self { rows, k, size, scales, starts }
    }

    fn chunks(&self) -> usize {
        self.k.div_ceil(CHUNK)
    }
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
        Format::F32 | Format::F16 => Form::F32,
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
        self.shape = Layout::of(level, format, rows, k);
        let (shape, all) = (self.shape, self.shape.chunks() * rows);
        let grow = |len: usize, has: usize| len.max(has);
        self.elements.resize(grow(all * CHUNK * shape.size / 8, self.elements.len()), 0);
        self.scales.resize(grow(all * shape.scales, self.scales.len()), 0.0);
        self.starts.resize(grow(all * shape.starts, self.starts.len()), 0);
    }

    /// For tasks that fill rows of their own.
    pub(super) fn shares(&mut self) -> Shares<'_> {
        Shares {
            shape: self.shape,
            elements: Shared::new(&mut self.elements),
            scales: Shared::new(&mut self.scales),
            starts: Shared::new(&mut self.starts),
        }
    }

    /// For those who read.
    pub(super) fn view(&self) -> View<'_> {
        View {
            shape: self.shape,
            elements: self.elements.as_ptr().cast(),
            scales: self.scales.as_ptr(),
            starts: self.starts.as_ptr(),
            lifetime: PhantomData,
        }
    }
}

/// Activations as kernels read them: of a row that is still being written nothing may be read.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    shape: Layout,
    elements: *const u8,
    scales: *const f32,
    starts: *const i32,
    lifetime: PhantomData<&'a Activations>,
}

// SAFETY: a view only gives pointers; who reads through them while others write promises to read finished rows alone.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl View<'_> {
    /// M.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// K.
    pub fn k(&self) -> usize {
        self.shape.k
    }

    /// Panics where these are not activations for `format` at `level`.
    pub fn check(&self, level: Level, format: Format) {
        let Layout { size, scales, starts, .. } = Layout::of(level, format, 0, 0);
        let own = self.shape;
        assert_eq!((own.size, own.scales, own.starts), (size, scales, starts), "activations for {format:?}");
    }

    /// Bytes from a chunk of a row to the next chunk of it.
    pub fn chunk_stride(&self) -> usize {
        self.shape.rows * CHUNK * self.shape.size
    }

    /// The elements of a row in a chunk.
    pub fn elements(&self, chunk: usize, row: usize) -> *const u8 {
        self.elements.wrapping_add((chunk * self.shape.rows + row) * CHUNK * self.shape.size)
    }

    /// Its scales.
    pub fn scales(&self, chunk: usize, row: usize) -> *const f32 {
        self.scales.wrapping_add((chunk * self.shape.rows + row) * self.shape.scales)
    }

    /// Its starts.
    pub fn starts(&self, chunk: usize, row: usize) -> *const i32 {
        self.starts.wrapping_add((chunk * self.shape.rows + row) * self.shape.starts)
    }
}

/// The parts of activations that tasks write, each its rows.
#[derive(Clone, Copy)]
pub(super) struct Shares<'a> {
    shape: Layout,
    elements: Shared<'a, u64>,
    scales: Shared<'a, f32>,
    starts: Shared<'a, i32>,
}

impl<'a> Shares<'a> {
    /// For those who read rows that are finished.
    pub fn view(&self) -> View<'a> {
        View {
            shape: self.shape,
            elements: self.elements.as_ptr().cast(),
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
        let s = self.shape;
        assert!(x.len() == s.k && row < s.rows, "row {row} of {}, {} elements", s.rows, x.len());
        for (chunk, x) in x.chunks(CHUNK).enumerate() {
            let at = chunk * s.rows + row;
            let words = CHUNK * s.size / 8;
            // SAFETY: chunks of rows do not overlap, and this row is the caller's.
            let (elements, scales, starts) = unsafe {
                (
                    self.elements.part(at * words, words),
                    self.scales.part(at * s.scales, s.scales),
                    self.starts.part(at * s.starts, s.starts),
                )
            };
            let bytes: *mut u8 = elements.as_mut_ptr().cast();
            match form(level, format) {
                Form::F32 | Form::Rounded => {
                    // SAFETY: the chunk has 256 elements of four bytes, aligned as a u64.
                    let to = unsafe { std::slice::from_raw_parts_mut(bytes.cast::<f32>(), x.len()) };
                    match format {
                        Format::Bf16 => round(level, x, to),
                        _ => to.copy_from_slice(x),
                    }
                }
                Form::Bf16 => {
                    // SAFETY: as above, of two bytes.
                    let to = unsafe { std::slice::from_raw_parts_mut(bytes.cast::<u16>(), CHUNK) };
                    narrow(level, x, &mut to[..x.len()]);
                    // A last element without a partner has 0 beside it.
                    to[x.len()..].iter_mut().take(1).for_each(|to| *to = 0);
                }
                Form::Bits8 => {
                    // SAFETY: as above, of one byte.
                    let to = unsafe { std::slice::from_raw_parts_mut(bytes.cast::<i8>(), x.len()) };
                    match format {
                        Format::Q4K => {
                            eight_bits_256(level, x, to, scales);
                            sums_of_64(level, to, starts);
                        }
                        Format::Q6K => {
                            eight_bits_256(level, x, to, scales);
                            sums_of_16(level, to, -32, starts);
                        }
                        _ => {
                            eight_bits_32(level, x, to, scales);
                            sums_of_32(level, to, -format.zero(), starts);
                        }
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

/// The scale with which the furthest element becomes ±127; not finite where some element is not.
#[inline(always)]
fn eight_bits<const N: usize>(x: &[f32; N], to: &mut [i8; N]) -> f32 {
    // By bits what is not finite is furthest.
    let mut most = [0u32; 16];
    for part in x.as_chunks::<16>().0 {
        for i in 0..16 {
            most[i] = most[i].max(part[i].to_bits() & 0x7fff_ffff);
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            most[i] = most[i].max(most[i + half]);
        }
    }
    let furthest = f32::from_bits(most[0]);
    let by = if furthest == 0.0 { 0.0 } else { 127.0 / furthest };
    for i in 0..N {
        // Adding 1.5·2²³ rounds to the nearest integer, which is then in the low bits.
        const ROUND: f32 = 12_582_912.0;
        to[i] = (x[i] * by + ROUND).to_bits() as i8;
    }
    furthest / 127.0
}

by_level! {
    /// `by` times the sums of 16 elements each.
    fn sums_of_16(x: &[i8], by: i32, to: &mut [i32]) {
        for (x, to) in x.as_chunks::<16>().0.iter().zip(to) {
            *to = by * x.iter().map(|x| i32::from(*x)).sum::<i32>();
        }
    }
}

by_level! {
    /// `by` times the sums of 32 elements each.
    fn sums_of_32(x: &[i8], by: i32, to: &mut [i32]) {
        for (x, to) in x.as_chunks::<32>().0.iter().zip(to) {
            *to = by * x.iter().map(|x| i32::from(*x)).sum::<i32>();
        }
    }
}

by_level! {
    /// The sums of 32 elements each in 16 bits, two beside each other.
    fn sums_of_64(x: &[i8], to: &mut [i32]) {
        for (x, to) in x.as_chunks::<64>().0.iter().zip(to) {
            let (low, high) = x.split_at(32);
            let sum = |x: &[i8]| x.iter().map(|x| i32::from(*x)).sum::<i32>();
            *to = sum(low) & 0xffff | sum(high) << 16;
        }
    }
}
