//! Linear + cross-entropy in chunks of tokens: the \[T, V\] logits of a batch never exist at once.

use crate::buffers::Buffer;
use crate::by_level;
use crate::gemm::{self, Precision, View};
use crate::lanes;
use crate::math::exp;
use crate::pool::{self, Shared};
use crate::profile;
use crate::simd::Level;

/// The target of a token that has none.
pub const IGNORE: u32 = u32::MAX;

/// Elements of the logits of one chunk, about: 8 MiB.
const CHUNK: usize = 1 << 21;

/// Where gradients go.
pub struct Grads<'a> {
    /// Factor on every token's loss in what is minimised (1 / counted tokens, times what comes from above).
    pub scale: f32,
    /// Gradient of `x`, written: \[T, H\].
    pub dx: &'a mut [f32],
    /// Gradient of `w`, added to: \[V, H\]; none where the head is frozen.
    pub dw: Option<&'a mut [f32]>,
}

/// The loss of each token, in nats: `losses` \[T\] = -log softmax(`x`·`w`ᵀ)\[target\], 0 where the target is [`IGNORE`]; with
/// `x` \[T, H\], `w` \[V, H\], `targets` \[T\].
///
/// Products are of the given precision, forward and backward; the rest is f32. Panics when lengths do not fit or a target is
/// not below V.
pub fn linear_cross_entropy(
    precision: Precision,
    x: &[f32],
    w: &[f32],
    hidden: usize,
    targets: &[u32],
    losses: &mut [f32],
    mut grads: Option<Grads>,
) {
    let _span = profile::span("softmax and loss");
    let (tokens, vocab) = (targets.len(), w.len() / hidden.max(1));
    assert_eq!(x.len(), tokens * hidden, "x is [T, H]");
    assert_eq!(losses.len(), tokens, "losses is [T]");
    assert!(
        targets.iter().all(|t| *t == IGNORE || (*t as usize) < vocab),
        "a target is beyond the vocabulary"
    );
    let chunk = (CHUNK / vocab.max(1)).clamp(64, 1024);
    let mut logits = Buffer::stale(chunk.min(tokens) * vocab);
    for first in (0..tokens).step_by(chunk) {
        let rows = chunk.min(tokens - first);
        let x = View::rows(&x[first * hidden..][..rows * hidden], hidden);
        let w = View::rows(w, hidden);
        let logits = &mut logits[..rows * vocab];
        gemm::parallel(precision, rows, vocab, hidden, x, w.t(), logits, vocab, false);
        let scale = grads.as_ref().map(|grads| grads.scale);
        {
            let (logits, losses) = (Shared::new(logits), Shared::new(&mut losses[first..first + rows]));
            pool::for_each(rows, |row| {
                // SAFETY: each row is one task's.
                let (z, loss) = unsafe { (logits.part(row * vocab, vocab), losses.part(row, 1)) };
                loss[0] = row_loss(Level::current(), z, targets[first + row], scale);
            });
        }
        if let Some(grads) = &mut grads {
            let d = View::rows(logits, vocab);
            let dx = &mut grads.dx[first * hidden..][..rows * hidden];
            gemm::parallel(precision, rows, hidden, vocab, d, w, dx, hidden, false);
            if let Some(dw) = &mut grads.dw {
                gemm::parallel(precision, vocab, hidden, rows, d.t(), x, dw, hidden, true);
            }
        }
    }
}

