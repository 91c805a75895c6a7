//! Coded panels in plain arithmetic.

use super::*;
use crate::packed::pack::halves;

pub(super) fn panels(p: &Panels, space: &mut [Unpacked; 2], sums: Sums) {
    let unpack = |format, bytes: &[u8], len, space: &mut Unpacked| {
        scales(format, bytes, len, space, halves);
        codes(format, bytes, len, &mut space.codes);
    };
    if p.single {
        each_chunk!(p, space, sums, unpack, |_| 1, 1, 1, tile, 1);
    } else {
        each_chunk!(p, space, sums, unpack, |_| 2, 2, 1, tile, 1);
    }
}

/// A tile of a chunk of `V` panels whose groups have `QUADS` quads of k; `SUPER`: one scale of activations for the chunk; `MINS`: and
/// minima.
///
/// # Safety
/// Rows within the activations.
unsafe fn tile<
    const R: usize,
    const V: usize,
    const QUADS: usize,
    const SPAN: usize,
    const SUPER: bool,
    const MINS: bool,
>(
    p: &Panels,
    chunk: &Chunk,
    ask: &mut Ask,
    rows: &[u32],
    first: usize,
    sums: Sums,
) {
    let at = rows_at::<R>(p, rows, chunk.index);
    for v in 0..V {
        ask.step();
        for (r, sums) in sums[v][first..][..R].iter_mut().enumerate() {
            // SAFETY: the row has the elements of a chunk, and what is behind them.
            unsafe { row::<QUADS, SUPER, MINS>(at[r], chunk.len, chunk.codes[v], &chunk.space[v], sums) };
        }
    }
}

/// A row of a chunk, `x`, and a panel.
///
/// # Safety
/// `x` is the chunk of a row of `len` elements.
unsafe fn row<const QUADS: usize, const SUPER: bool, const MINS: bool>(
    x: *const i8,
    len: usize,
    codes: &[u8],
    space: &Unpacked,
    sums: &mut [f32; PANEL],
) {
    let mut whole = [0.0f32; PANEL];
    for (g, codes) in codes[..len * PANEL].chunks_exact(QUADS * 64).enumerate() {
        // SAFETY: the row has these elements, and a start and a scale for each group.
        let (x, first, by) = unsafe {
            (
                std::slice::from_raw_parts(x.add(g * QUADS * 4), QUADS * 4),
                if MINS { 0 } else { start(x, g) - if SUPER { 0 } else { MAGIC } },
                if SUPER { 1.0 } else { scale(x, g) },
            )
        };
        let mut acc = [first; PANEL];
        for (codes, x) in codes.as_chunks::<64>().0.iter().zip(x.as_chunks::<4>().0) {
            for (acc, codes) in acc.iter_mut().zip(codes.as_chunks::<4>().0) {
                for i in 0..4 {
                    *acc += i32::from(codes[i]) * i32::from(x[i]);
                }
            }
        }
        let into = if SUPER { &mut whole } else { &mut *sums };
        for i in 0..PANEL {
            into[i] += acc[i] as f32 * by * space.scales[g][i];
        }
    }
    if MINS {
        for i in 0..PANEL {
            let mut acc = 0;
            for (pair, mins) in space.mins.iter().enumerate() {
                // SAFETY: a chunk has four starts.
                let two = unsafe { start(x, pair) };
                acc += i32::from(mins[i][0]) * i32::from(two as i16) + i32::from(mins[i][1]) * (two >> 16);
            }
            whole[i] -= acc as f32 * space.min_scale[i];
        }
    }
    if SUPER {
        // SAFETY: a chunk has a scale.
        let by = unsafe { scale(x, 0) };
        for i in 0..PANEL {
            sums[i] += whole[i] * by;
        }
    }
}
