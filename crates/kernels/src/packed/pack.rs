//! From rows as they are stored to panels.

use super::unpack::{Unpacked, code_bytes, codes, scales, start_of_codes};
use super::{CHUNK, Format, PANEL};
use crate::blocks::{bf16_to_f32, f16_to_f32, quantize};
use crate::elements::{Elements, Matrix};
use crate::pool::{self, Shared};

/// Packs a weight: its elements as they are, if they are of the type of `format`, else coded to it. Panics where `out` has not
/// [`Format::bytes`], or sums do not fit.
pub fn pack(format: Format, m: Matrix, out: &mut [u8]) {
    assert!(format.fits(m.cols), "sums of {} elements in {format:?}", m.cols);
    assert_eq!(out.len(), format.bytes(m.rows, m.cols), "a packed weight [{}, {}]", m.rows, m.cols);
    let size = format.panel_bytes(m.cols);
    let ty = format.element_type();
    let same = match m.data {
        Elements::F32(_) => format == Format::F32,
        Elements::Coded(own, _) => own == ty,
    };
    let shared = Shared::new(out);
    pool::for_each(m.rows.div_ceil(PANEL), |panel| {
        // SAFETY: a panel is one task's.
        let out = unsafe { shared.part(panel * size, size) };
        if !same {
            let rows = PANEL.min(m.rows - panel * PANEL);
            let (mut values, bytes) = (vec![0.0; m.cols], ty.row_bytes(m.cols).expect("whole blocks"));
            let mut coded = vec![0; rows * bytes];
            for (i, coded) in coded.chunks_exact_mut(bytes).enumerate() {
                m.row(panel * PANEL + i, &mut values);
                quantize(ty, &values, coded);
            }
            let rows = std::array::from_fn(|i| coded.get(i * bytes..(i + 1) * bytes));
            return pack_panel(format, m.cols, &rows, out);
        }
        let rows: [Option<&[u8]>; PANEL] = std::array::from_fn(|i| row(format, &m, panel * PANEL + i));
        pack_panel(format, m.cols, &rows, out);
    });
}

/// The bytes of a row, if there is one.
fn row<'a>(format: Format, m: &Matrix<'a>, row: usize) -> Option<&'a [u8]> {
    if row >= m.rows {
        return None;
    }
    if let Elements::F32(data) = m.data {
        assert_eq!(format, Format::F32, "the elements of the matrix are F32");
        return Some(bytes_of(&data[row * m.stride..][..m.cols]));
    }
    Some(m.raw_row(row, format.element_type()).expect("elements of the format's type"))
}