by_level! {
    /// The loss of one row of logits; with `scale`, the row becomes its gradient.
    fn row_loss(z: &mut [f32], target: u32, scale: Option<f32>) -> f32 {
        if target == IGNORE {
            if scale.is_some() {
                z.fill(0.0);
            }
            return 0.0;
        }
        let picked = z[target as usize];
        let greatest = lanes::max(z);
        if scale.is_none() || !greatest.is_finite() {
            // A NaN anywhere must show: the maximum passes it over, the sum does not.
            for z in z.iter_mut() {
                *z = exp::<FMA>(*z - greatest);
            }
            return lanes::sum(z).ln() - (picked - greatest);
        }
        for z in z.iter_mut() {
            *z = exp::<FMA>(*z - greatest);
        }
        let sum = lanes::sum(z);
        let scale = scale.unwrap_or(0.0);
        let factor = scale / sum;
        for z in z.iter_mut() {
            *z *= factor;
        }
        z[target as usize] -= scale;
        sum.ln() - (picked - greatest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, assert_same_on_any_threads, finite_differences, wide};
    use proptest::prelude::*;

    /// The loss of each token by the definition.
    fn plain(x: &[f64], w: &[f64], hidden: usize, targets: &[u32]) -> Vec<f64> {
        targets
            .iter()
            .enumerate()
            .map(|(t, target)| {
                if *target == IGNORE {
                    return 0.0;
                }
                let z: Vec<f64> = w
                    .chunks(hidden)
                    .map(|row| row.iter().zip(&x[t * hidden..]).map(|(a, b)| a * b).sum())
                    .collect();
                z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[*target as usize]
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn losses_and_gradients_agree_with_the_definition(
            tokens in 0usize..7, hidden in 1usize..6, vocab in 1usize..40, seed: u64,
        ) {
            let mut random = Random(seed);
            let (x, w) = (random.vec(tokens * hidden, 1.0), random.vec(vocab * hidden, 1.0));
            let targets: Vec<u32> =
                (0..tokens).map(|t| if t % 3 == 2 { IGNORE } else { random.below(vocab) as u32 }).collect();
            let mut losses = vec![f32::NAN; tokens];
            linear_cross_entropy(Precision::F32, &x, &w, hidden, &targets, &mut losses, None);
            assert_close("loss", &losses, &plain(&wide(&x), &wide(&w), hidden, &targets), 1e-5);
            let (mut dx, mut dw) = (vec![f32::NAN; x.len()], vec![1.0; w.len()]);
            let mut again = vec![f32::NAN; tokens];
            let grads = Grads { scale: 0.25, dx: &mut dx, dw: Some(&mut dw) };
            linear_cross_entropy(Precision::F32, &x, &w, hidden, &targets, &mut again, Some(grads));
            prop_assert_eq!(&again, &losses);
            let sum = |x: &[f64], w: &[f64]| 0.25 * plain(x, w, hidden, &targets).iter().sum::<f64>();
            assert_close("dx", &dx, &finite_differences(&x, |x| sum(x, &wide(&w))), 1e-5);
            dw.iter_mut().for_each(|d| *d -= 1.0);
            assert_close("dw", &dw, &finite_differences(&w, |w| sum(&wide(&x), w)), 1e-5);
        }
    }

    #[test]
    fn many_chunks_on_any_threads() {
        let (tokens, hidden, vocab) = (1500, 8, 300);
        let mut random = Random(3);
        let (x, w) = (random.vec(tokens * hidden, 1.0), random.vec(vocab * hidden, 1.0));
        let targets: Vec<u32> = (0..tokens).map(|_| random.below(vocab) as u32).collect();
        assert_same_on_any_threads(|| {
            let mut losses = vec![0.0; tokens];
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            let grads = Grads { scale: 1.0, dx: &mut dx, dw: Some(&mut dw) };
            linear_cross_entropy(Precision::F32, &x, &w, hidden, &targets, &mut losses, Some(grads));
            assert_close("loss", &losses, &plain(&wide(&x), &wide(&w), hidden, &targets), 1e-5);
            [losses, dx, dw].concat()
        });
    }

    #[test]
    fn what_is_not_finite_shows() {
        let mut losses = [0.0];
        linear_cross_entropy(Precision::F32, &[f32::NAN], &[1.0, 2.0], 1, &[0], &mut losses, None);
        assert!(!losses[0].is_finite());
        let mut dx = [0.0];
        let grads = Grads { scale: 1.0, dx: &mut dx, dw: None };
        linear_cross_entropy(Precision::F32, &[1.0], &[1.0, f32::NAN], 1, &[0], &mut losses, Some(grads));
        assert!(!losses[0].is_finite());
    }
}
