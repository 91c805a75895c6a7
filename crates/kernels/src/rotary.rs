//! Rotary position embedding (Su et al., 2021): the first elements of a head turn in pairs, either element i with element
//! i + half (the convention of Hugging Face's Llama) or neighbours 2i and 2i + 1 (DeepSeek, Ernie).

use crate::by_level;
use crate::layout::Rows;
use crate::math::fma;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;

/// Cosines and sines of every angle up to a position.
#[derive(Clone, Debug)]
pub struct Rope {
    /// [positions, half]
    cos: Vec<f32>,
    /// [positions, half]
    sin: Vec<f32>,
    half: usize,
    positions: usize,
    neighbours: bool,
}

/// theta^(-2i/dim) for i in 0..dim/2, rounded as transformers does it: the power in f32, then its inverse in f32.
pub fn inverse_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            1.0 / (theta as f32 as f64).powf(exponent as f64) as f32
        })
        .collect()
}

impl Rope {
    /// The table of `positions` positions for [`inverse_frequencies`], or for ones that a scaling rule bent; `scale`
    /// multiplies cosines and sines (YaRN's attention factor, else 1). Angles are rounded to f32, as transformers does.
    pub fn new(inverse_frequencies: &[f32], positions: usize, scale: f32) -> Self {
        let half = inverse_frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for position in 0..positions {
            for frequency in inverse_frequencies {
                let angle = (position as f32 * frequency) as f64;
                cos.push(angle.cos() as f32 * scale);
                sin.push(angle.sin() as f32 * scale);
            }
        }
        Self { cos, sin, half, positions, neighbours: false }
    }

    /// The same, turning neighbours 2i and 2i + 1 rather than i and i + half.
    pub fn of_neighbours(self) -> Self {
        Self { neighbours: true, ..self }
    }

    /// How many positions the table holds.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// How many elements of a head are rotated: twice the number of frequencies.
    pub fn dim(&self) -> usize {
        2 * self.half
    }

    /// The cosines and sines \[half\] of a position. Panics beyond the table.
    pub fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Rotates the first [`Rope::dim`] elements of each row of `x` by the angle of its token's position.
///
/// `x` holds `rows` (width = D) at `stride`, `positions` is \[T\]. Panics when a slice does not fit, when a position is
/// beyond the table, or when D is less than what is rotated.
pub fn apply(rope: &Rope, rows: Rows, x: &mut [f32], stride: usize, positions: &[u32]) {
    rotate_at(Level::current(), rope, rows, x, stride, positions, false);
}

/// [`apply`] at a given level.
pub fn apply_at(level: Level, rope: &Rope, rows: Rows, x: &mut [f32], stride: usize, positions: &[u32]) {
    let _span = profile::span("rotary");
    rotate_at(level, rope, rows, x, stride, positions, false);
}

/// The backward of [`apply`]: the transposed rotation, in place on the gradients.
pub fn apply_backward(rope: &Rope, rows: Rows, dx: &mut [f32], stride: usize, positions: &[u32]) {
    rotate_at(Level::current(), rope, rows, dx, stride, positions, true);
}

/// [`apply_backward`] at a given level.
pub fn apply_backward_at(
    level: Level,
    rope: &Rope,
    rows: Rows,
    dx: &mut [f32],
    stride: usize,
    positions: &[u32],
) {
    let _span = profile::span("rotary");
    rotate_at(level, rope, rows, dx, stride, positions, true);
}

fn rotate_at(
    level: Level,
    rope: &Rope,
    rows: Rows,
    x: &mut [f32],
    stride: usize,
    positions: &[u32],
    backward: bool,
) {
    /// Tokens of a task.
    const BLOCK: usize = 32;
    rows.check("x", x.len(), stride);
    assert_eq!(positions.len(), rows.tokens, "positions is [T]");
    assert!(rope.dim() <= rows.width, "{} elements of a head of {} rotate", rope.dim(), rows.width);
    if let Some(position) = positions.iter().find(|&&position| position as usize >= rope.positions) {
        panic!("position {position} is beyond a table of {}", rope.positions);
    }
    let x = Shared::new(x);
    pool::for_each(rows.tokens.div_ceil(BLOCK), |block| {
        for token in block * BLOCK..((block + 1) * BLOCK).min(rows.tokens) {
            // SAFETY: tokens do not overlap (`Rows::check`), and each is one task's.
            let heads = unsafe { x.part(token * stride, rows.heads * rows.width) };
            let (cos, sin) = rope.angles(positions[token] as usize);
            let sign = if backward { -1.0 } else { 1.0 };
            if rope.neighbours {
                rotate_neighbours(level, heads, rows.width, cos, sin, sign);
            } else {
                rotate_heads(level, heads, rows.width, cos, sin, sign);
            }
        }
    });
}

by_level! {
    fn rotate_heads(heads: &mut [f32], width: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        if width == 0 {
            return;
        }
        for head in heads.chunks_exact_mut(width) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let s = s * sign;
                (*a, *b) = (fma::<FMA>(*a, *c, -(*b * s)), fma::<FMA>(*b, *c, *a * s));
            }
        }
    }
}

