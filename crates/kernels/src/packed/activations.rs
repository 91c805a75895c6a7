//! Activations in the form that packed weights are multiplied with.
//!
//! They lie by chunks of k: the first 256 elements of all rows, then the next 256 of all rows. What a kernel reads of many rows
//! at once is then close together, on few pages of memory.

use super::{CHUNK, Format};
use crate::blocks::{bf16_to_f32, f32_to_bf16};
use crate::by_level;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;
use std::marker::PhantomData;

/// Rows that one task brings to their form.
const ROWS: usize = 16;
/// In a chunk of 8-bit elements, behind them: the scales, f32, one for each 32 elements or one for all.
pub(super) const SCALES: usize = CHUNK;
/// And behind those what the sums of groups start from, i32: minus the zero of the codes times the sum of the elements, and [`MAGIC`] where
/// there is a scale for each group; for Q4_K the sums of 32 elements in 16 bits, two beside each other.
pub(super) const STARTS: usize = SCALES + 32;
/// And behind those, where there is a scale for each group, minus 1.5·2²³ times the scale: not finite for activations from 3.4e33 on.
pub(super) const OFFSETS: usize = STARTS + 32;
/// The bits of 1.5·2²³: what is added to it as an integer, up to 2²² either way, is added to what it stands for as f32. So a sum that
/// starts there is a number without being made one: `sum · scale` is one multiply-add, exact but for its last rounding.
pub(super) const MAGIC: i32 = ROUND.to_bits() as i32;

/// Rows of activations \[M, K\] for the products with weights of one format.
#[derive(Debug, Default)]
pub(super) struct Activations {
    shape: Layout,
    /// \[chunks, M, bytes of a chunk\], in words.
    words: Vec<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Layout {
    /// What weights they are for.
    format: Option<Format>,
    rows: usize,
    k: usize,
    /// Bytes of a row's chunk.
    chunk: usize,
}

impl Layout {
    fn of(level: Level, format: Format, rows: usize, k: usize) -> Self {
        let chunk = match (form(level, format), format) {
            (Form::F32 | Form::Rounded, _) => 4 * CHUNK,
            (Form::Bf16, _) => 2 * CHUNK,
            (Form::Bits8, Format::Q6K) => STARTS + 64,
            (Form::Bits8, Format::Q4K) => STARTS + 32,
            (Form::Bits8, _) => OFFSETS + 32,
        };
        Self { format: Some(format), rows, k, chunk }
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
        Format::Bf16 if level.has_bf16_dots() => Form::Bf16,
        Format::Bf16 => Form::Rounded,
        _ => Form::Bits8,
    }
}

/// Bytes of a row of `k` elements.
pub(super) fn row_bytes(level: Level, format: Format, k: usize) -> usize {
    let layout = Layout::of(level, format, 1, k);
    layout.chunks() * layout.chunk
}

impl Activations {
    /// Brings `x` \[M, K\] to the form that weights of `format` are multiplied with at `level`.
    pub fn fill(&mut self, level: Level, format: Format, x: &[f32], k: usize) {
        let _span = profile::span("rounding of activations");
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
        let words = self.shape.chunks() * rows * self.shape.chunk / 8;
        self.words.resize(words.max(self.words.len()), 0);
    }

    /// For tasks that fill rows of their own.
    pub(super) fn shares(&mut self) -> Shares<'_> {
        Shares { shape: self.shape, words: Shared::new(&mut self.words) }
    }

    /// For those who read.
    pub(super) fn view(&self) -> View<'_> {
        View { shape: self.shape, start: self.words.as_ptr().cast(), lifetime: PhantomData }
    }
}

/// Activations as kernels read them: of a row that is still being written nothing may be read.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    shape: Layout,
    start: *const u8,
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
        let expected = Layout::of(level, format, self.shape.rows, self.shape.k);
        assert_eq!(self.shape, expected, "activations for {format:?}");
    }

    /// Bytes from a chunk of a row to the next chunk of it.
    pub fn chunk_stride(&self) -> usize {
        self.shape.rows * self.shape.chunk
    }

    /// A chunk of a row.
    pub fn chunk(&self, chunk: usize, row: usize) -> *const u8 {
        self.start.wrapping_add((chunk * self.shape.rows + row) * self.shape.chunk)
    }
}

/// The parts of activations that tasks write, each its rows.
#[derive(Clone, Copy)]
pub(super) struct Shares<'a> {
    shape: Layout,
    words: Shared<'a, u64>,
}

