//! AdamW and the norm of a gradient, each in one pass over the memory.

use crate::by_level;
use crate::lanes;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;

/// Elements of a task; also the blocks of the sum of squares, so it must not depend on the number of threads.
const BLOCK: usize = 1 << 14;

/// Σ x² in f64, over blocks joined in a fixed tree. Not finite when an element is not finite (or their squares overflow).
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let _span = profile::span("optimiser");
    let blocks = x.len().div_ceil(BLOCK);
    let mut partials = vec![0.0f64; blocks];
    let shared = Shared::new(&mut partials);
    pool::for_each(blocks, |block| {
        let part = &x[block * BLOCK..((block + 1) * BLOCK).min(x.len())];
        // SAFETY: one element a task.
        let partial = unsafe { shared.part(block, 1) };
        let mut lanes = Lanes::default();
        squares(Level::current(), part, &mut lanes);
        partial[0] = lanes::sum_tree(lanes.as_flattened_mut());
    });
    lanes::sum_tree(&mut partials)
}

/// Sums of squares side by side: two vectors of eight, written as two since the compiler would make four of one of sixteen.
type Lanes = [[f64; 8]; 2];

by_level! {
    /// Adds the square of element i to lane i modulo 16. (Were the lanes summed here, the compiler would compute two at a time.)
    fn squares(x: &[f32], lanes: &mut Lanes) {
        let [mut low, mut high] = *lanes;
        let (chunks, tail) = x.as_chunks::<16>();
        let mut last = [0.0; 16];
        last[..tail.len()].copy_from_slice(tail);
        for chunk in chunks.iter().chain([&last]) {
            for l in 0..8 {
                let x = chunk[l] as f64;
                low[l] += x * x;
            }
            for l in 0..8 {
                let x = chunk[8 + l] as f64;
                high[l] += x * x;
            }
        }
        *lanes = [low, high];
    }
}

/// One step of AdamW (1711.05101): p ← p·(1 - lr·λ); m ← β₁m + (1 - β₁)g; v ← β₂v + (1 - β₂)g²;
/// p ← p - lr/(1 - β₁ᵗ) · m / (√v/√(1 - β₂ᵗ) + ε), with g the gradient times `clip_factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// The learning rate.
    pub lr: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// λ.
    pub weight_decay: f64,
    /// t, from 1.
    pub step: u64,
    /// Factor on the gradient.
    pub clip_factor: f32,
    /// Leave zeros in the gradient.
    pub zero_grad: bool,
}

/// The numbers of a step as the loop uses them.
#[derive(Clone, Copy)]
struct Factors {
    keep: f32,
    rate: f32,
    root: f32,
    eps: f32,
    beta1: (f32, f32),
    beta2: (f32, f32),
    clip: f32,
    zero: bool,
}

/// Applies a step to `p` with gradient `g` and moments `m`, `v`. Panics when the lengths differ.
pub fn adamw(step: &AdamW, p: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    let _span = profile::span("optimiser");
    assert!(g.len() == p.len() && m.len() == p.len() && v.len() == p.len(), "adamw: lengths differ");
    let t = step.step as f64;
    let factors = Factors {
        keep: (1.0 - step.lr * step.weight_decay) as f32,
        rate: (step.lr / (1.0 - step.beta1.powf(t))) as f32,
        root: (1.0 / (1.0 - step.beta2.powf(t)).sqrt()) as f32,
        eps: step.eps as f32,
        beta1: (step.beta1 as f32, (1.0 - step.beta1) as f32),
        beta2: (step.beta2 as f32, (1.0 - step.beta2) as f32),
        clip: step.clip_factor,
        zero: step.zero_grad,
    };
    let len = p.len();
    let (p, g, m, v) = (Shared::new(p), Shared::new(g), Shared::new(m), Shared::new(v));
    pool::for_each(len.div_ceil(BLOCK), |block| {
        let (start, n) = (block * BLOCK, BLOCK.min(len - block * BLOCK));
        // SAFETY: blocks do not overlap.
        let (p, g, m, v) =
            unsafe { (p.part(start, n), g.part(start, n), m.part(start, n), v.part(start, n)) };
        update(Level::current(), factors, p, g, m, v);
    });
}

by_level! {
    fn update(f: Factors, p: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, g), m), v) in p.iter_mut().zip(g.iter_mut()).zip(m).zip(v) {
            let d = *g * f.clip;
            *m = f.beta1.0 * *m + f.beta1.1 * d;
            *v = f.beta2.0 * *v + f.beta2.1 * d * d;
            *p = *p * f.keep - f.rate * (*m / (v.sqrt() * f.root + f.eps));
        }
        if f.zero {
            g.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_same_on_any_threads, wide};

    #[test]
    fn steps_follow_the_formula() {
        let mut random = Random(1);
        let n = 1000;
        let (mut p, mut m, mut v) = (random.vec(n, 1.0), vec![0.0; n], vec![0.0; n]);
        let (mut wp, mut wm, mut wv) = (wide(&p), vec![0.0f64; n], vec![0.0f64; n]);
        for t in 1..=5 {
            let mut g = random.vec(n, 0.1);
            let step = AdamW {
                lr: 1e-2,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                step: t,
                clip_factor: 0.5,
                zero_grad: true,
            };
            for i in 0..n {
                let d = g[i] as f64 * 0.5;
                wp[i] -= 1e-2 * 0.1 * wp[i];
                wm[i] = 0.9 * wm[i] + 0.1 * d;
                wv[i] = 0.95 * wv[i] + 0.05 * d * d;
                let (mh, vh) =
                    (wm[i] / (1.0 - 0.9f64.powi(t as i32)), wv[i] / (1.0 - 0.95f64.powi(t as i32)));
                wp[i] -= 1e-2 * mh / (vh.sqrt() + 1e-8);
            }
            adamw(&step, &mut p, &mut g, &mut m, &mut v);
            assert!(g.iter().all(|g| *g == 0.0));
        }
        assert_close("p", &p, &wp, 1e-6);
        assert_close("m", &m, &wm, 1e-6);
        assert_close("v", &v, &wv, 1e-6);
    }

    #[test]
    fn the_norm_is_exact_finite_only_if_all_are_and_the_same_on_any_threads() {
        let x = Random(2).vec(3 * BLOCK + 77, 1.0);
        let want: f64 = x.iter().map(|x| *x as f64 * *x as f64).sum();
        assert!((sum_of_squares(&x) / want - 1.0).abs() < 1e-12);
        assert_eq!(sum_of_squares(&[]), 0.0);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut y = x.clone();
            y[BLOCK + 3] = bad;
            assert!(!sum_of_squares(&y).is_finite());
        }
        assert_same_on_any_threads(|| {
            let s = sum_of_squares(&x).to_bits();
            vec![f32::from_bits(s as u32), f32::from_bits((s >> 32) as u32)]
        });
    }
}
