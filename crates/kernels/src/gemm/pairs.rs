//! Packing for dot products of bf16: two steps of k side by side, rounded, in the space of one f32.
//!
//! A panel then has the form of one of f32 with half as many steps, so the micro-kernels differ in one instruction. An odd
//! last step is paired with zeros.

use super::pack::{panel_of_a, prefetch, step_of_a};
use super::{KC, Operand};

/// Steps of k that one visit to C takes.
pub(super) const STEPS: usize = 2 * KC;

/// Rows of pairs that are written for so many steps of k: lines become columns by sixteens.
pub(super) const fn rows(kc: usize) -> usize {
    kc.div_ceil(32) * 16
}

/// A panel of 32 columns of f32, a row after another, as one of pairs of rows.
pub(super) fn panel(from: &[f32], kc: usize, into: &mut [f32]) {
    const NR: usize = 32;
    assert!(from.len() >= kc * NR && into.len() >= kc.div_ceil(2) * NR);
    for p in (0..kc).step_by(2) {
        let row = |p: usize| if p < kc { &from[p * NR..][..NR] } else { &[][..] };
        // SAFETY: this path is taken on machines with these instructions alone; a row of pairs is written.
        unsafe { x86::interleave::<NR>((row(p), 1.0), (row(p + 1), 1.0), &mut into[p / 2 * NR..][..NR], NR) };
    }
}

/// Rows `first..first + rows` of an A along whose lines k runs: each row `KC` pairs after the one before.
pub(super) fn a_along(a: &Operand, k0: usize, kc: usize, first: usize, rows: usize, into: &mut [f32]) {
    assert!(kc <= STEPS && into.len() >= rows * KC);
    for (r, out) in into.chunks_exact_mut(KC).take(rows).enumerate() {
        let line = a.line(first + r, k0, kc);
        let by = a.scale.map_or(1.0, |scale| scale[first + r]);
        // SAFETY: this path is taken on machines with these instructions alone; `out` holds `STEPS` elements.
        unsafe { x86::line(line, by, out) };
    }
}

/// Rows `first..first + m` of an A whose lines lie across k: panels of 14 rows, each a column of pairs after another.
pub(super) fn a_across(a: &Operand, k0: usize, kc: usize, first: usize, m: usize, into: &mut [f32]) {
    across::<14>(a, k0, kc, first, m, panel_of_a(14), into);
}

/// Columns `first..first + n` of B: panels of 32 columns, `panel` after one another, each a row of pairs after another; missing columns are 0.
pub(super) fn b(b: &Operand, k0: usize, kc: usize, first: usize, n: usize, panel: usize, into: &mut [f32]) {
    const NR: usize = 32;
    if !b.k_inner {
        return across::<NR>(b, k0, kc, first, n, panel, into);
    }
    assert!(kc <= STEPS && rows(kc) * NR <= panel && into.len() >= n.div_ceil(NR) * panel);
    for j0 in (0..n).step_by(16) {
        let cols = 16.min(n - j0);
        let out = &mut into[j0 / NR * panel + j0 % NR..];
        let lines: [&[f32]; 16] = std::array::from_fn(|i| match i < cols {
            true => b.line(first + j0 + i, k0, kc),
            false => &[],
        });
        let scale: [f32; 16] = std::array::from_fn(|i| match (b.scale, i < cols) {
            (Some(scale), true) => scale[first + j0 + i],
            _ => 1.0,
        });
        // SAFETY: as above; lines are `kc` long or empty, and `out` holds `rows(kc)` that lie `NR` apart.
        unsafe { x86::columns(&lines, kc, &scale, out, NR) };
        if j0 % NR == 0 && n - j0 <= 16 {
            // The other half of the last panel.
            for row in out.chunks_mut(NR).take(kc.div_ceil(2)) {
                row[16..NR].fill(0.0);
            }
        }
    }
}

/// Lines across k: panels of `W` of their elements, `panel` after one another. Each line is read once, in order.
fn across<const W: usize>(
    x: &Operand,
    k0: usize,
    kc: usize,
    first: usize,
    n: usize,
    panel: usize,
    into: &mut [f32],
) {
    assert!(kc <= STEPS && step_of_a(W) * kc.div_ceil(2) <= panel && into.len() >= n.div_ceil(W) * panel);
    for p in (0..kc).step_by(2) {
        for ahead in [4, 5] {
            if p + ahead < kc {
                prefetch(x.line(k0 + p + ahead, first, n));
            }
        }
        let by = |p: usize| x.scale.map_or(1.0, |scale| scale[k0 + p]);
        let one = (x.line(k0 + p, first, n), by(p));
        let two = if p + 1 < kc { (x.line(k0 + p + 1, first, n), by(p + 1)) } else { (&[][..], 1.0) };
        // SAFETY: this path is taken on machines with these instructions alone; the last group ends within the last panel.
        unsafe { x86::interleave::<W>(one, two, &mut into[p / 2 * step_of_a(W)..], panel) };
    }
}