impl<'a> Shares<'a> {
    /// For those who read rows that are finished.
    pub fn view(&self) -> View<'a> {
        View { shape: self.shape, start: self.words.as_ptr().cast(), lifetime: PhantomData }
    }

    /// Fills a row from `x` \[K\].
    ///
    /// # Safety
    /// No other thread fills or reads that row meanwhile.
    pub unsafe fn fill(&self, level: Level, format: Format, row: usize, x: &[f32]) {
        let s = self.shape;
        assert!(x.len() == s.k && row < s.rows, "row {row} of {}, {} elements", s.rows, x.len());
        for (chunk, x) in x.chunks(CHUNK).enumerate() {
            let words = s.chunk / 8;
            // SAFETY: chunks of rows do not overlap, and this row is the caller's.
            let words = unsafe { self.words.part((chunk * s.rows + row) * words, words) };
            match form(level, format) {
                Form::F32 => numbers::<f32>(words, 0, x.len()).copy_from_slice(x),
                Form::Rounded => round(level, x, numbers(words, 0, x.len())),
                Form::Bf16 => {
                    let to = numbers::<u16>(words, 0, CHUNK);
                    narrow(level, x, &mut to[..x.len()]);
                    // A last element without a partner has 0 beside it.
                    to[x.len()..].iter_mut().take(1).for_each(|to| *to = 0);
                }
                Form::Bits8 => {
                    let mut scales = [0.0; 8];
                    let mut starts = [0; 16];
                    let to = numbers::<i8>(words, 0, x.len());
                    match format {
                        Format::Q4K => {
                            eight_bits::<CHUNK>(level, x, to, &mut scales);
                            sums_of_64(level, to, &mut starts);
                        }
                        Format::Q6K => {
                            eight_bits::<CHUNK>(level, x, to, &mut scales);
                            sums_of_16(level, to, -32, &mut starts);
                        }
                        _ => {
                            eight_bits::<32>(level, x, to, &mut scales);
                            sums_of_32(level, to, -format.zero(), &mut starts);
                            for (scale, start) in scales.iter_mut().zip(&mut starts) {
                                // With two bits less, 3·2²² times the scale is a number of f32.
                                *scale = f32::from_bits(scale.to_bits() & !3);
                                *start += MAGIC;
                            }
                            numbers(words, OFFSETS, 8).copy_from_slice(&scales.map(|scale| -ROUND * scale));
                        }
                    }
                    let count = if format == Format::Q6K { 16 } else { 8 };
                    numbers(words, SCALES, 8).copy_from_slice(&scales);
                    numbers(words, STARTS, count).copy_from_slice(&starts[..count]);
                }
            }
        }
    }
}

/// Numbers that any bits are one of.
///
/// # Safety
/// They are, and their alignment is at most eight bytes.
unsafe trait Number {}
// SAFETY: any four bytes are one.
unsafe impl Number for f32 {}
// SAFETY: as above.
unsafe impl Number for i32 {}
// SAFETY: any two bytes are one.
unsafe impl Number for u16 {}
// SAFETY: any byte is one.
unsafe impl Number for i8 {}

/// `count` numbers from byte `at` of `words` on.
fn numbers<T: Number>(words: &mut [u64], at: usize, count: usize) -> &mut [T] {
    assert!(at.is_multiple_of(size_of::<T>()) && at + count * size_of::<T>() <= size_of_val(words));
    let start: *mut T = words.as_mut_ptr().cast();
    // SAFETY: within the words and aligned, as just checked (a word is aligned to eight bytes); any bits are numbers.
    unsafe { std::slice::from_raw_parts_mut(start.byte_add(at), count) }
}

by_level! {
    fn narrow(x: &[f32], to: &mut [u16]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = f32_to_bf16(*x);
        }
    }
}

by_level! {
    fn round(x: &[f32], to: &mut [f32]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = bf16_to_f32(f32_to_bf16(*x));
        }
    }
}

/// 8 bits with a scale for each `N` elements.
fn eight_bits<const N: usize>(level: Level, x: &[f32], to: &mut [i8], scales: &mut [f32]) {
    const { assert!(N == 32 || N == CHUNK) };
    #[cfg(target_arch = "x86_64")]
    if level.min(Level::detected()) >= Level::Avx512 {
        for ((x, to), scale) in x.as_chunks::<N>().0.iter().zip(to.as_chunks_mut::<N>().0).zip(scales) {
            // SAFETY: the machine has these features, as just checked.
            *scale = unsafe { x86::eight_bits(x, to) };
        }
        return;
    }
    by_level! {
        fn of_32(x: &[f32], to: &mut [i8], scales: &mut [f32]) {
            for ((x, to), scale) in x.as_chunks::<32>().0.iter().zip(to.as_chunks_mut::<32>().0).zip(scales) {
                *scale = one_in_eight_bits::<32>(x, to);
            }
        }
    }
    by_level! {
        fn of_256(x: &[f32], to: &mut [i8], scales: &mut [f32]) {
            for ((x, to), scale) in x.as_chunks::<256>().0.iter().zip(to.as_chunks_mut::<256>().0).zip(scales) {
                *scale = one_in_eight_bits::<256>(x, to);
            }
        }
    }
    if N == 32 { of_32(level, x, to, scales) } else { of_256(level, x, to, scales) }
}

