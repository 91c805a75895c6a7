//! Tiled attention against plain loops in f64, its gradients against their finite differences.

use super::*;
use crate::gemm::Precision;
use crate::reference::attention as plain;
use crate::testing::{Random, assert_close, assert_same_on_any_threads, finite_differences, weighted, wide};
use proptest::prelude::*;

fn sizes(
    batch: usize,
    keys: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    window: Option<usize>,
) -> Heads {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Heads { batch, queries: keys, keys, heads: kv_heads * group, kv_heads, head_dim, window, scale }
}

/// Queries, keys and values side by side, as a decoder has them.
fn fused(h: Heads, seed: u64) -> (Vec<f32>, usize, usize, usize) {
    let (a, c) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
    (Random(seed).vec(h.batch * h.keys * (a + 2 * c), 1.0), a + 2 * c, a, a + c)
}

fn run(
    how: impl Into<Arithmetic>,
    h: Heads,
    qkv: &[f32],
    stride: usize,
    k: usize,
    v: usize,
) -> (Vec<f32>, Vec<f32>) {
    let width = h.heads * h.head_dim;
    let (mut out, mut lse) =
        (vec![f32::NAN; h.batch * h.queries * width], vec![f32::NAN; h.batch * h.heads * h.queries]);
    forward_at(how, h, qkv, stride, &qkv[k..], stride, &qkv[v..], stride, &mut out, width, &mut lse);
    (out, lse)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn forward_agrees_with_plain_loops(
        batch in 1usize..3, keys in 1usize..600, kv_heads in 1usize..3, group in 1usize..3, dim in 1usize..20,
        window in prop::option::of(1usize..100), seed: u64,
    ) {
        let h = sizes(batch, keys, kv_heads, group, dim, window);
        let (qkv, stride, k, v) = fused(h, seed);
        let want = plain::forward(h, &wide(&qkv), stride, k, v);
        for level in Level::available() {
            assert_close("out", &run(level, h, &qkv, stride, k, v).0, &want, 2e-5);
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences(
        keys in 1usize..6, kv_heads in 1usize..3, group in 1usize..3, dim in 1usize..4,
        window in prop::option::of(1usize..4), seed: u64,
    ) {
        let h = sizes(2, keys, kv_heads, group, dim, window);
        let (qkv, stride, k, v) = fused(h, seed);
        let width = h.heads * dim;
        let d_out = Random(seed ^ 7).vec(2 * keys * width, 1.0);
        let want = finite_differences(&qkv, |x| weighted(&plain::forward(h, x, stride, k, v), &d_out));
        for level in Level::available() {
            let (out, lse) = run(level, h, &qkv, stride, k, v);
            let mut d = vec![f32::NAN; qkv.len()];
            backward_at(
                level, h, &qkv, stride, &qkv[k..], stride, &qkv[v..], stride, &out, width, &lse, &d_out, width,
                &mut d, stride, k, v,
            );
            assert_close("d", &d, &want, 1e-4);
        }
    }

    #[test]
    fn a_token_gets_the_same_bits_alone_and_in_a_sequence(
        keys in 2usize..600, window in prop::option::of(1usize..400), seed: u64,
    ) {
        let h = sizes(1, keys, 2, 2, 16, window);
        let (qkv, stride, k, v) = fused(h, seed);
        // A prompt cut in two, then the last token alone.
        let cut = 1 + seed as usize % (keys - 1);
        for how in [Precision::F32, Precision::Bf16] {
            let (whole, _) = run(how, h, &qkv, stride, k, v);
            for (from, to) in [(0, cut), (cut, keys), (keys - 1, keys)] {
                let part = Heads { queries: to - from, keys: to, ..h };
                let (mut out, mut lse) = (vec![0.0; (to - from) * 64], vec![0.0; (to - from) * 4]);
                let q = &qkv[from * stride..];
                forward_at(
                    how, part, q, stride, &qkv[k..], stride, &qkv[v..], stride, &mut out, 64, &mut lse,
                );
                prop_assert_eq!(&out[..], &whole[from * 64..to * 64], "{:?}", how);
            }
        }
    }
}

/// The gradient of queries, keys and values, from the output's.
fn gradient(
    how: Arithmetic,
    h: Heads,
    qkv: &[f32],
    stride: usize,
    k: usize,
    v: usize,
    d_out: &[f32],
) -> Vec<f32> {
    let (out, lse) = run(how, h, qkv, stride, k, v);
    let (mut d, width) = (vec![f32::NAN; qkv.len()], h.heads * h.head_dim);
    let (keys, values) = (&qkv[k..], &qkv[v..]);
    backward_at(
        how, h, qkv, stride, keys, stride, values, stride, &out, width, &lse, d_out, width, &mut d, stride,
        k, v,
    );
    d
}

/// Several tiles and blocks, where the small sizes of the finite differences have one: against the gradient in f64.
#[test]
fn gradients_over_several_tiles() {
    for (keys, window) in [(150, None), (150, Some(70)), (530, None), (530, Some(70)), (530, Some(300))] {
        let h = sizes(1, keys, 1, 2, 8, window);
        let (qkv, stride, k, v) = fused(h, 5);
        let d_out = Random(6).vec(keys * 16, 1.0);
        let want = plain::backward(h, &wide(&qkv), stride, k, v, &wide(&d_out));
        for level in Level::available() {
            assert_close("d", &gradient(level.into(), h, &qkv, stride, k, v, &d_out), &want, 2e-5);
        }
    }
}

/// Heads of several panels, ragged ones, and such that a sum is visited twice; more queries than a block of a product has rows; rows that are
/// a multiple of 4 KiB apart.
#[test]
fn gradients_of_wide_heads() {
    for (keys, kv_heads, dim, window) in [
        (70, 1, 33, None),
        (260, 2, 80, Some(65)),
        (20, 1, 520, None),
        (9, 1, 1030, Some(4)),
        (1, 2, 7, None),
        (40, 4, 64, None),
        (520, 1, 17, None),
    ] {
        let h = sizes(1, keys, kv_heads, 2, dim, window);
        let (qkv, stride, k, v) = fused(h, 15);
        let d_out = Random(16).vec(keys * h.heads * dim, 1.0);
        let want = plain::backward(h, &wide(&qkv), stride, k, v, &wide(&d_out));
        for level in Level::available() {
            let found = gradient(level.into(), h, &qkv, stride, k, v, &d_out);
            assert!(found.iter().all(|x| x.is_finite()), "{h:?}");
            assert_close("d", &found, &want, 3e-5);
        }
    }
}

/// In bf16, of which each number keeps eight bits, what is rounded decides how far off results are, and no more.
#[test]
fn in_bf16_within_its_rounding() {
    let apart = |found: &[f32], want: &[f64]| {
        let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
        let off = square(&mut found.iter().zip(want).map(|(x, y)| f64::from(*x) - y));
        (off / square(&mut want.iter().copied())).sqrt()
    };
    for window in [None, Some(70)] {
        let h = sizes(1, 300, 1, 2, 16, window);
        let (qkv, stride, k, v) = fused(h, 9);
        let d_out = Random(6).vec(300 * 32, 1.0);
        let want = plain::forward(h, &wide(&qkv), stride, k, v);
        let d_want = plain::backward(h, &wide(&qkv), stride, k, v, &wide(&d_out));
        for level in Level::available() {
            let how = Arithmetic { level, precision: Precision::Bf16 };
            let off = apart(&run(how, h, &qkv, stride, k, v).0, &want);
            let d_off = apart(&gradient(how, h, &qkv, stride, k, v, &d_out), &d_want);
            // Not exact, or it would not be bf16; 2^-9 is the most by which one number is rounded.
            assert!((1e-4..8e-3).contains(&off) && (1e-4..8e-3).contains(&d_off), "{level:?}: {off} {d_off}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // The second is few tasks: its blocks are of 256 queries with one thread, of fewer with more.
    for (batch, kv_heads, window) in [(2, 2, None), (1, 1, None), (1, 1, Some(70))] {
        let h = sizes(batch, 300, kv_heads, 2, 24, window);
        let (qkv, stride, k, v) = fused(h, 3);
        for precision in [Precision::F32, Precision::Bf16] {
            let how = Arithmetic { level: Level::current(), precision };
            assert_same_on_any_threads(|| {
                let (out, _) = run(how, h, &qkv, stride, k, v);
                [gradient(how, h, &qkv, stride, k, v, &out), out].concat()
            });
        }
    }
}

#[test]
fn the_widest_window_is_none() {
    let h = sizes(1, 70, 1, 1, 8, None);
    let (qkv, stride, k, v) = fused(h, 4);
    let wide = Heads { window: Some(usize::MAX), ..h };
    assert_eq!(run(Level::current(), wide, &qkv, stride, k, v), run(Level::current(), h, &qkv, stride, k, v));
}