/// The bytes of numbers in memory.
fn bytes_of(data: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four bytes; the length is that of the slice.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// A panel from its rows; those that are missing are zero.
fn pack_panel(format: Format, k: usize, rows: &[Option<&[u8]>; PANEL], out: &mut [u8]) {
    match format {
        Format::F32 => words(rows, 0, k, out),
        Format::F16 => each(rows, k, 2, |i| 2 * i, out),
        Format::Bf16 => {
            words(rows, 0, k / 2, out);
            if k % 2 == 1 {
                let last = &mut out[k / 2 * 64..][..64];
                last.fill(0);
                for (row, to) in rows.iter().zip(last.as_chunks_mut::<4>().0) {
                    if let Some(row) = row {
                        to[..2].copy_from_slice(&row[2 * k - 2..]);
                    }
                }
            }
        }
        _ => {
            let mut at = 0;
            for first in (0..k).step_by(CHUNK) {
                let len = CHUNK.min(k - first);
                let size = format.chunk_bytes(len);
                pack_chunk(format, first, len, rows, &mut out[at..][..size]);
                at += size;
            }
        }
    }
}

/// Words of four bytes of 16 rows, from byte `from` of each: word w of row r goes to place 16·w + r.
fn words(rows: &[Option<&[u8]>; PANEL], from: usize, count: usize, out: &mut [u8]) {
    let out = &mut out[..count * 64];
    // A few cache lines of each row at a time: both sides stay in the first-level cache.
    for (block, out) in out.chunks_mut(64 * 64).enumerate() {
        let (first, count) = (block * 64, out.len() / 64);
        for (r, row) in rows.iter().enumerate() {
            match row {
                None => out.as_chunks_mut::<64>().0.iter_mut().for_each(|line| line[4 * r..][..4].fill(0)),
                Some(row) => {
                    let row = row[from + 4 * first..][..4 * count].as_chunks::<4>().0;
                    for (word, line) in row.iter().zip(out.as_chunks_mut::<64>().0) {
                        line[4 * r..][..4].copy_from_slice(word);
                    }
                }
            }
        }
    }
}

/// `len` bytes at `at(i)` of each row, for i below `count`: those of row r go to places r·len of the i-th run.
fn each(
    rows: &[Option<&[u8]>; PANEL],
    count: usize,
    len: usize,
    at: impl Fn(usize) -> usize,
    out: &mut [u8],
) {
    for (i, run) in out[..count * len * PANEL].chunks_exact_mut(len * PANEL).enumerate() {
        for (row, to) in rows.iter().zip(run.chunks_exact_mut(len)) {
            match row {
                None => to.fill(0),
                Some(row) => to.copy_from_slice(&row[at(i)..][..len]),
            }
        }
    }
}

/// A chunk of `len` elements from `first` on: the scales, then the codes.
fn pack_chunk(format: Format, first: usize, len: usize, rows: &[Option<&[u8]>; PANEL], out: &mut [u8]) {
    let (block, size) = (format.element_type().block_len(), format.element_type().block_bytes());
    let (start, blocks) = (first / block * size, len / block);
    let (scales, codes) = out.split_at_mut(start_of_codes(format, len));
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => {}
        Format::Q8_0 => {
            for (i, codes) in codes.chunks_exact_mut(512).enumerate() {
                words(rows, start + i * size + 2, 8, codes);
                codes.iter_mut().for_each(|code| *code ^= 0x80);
            }
            each(rows, blocks, 2, |i| start + i * size, scales);
        }
        Format::Q4_0 | Format::Mxfp4 => {
            // The scale's bytes stand before the codes.
            let scale = size - 16;
            for (i, codes) in codes.chunks_exact_mut(256).enumerate() {
                words(rows, start + i * size + scale, 4, codes);
            }
            each(rows, blocks, scale, |i| start + i * size, scales);
        }
        Format::Q4K => {
            let (scales, halves) = scales.split_at_mut(192);
            words(rows, start + 16, 32, codes);
            each(rows, 12, 1, |i| start + 4 + i, scales);
            each(rows, 2, 2, |i| start + 2 * i, halves);
        }
        Format::Q6K => {
            let (scales, halves) = scales.split_at_mut(256);
            // By halves of the chunk: what is used together is close together.
            for (half, codes) in codes.chunks_exact_mut(1536).enumerate() {
                let (high, low) = codes.split_at_mut(512);
                words(rows, start + 128 + 32 * half, 8, high);
                words(rows, start + 64 * half, 16, low);
            }
            each(rows, 16, 1, |i| start + 192 + i, scales);
            each(rows, 1, 2, |_| start + 208, halves);
        }
    }
}

/// Row `row` of a panel.
pub(super) fn unpack_row(format: Format, k: usize, panel: &[u8], row: usize, out: &mut [f32]) {
    let half = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    match format {
        Format::F32 => {
            for (x, line) in out.iter_mut().zip(panel.as_chunks::<64>().0) {
                *x = f32::from_le_bytes(line.as_chunks::<4>().0[row]);
            }
        }
        Format::F16 => {
            for (x, line) in out.iter_mut().zip(panel.as_chunks::<32>().0) {
                *x = f16_to_f32(half(&line[2 * row..]));
            }
        }
        Format::Bf16 => {
            for (pair, line) in out.chunks_mut(2).zip(panel.as_chunks::<64>().0) {
                for (i, x) in pair.iter_mut().enumerate() {
                    *x = bf16_to_f32(half(&line[4 * row + 2 * i..]));
                }
            }
        }
        _ => {
            let (mut at, mut space) = (0, Box::new(Unpacked::new()));
            let group = if format == Format::Q6K { 16 } else { 32 };
            for (first, out) in (0..k).step_by(CHUNK).zip(out.chunks_mut(CHUNK)) {
                let len = CHUNK.min(k - first);
                let size = format.chunk_bytes(len);
                let chunk = &panel[at..][..size];
                at += size;
                scales(format, chunk, len, &mut space, halves);
                codes(format, chunk, len, &mut space.codes);
                let codes = code_bytes(format, chunk, len, &space);
                for (i, x) in out.iter_mut().enumerate() {
                    let code = i32::from(codes[i / 4 * 64 + 4 * row + i % 4]) - format.zero();
                    let (g, scale) = (i / group, space.scales[i / group][row]);
                    *x = code as f32 * scale;
                    if format == Format::Q4K {
                        *x -= f32::from(space.mins[g / 2][row][g % 2]) * space.min_scale[row];
                    }
                }
            }
        }
    }
}

/// 16 numbers in half precision.
pub(super) fn halves(bytes: &[u8; 32], to: &mut [f32; PANEL]) {
    for (bytes, to) in bytes.as_chunks::<2>().0.iter().zip(to) {
        *to = f16_to_f32(u16::from_le_bytes(*bytes));
    }
}