mod x86 {
    use super::super::pack::lanes;
    use std::arch::x86_64::*;

    /// The bits of 32 bf16 as those of 16 pairs.
    #[inline(always)]
    unsafe fn pairs(low: __m512, high: __m512) -> __m512i {
        // SAFETY: both are 64 bytes of plain bits; the instruction is there by the callers' promise.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
    }

    /// `line` times `by`, rounded, in pairs; the last vector is filled up with zeros.
    ///
    /// # Safety
    /// AVX-512 F and BF16; `into` holds a pair for every two elements, rounded up to whole vectors.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn line(line: &[f32], by: f32, into: &mut [f32]) {
        // SAFETY: lanes beyond the line are masked; `into` is long enough by the caller's promise.
        unsafe {
            let by = _mm512_set1_ps(by);
            let (mut from, mut to) = (line.as_ptr(), into.as_mut_ptr());
            let mut left = line.len();
            while left >= 32 {
                let low = _mm512_mul_ps(_mm512_loadu_ps(from), by);
                let high = _mm512_mul_ps(_mm512_loadu_ps(from.add(16)), by);
                _mm512_storeu_ps(to, _mm512_castsi512_ps(pairs(low, high)));
                (from, to, left) = (from.add(32), to.add(16), left - 32);
            }
            if left > 0 {
                let low = _mm512_maskz_loadu_ps(lanes(left), from);
                let high = _mm512_maskz_loadu_ps(lanes(left.saturating_sub(16)), from.wrapping_add(16));
                let both = pairs(_mm512_mul_ps(low, by), _mm512_mul_ps(high, by));
                _mm512_storeu_ps(to, _mm512_castsi512_ps(both));
            }
        }
    }

    /// Two lines, each times its scale, rounded, side by side: groups of `W` pairs, `panel` after one another, the last filled
    /// up with zeros. The second line may be empty, and counts as zeros then.
    ///
    /// # Safety
    /// AVX-512 F, BW and BF16; `into` holds `W` elements for each group.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn interleave<const W: usize>(
        one: (&[f32], f32),
        two: (&[f32], f32),
        into: &mut [f32],
        panel: usize,
    ) {
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 16 {
                order[2 * i] = i as u16;
                order[2 * i + 1] = 16 + i as u16;
                i += 1;
            }
            order
        };
        let n = one.0.len();
        assert!(n == 0 || into.len() >= (n - 1) / W * panel + W);
        // SAFETY: lanes beyond the lines and the groups are masked; the end of what is written was checked.
        unsafe {
            let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
            let (by_one, by_two) = (_mm512_set1_ps(one.1), _mm512_set1_ps(two.1));
            for (group, start) in (0..n).step_by(W).enumerate() {
                for part in (0..W).step_by(16) {
                    let (i, width) = (start + part, (W - part).min(16));
                    let left = n.saturating_sub(i).min(width);
                    let mask = lanes(left);
                    let second = if two.0.is_empty() { 0 } else { mask };
                    let low = _mm512_maskz_loadu_ps(mask, one.0.as_ptr().wrapping_add(i));
                    let high = _mm512_maskz_loadu_ps(second, two.0.as_ptr().wrapping_add(i));
                    let both = pairs(_mm512_mul_ps(low, by_one), _mm512_mul_ps(high, by_two));
                    let to = into.as_mut_ptr().add(group * panel + part);
                    let both = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
                    _mm512_mask_storeu_ps(to, lanes(width), both);
                }
            }
        }
    }

    /// Sixteen lines become columns: pair `p` of line j, times its scale, goes to `out[p * stride + j]`. An empty line gives
    /// zeros.
    ///
    /// # Safety
    /// AVX-512 F and BF16; lines of `kc` elements or none; `out` holds 16 elements `stride` apart for each pair, rounded up to
    /// 16 pairs.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn columns(
        lines: &[&[f32]; 16],
        kc: usize,
        scale: &[f32; 16],
        out: &mut [f32],
        stride: usize,
    ) {
        let last = (kc.div_ceil(32) * 16).saturating_sub(1) * stride + 16;
        assert!(kc == 0 || out.len() >= last);
        // SAFETY: lanes beyond a line's end are masked; the end of what is written was checked.
        unsafe {
            for p in (0..kc).step_by(32) {
                let left = kc - p;
                let (first, second) = (lanes(left), lanes(left.saturating_sub(16)));
                let mut rows = [_mm512_setzero_ps(); 16];
                for i in 0..16 {
                    if !lines[i].is_empty() {
                        let from = lines[i].as_ptr().add(p);
                        let by = _mm512_set1_ps(scale[i]);
                        let low = _mm512_mul_ps(_mm512_maskz_loadu_ps(first, from), by);
                        let high = _mm512_maskz_loadu_ps(second, from.wrapping_add(16));
                        rows[i] = _mm512_castsi512_ps(pairs(low, _mm512_mul_ps(high, by)));
                    }
                }
                super::super::pack::transpose16(rows, out.as_mut_ptr().add(p / 2 * stride), stride);
            }
        }
    }
}
