//! Products of 8-bit activations with coded panels, chunk by chunk of k: a chunk is unpacked once and then met by all rows.

use super::activations::{MAGIC, OFFSETS, SCALES, STARTS, View};
use super::unpack::{Unpacked, code_bytes, codes, scales, start_of_codes};
use super::{CHUNK, Format, PANEL};
use crate::simd::Level;

/// One or two panels and the rows that meet them.
pub(super) struct Panels<'a> {
    pub format: Format,
    pub k: usize,
    /// The second may be the first again.
    pub bytes: [&'a [u8]; 2],
    /// Only the first panel counts.
    pub single: bool,
    pub activations: View<'a>,
    pub rows: &'a [u32],
    /// The panels that are needed after them; null where that is not known.
    pub next: [*const u8; 2],
}

/// `sums` \[rows, 16\] of each panel.
pub(super) fn panels(level: Level, p: &Panels, space: &mut [Unpacked; 2], sums: &mut [Vec<[f32; PANEL]>; 2]) {
    let a = p.activations;
    assert!(a.k() == p.k && p.rows.iter().all(|row| (*row as usize) < a.rows()), "rows of the activations");
    a.check(level, p.format);
    assert!(p.bytes.iter().all(|panel| panel.len() >= p.format.panel_bytes(p.k)), "panels of k elements");
    let [first, second] = sums;
    let mut sums = [&mut first[..p.rows.len()], &mut second[..p.rows.len()]];
    sums.iter_mut().for_each(|sums| sums.as_flattened_mut().fill(0.0));
    // SAFETY: the level is the machine's; rows, panels and the form of the activations were just checked.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 if level.has_int8_dots() => avx512::panels(p, space, &mut sums),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 | Level::Avx512 | Level::Avx2 => avx2::panels(p, space, &mut sums),
            _ => portable::panels(p, space, &mut sums),
        }
    }
}

/// Sums of the rows of a tile, or of all, by panel.
type Sums<'a, 'b> = &'a mut [&'b mut [[f32; PANEL]]; 2];

/// Where a tile's rows have a chunk; their scales and starts are behind it.
#[inline(always)]
fn rows_at<const R: usize>(p: &Panels, rows: &[u32], chunk: usize) -> [*const i8; R] {
    let rows = &rows[..R];
    std::array::from_fn(|r| p.activations.chunk(chunk, rows[r] as usize).cast())
}

/// The scale of a group of 32 elements, or of the chunk.
///
/// # Safety
/// `x` is the chunk of a row.
#[inline(always)]
unsafe fn scale(x: *const i8, group: usize) -> f32 {
    // SAFETY: behind the elements of a chunk.
    unsafe { *x.add(SCALES).cast::<f32>().add(group) }
}

/// Minus 1.5·2²³ times the scale of a group of 32 elements.
///
/// # Safety
/// As [`scale`]; of activations with a scale for each group.
#[inline(always)]
unsafe fn offset(x: *const i8, group: usize) -> f32 {
    // SAFETY: behind the starts of a chunk.
    unsafe { *x.add(OFFSETS).cast::<f32>().add(group) }
}

/// What the sum of a group starts from, from [`MAGIC`] on where each group has a scale; two sums of Q4_K.
///
/// # Safety
/// As [`scale`].
#[inline(always)]
unsafe fn start(x: *const i8, group: usize) -> i32 {
    // SAFETY: behind the scales of a chunk.
    unsafe { *x.add(STARTS).cast::<i32>().add(group) }
}

/// A chunk of each panel.
struct Chunk<'a> {
    index: usize,
    /// Elements of k.
    len: usize,
    codes: [&'a [u8]; 2],
    space: &'a [Unpacked; 2],
}

/// Lines of the panels that come next, which tiles ask for bit by bit while they compute: all at once would hold up what they read.
struct Ask {
    from: [*const u8; 2],
    /// Lines of each that are left.
    lines: usize,
    /// The second is another than the first.
    two: bool,
    /// Lines of each at once.
    some: usize,
    /// Steps from one to the next, and those that are left of them.
    every: usize,
    wait: usize,
}