/// Adding 1.5·2²³ rounds to the nearest integer, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::ROUND;
    use std::arch::x86_64::*;

    /// As `one_in_eight_bits`, to the bit. Written out because the furthest element was searched for with branches.
    ///
    /// # Safety
    /// The features.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn eight_bits<const N: usize>(x: &[f32; N], to: &mut [i8; N]) -> f32 {
        // SAFETY: 16 elements of `x` and `to` at a time, of which there are whole numbers.
        unsafe {
            let size = _mm512_set1_epi32(0x7fff_ffff);
            let mut most = _mm512_setzero_si512();
            for i in (0..N).step_by(16) {
                let x = _mm512_loadu_si512(x.as_ptr().add(i).cast());
                most = _mm512_max_epu32(most, _mm512_and_si512(x, size));
            }
            let furthest = f32::from_bits(_mm512_reduce_max_epu32(most));
            let by = _mm512_set1_ps(if furthest == 0.0 { 0.0 } else { 127.0 / furthest });
            for i in (0..N).step_by(16) {
                let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(i)), by);
                let rounded = _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(ROUND)));
                _mm_storeu_si128(to.as_mut_ptr().add(i).cast(), _mm512_cvtepi32_epi8(rounded));
            }
            furthest / 127.0
        }
    }
}

/// The scale with which the furthest element becomes ±127; not finite where some element is not. Where all are below 127/f32::MAX,
/// 4e-37, they become 0.
#[inline(always)]
fn one_in_eight_bits<const N: usize>(x: &[f32; N], to: &mut [i8; N]) -> f32 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn eight_bits_are_the_same_at_every_level() {
        let mut x = Random(1).vec(8 * CHUNK, 1.0);
        x[CHUNK..][..40].fill(0.0);
        x[2 * CHUNK..][..32].fill(1e-36);
        x[3 * CHUNK] = -3e38;
        let codes = |level, group: usize| {
            let (mut to, mut scales) = (vec![0; x.len()], vec![0.0; x.len() / group]);
            match group {
                32 => eight_bits::<32>(level, &x, &mut to, &mut scales),
                _ => eight_bits::<CHUNK>(level, &x, &mut to, &mut scales),
            }
            (to, scales)
        };
        for group in [32, CHUNK] {
            let (to, scales) = codes(Level::Portable, group);
            for (i, (x, code)) in x.iter().zip(&to).enumerate() {
                let scale = scales[i / group];
                assert!(
                    (f32::from(*code) * scale - x).abs() <= 0.501 * scale + 1e-44,
                    "{x} became {code} of {scale}"
                );
            }
            for level in Level::available() {
                assert_eq!(codes(level, group), (to.clone(), scales.clone()), "{level:?}, groups of {group}");
            }
        }
    }

    /// Also of the smallest and largest scales: an offset that were rounded would be off by units of the sum.
    #[test]
    fn a_sum_that_starts_at_the_magic_number_is_one_product() {
        let mut random = Random(3);
        for size in [1e-40, 1e-36, 1e-20, 0.3, 1e20, 1e30] {
            let x = random.vec(4 * CHUNK, size);
            for level in Level::available() {
                let mut activations = Activations::default();
                activations.fill(level, Format::Q8_0, &x, x.len());
                for at in 0..4 {
                    let chunk = activations.view().chunk(at, 0);
                    for group in 0..8 {
                        // SAFETY: a chunk has eight scales, starts and offsets behind its elements.
                        let (scale, start, offset) = unsafe {
                            (
                                *chunk.add(SCALES).cast::<f32>().add(group),
                                *chunk.add(STARTS).cast::<i32>().add(group),
                                *chunk.add(OFFSETS).cast::<f32>().add(group),
                            )
                        };
                        assert_eq!(f64::from(offset), -f64::from(ROUND) * f64::from(scale), "{level:?}");
                        let start = start - MAGIC;
                        for sum in [start, 0, 1, -1, 77_777, 32 * 128 * 127, -32 * 128 * 127] {
                            let number = f32::from_bits((MAGIC + sum) as u32).mul_add(scale, offset);
                            assert_eq!(number, sum as f32 * scale, "{level:?}, {sum} times {scale}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_scale_tells_of_what_is_not_finite() {
        for odd in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            for level in Level::available() {
                let mut x = [1.0; 32];
                x[17] = odd;
                let mut scale = [0.0];
                eight_bits::<32>(level, &x, &mut [0; 32], &mut scale);
                assert!(!scale[0].is_finite(), "{level:?}, {odd}");
            }
        }
    }
}
