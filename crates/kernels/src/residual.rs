//! Sums and copies of whole activations, on all threads.

use crate::by_level;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;

/// Elements of a task.
const BLOCK: usize = 1 << 14;

fn in_blocks(out: &mut [f32], work: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync) {
    let len = out.len();
    let out = Shared::new(out);
    pool::for_each(len.div_ceil(BLOCK), |block| {
        let range = block * BLOCK..((block + 1) * BLOCK).min(len);
        // SAFETY: blocks do not overlap.
        work(range.clone(), unsafe { out.part(range.start, range.len()) });
    });
}

/// `out = a + b`. Panics when the lengths differ.
pub fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    let _span = profile::span("residual sums");
    assert!(
        a.len() == out.len() && b.len() == out.len(),
        "add: lengths {}, {}, {}",
        a.len(),
        b.len(),
        out.len()
    );
    in_blocks(out, |range, out| sum(Level::current(), &a[range.clone()], &b[range], out));
}

/// `into += x`. Panics when the lengths differ.
pub fn add_to(into: &mut [f32], x: &[f32]) {
    let _span = profile::span("residual sums");
    assert_eq!(into.len(), x.len(), "add_to: lengths");
    in_blocks(into, |range, into| accumulate(Level::current(), &x[range], into));
}

/// Copies the first `width` elements of each row of `from` (rows `from_stride` apart) to the rows of `to`.
///
/// Panics when `to` has rows that `from` has not.
pub fn copy_rows(from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize, width: usize) {
    let _span = profile::span("residual sums");
    assert!(width <= from_stride && width <= to_stride, "copy_rows: {width} of {from_stride} to {to_stride}");
    for (to, from) in to.chunks_mut(to_stride.max(1)).zip(from.chunks(from_stride.max(1))) {
        to[..width].copy_from_slice(&from[..width]);
    }
}

by_level! {
    fn sum(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = a + b;
        }
    }
}

by_level! {
    fn accumulate(x: &[f32], into: &mut [f32]) {
        for (into, x) in into.iter_mut().zip(x) {
            *into += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn sums_and_copies_reach_every_element() {
        for len in [0, 1, 17, BLOCK, 3 * BLOCK + 5] {
            let (a, b) = (Random(1).vec(len, 1.0), Random(2).vec(len, 1.0));
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            let mut out = vec![f32::NAN; len];
            add(&a, &b, &mut out);
            assert_eq!(out, want);
            let mut into = a.clone();
            add_to(&mut into, &b);
            assert_eq!(into, want);
        }
        let from: Vec<f32> = (0..15).map(|x| x as f32).collect();
        let mut to = vec![-1.0; 9];
        copy_rows(&from, 5, &mut to, 3, 2);
        assert_eq!(to, [0.0, 1.0, -1.0, 5.0, 6.0, -1.0, 10.0, 11.0, -1.0]);
    }
}