impl Ask {
    /// `size` bytes from `next` on, spread over so many steps. These may be anywhere, and are nowhere where null.
    #[inline(always)]
    fn of(next: [*const u8; 2], size: usize, steps: usize) -> Self {
        let (lines, steps) = (if next[0].is_null() { 0 } else { size / 64 }, steps.max(1));
        let every = steps.checked_div(lines).map_or(usize::MAX, |every| every.max(1));
        Self { from: next, lines, two: next[0] != next[1], some: lines.div_ceil(steps), every, wait: 1 }
    }

    /// Asks for the next lines to come to the second-level cache. To the first there are too few ways at once: a core would wait for its
    /// own requests.
    #[inline(always)]
    fn step(&mut self) {
        self.wait -= 1;
        if self.wait > 0 {
            return;
        }
        self.wait = self.every;
        let some = self.some.min(self.lines);
        #[cfg(target_arch = "x86_64")]
        for line in 0..some {
            // SAFETY: SSE is part of x86-64, and a prefetch has no effect on what the program computes.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T1>(self.from[0].wrapping_add(64 * line).cast());
                if self.two {
                    _mm_prefetch::<_MM_HINT_T1>(self.from[1].wrapping_add(64 * line).cast());
                }
            }
        }
        self.lines -= some;
        // Plain lines: a closure would be a call in the middle of a kernel, with its sums in memory.
        self.from[0] = self.from[0].wrapping_add(64 * some);
        self.from[1] = self.from[1].wrapping_add(64 * some);
    }
}

/// Calls `$tile::<R, V, ..>(p, &chunk, &mut ask, rows, first, sums)` for each chunk of `$v` panels and each tile of rows, of which `first` is
/// the first; `$unpack(format, bytes, len, space)` brings codes and scales to the space, and `$steps(groups)` says how often a tile of so
/// many groups asks.
macro_rules! each_chunk {
    ($p:ident, $space:ident, $sums:ident, $unpack:expr, $steps:expr, $v:literal, $height:literal, $tile:ident, $($r:literal)*) => {{
        let mut at = 0;
        for first in (0..$p.k).step_by(CHUNK) {
            let len = CHUNK.min($p.k - first);
            let size = $p.format.chunk_bytes(len);
            let bytes = $p.bytes.map(|panel| &panel[at..][..size]);
            at += size;
            let more = first + CHUNK < $p.k;
            for v in 0..$v {
                $unpack($p.format, bytes[v], len, &mut $space[v]);
            }
            let next = [0, 1].map(|v| if more { $p.bytes[v][at..].as_ptr() } else { $p.next[v] });
            let left = if more { $p.k - first - CHUNK } else { $p.k };
            let coming = $p.format.chunk_bytes(CHUNK.min(left));
            let space: &[Unpacked; 2] = $space;
            let codes = [0, 1].map(|v| code_bytes($p.format, bytes[v], len, &space[v]));
            let chunk = Chunk { index: first / CHUNK, len, codes, space };
            let tiles = $p.rows.len().div_ceil($height).max(1);
            let (low, more) = ($p.rows.len() / tiles, $p.rows.len() % tiles);
            let groups = len / if $p.format == Format::Q6K { 16 } else { 32 };
            let mut ask = Ask::of(next, coming, tiles * $steps(groups));
            let mut row = 0;
            for tile in 0..tiles {
                let height = low + usize::from(tile < more);
                let rows = &$p.rows[row..][..height];
                match (height, $p.format) {
                    $(
                        // SAFETY: by the caller's promise.
                        ($r, Format::Q4K) => unsafe { $tile::<$r, $v, 8, 4, true, true>($p, &chunk, &mut ask, rows, row, $sums) },
                        // SAFETY: as above.
                        ($r, Format::Q6K) => unsafe { $tile::<$r, $v, 4, 2, true, false>($p, &chunk, &mut ask, rows, row, $sums) },
                        // SAFETY: as above.
                        ($r, Format::Q8_0) => unsafe { $tile::<$r, $v, 8, 1, false, false>($p, &chunk, &mut ask, rows, row, $sums) },
                        // SAFETY: as above.
                        ($r, _) => unsafe { $tile::<$r, $v, 8, 4, false, false>($p, &chunk, &mut ask, rows, row, $sums) },
                    )*
                    _ => {}
                }
                row += height;
            }
        }
    }};
}

// After the macro that they use.
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod few;
mod portable;