by_level! {
    fn rotate_neighbours(heads: &mut [f32], width: usize, cos: &[f32], sin: &[f32], sign: f32) {
        if width == 0 {
            return;
        }
        for head in heads.chunks_exact_mut(width) {
            for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let (s, [a, b]) = (s * sign, *pair);
                *pair = [fma::<FMA>(a, *c, -(b * s)), fma::<FMA>(b, *c, a * s)];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reference::rotary as reference;
    use crate::testing::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_its_reference_and_the_backward_undoes_it(
            tokens in 0..70usize,
            heads in 1..4usize,
            half in 1..40usize,
            rest in 0..3usize,
            gap in 0..5usize,
            seed in any::<u64>(),
        ) {
            let width = 2 * half + rest;
            let rows = Rows { tokens, heads, width };
            let stride = heads * width + gap;
            let mut random = Random(seed);
            let x = random.vec(tokens * stride, 1.0);
            let positions: Vec<u32> = (0..tokens).map(|_| random.below(500) as u32).collect();
            let frequencies = inverse_frequencies(10_000.0, 2 * half);
            let rope = Rope::new(&frequencies, 500, 1.0);
            let mut want = wide(&x);
            for t in 0..tokens {
                for h in 0..heads {
                    let at = t * stride + h * width;
                    reference::rotate(&mut want[at..at + width], &wide(&frequencies), positions[t] as f64);
                }
            }
            for level in Level::available() {
                let mut y = x.clone();
                apply_at(level, &rope, rows, &mut y, stride, &positions);
                // An angle of up to 500 is rounded to f32: 3e-5.
                assert_close("y", &y, &want, 5e-5);
                apply_backward_at(level, &rope, rows, &mut y, stride, &positions);
                assert_close("x", &y, &wide(&x), 1e-6);
                // Neighbours: the same with the elements in another order.
                let order = |i: usize| if i < 2 * half { 2 * (i % half) + i / half } else { i };
                let mixed = |x: &[f32]| {
                    let mut y = x.to_vec();
                    for at in (0..tokens).flat_map(|t| (0..heads).map(move |h| t * stride + h * width)) {
                        (0..width).for_each(|i| y[at + order(i)] = x[at + i]);
                    }
                    y
                };
                let (mut plain, mut pairs) = (x.clone(), mixed(&x));
                apply_at(level, &rope, rows, &mut plain, stride, &positions);
                apply_at(level, &rope.clone().of_neighbours(), rows, &mut pairs, stride, &positions);
                prop_assert_eq!(&mixed(&plain), &pairs);
                apply_backward_at(level, &rope.clone().of_neighbours(), rows, &mut pairs, stride, &positions);
                assert_close("x of neighbours", &pairs, &wide(&mixed(&x)), 1e-6);
            }
        }
    }

    #[test]
    fn the_backward_is_the_transpose() {
        // <apply(x), r> = <x, apply_backward(r)> for all x and r says the gradient whole: the map is linear.
        let mut random = Random(3);
        let rows = Rows { tokens: 5, heads: 2, width: 10 };
        let rope = Rope::new(&inverse_frequencies(1e4, 8), 64, 1.3);
        let positions = [0, 63, 7, 20, 20];
        let (x, r) = (random.vec(100, 1.0), random.vec(100, 1.0));
        let (mut y, mut dx) = (x.clone(), r.clone());
        apply(&rope, rows, &mut y, 20, &positions);
        apply_backward(&rope, rows, &mut dx, 20, &positions);
        let left = weighted(&wide(&y), &r);
        let right = weighted(&wide(&x), &dx);
        assert!((left - right).abs() < 1e-5 * left.abs().max(1.0), "{left} {right}");
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let mut random = Random(4);
        let x = random.vec(100 * 64, 1.0);
        let rope = Rope::new(&inverse_frequencies(1e4, 32), 100, 1.0);
        let positions: Vec<u32> = (0..100).collect();
        assert_same_on_any_threads(|| {
            let mut y = x.clone();
            apply(&rope, Rows { tokens: 100, heads: 2, width: 32 }, &mut y, 64, &positions);
            y
        });
    }
}
