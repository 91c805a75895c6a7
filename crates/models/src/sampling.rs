//! Choosing the next token: temperature, top-k, top-p, from numbers that depend on the seed and the place alone.

use crate::error::{ModelError, Result};
use senmon_moe::rng::Stream;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token, 1 the model's own distribution.
    pub temperature: f32,
    /// Only the likeliest so many; 0 for all.
    pub top_k: usize,
    /// Only the likeliest that together have this probability.
    pub top_p: f32,
    /// Only tokens with at least this part of the likeliest one's probability; 0 for all.
    pub min_p: f32,
    /// Everything random follows from it.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 0.95, min_p: 0.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the values.
    pub fn validate(&self) -> Result<()> {
        let refuse = |what: String| Err(ModelError::Option { what });
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse(format!("temperature = {} must be 0 or more", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse(format!("top-p = {} must be above 0 and at most 1", self.top_p));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse(format!("min-p = {} must be from 0 to 1", self.min_p));
        }
        Ok(())
    }

    /// The token for `logits` \[V\] at place `index`; ties go to the lowest id. `None` when no logit is a number.
    pub fn pick(&self, logits: &[f32], index: u64) -> Option<u32> {
        let _span = senmon_kernels::profile::span("sampling");
        let mut order: Vec<u32> =
            (0..logits.len() as u32).filter(|i| !logits[*i as usize].is_nan()).collect();
        // Not `total_cmp`: 0 and -0 are a tie.
        let falling = |a: &u32, b: &u32| {
            let order = logits[*b as usize].partial_cmp(&logits[*a as usize]);
            order.unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
        };
        let first = order.iter().copied().min_by(falling)?;
        // An infinite logit leaves no distribution to draw from.
        if self.temperature == 0.0 || logits[first as usize].is_infinite() {
            return Some(first);
        }
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, falling);
            order.truncate(self.top_k);
            order.sort_unstable_by(falling);
        }
        let greatest = logits[first as usize];
        let weight =
            |i: &u32| (f64::from(logits[*i as usize] - greatest) / f64::from(self.temperature)).exp();
        if self.min_p > 0.0 {
            // The likeliest weighs 1.
            order.retain(|i| weight(i) >= f64::from(self.min_p));
            order.sort_unstable_by(falling);
        }
        if self.top_p < 1.0 {
            let enough = f64::from(self.top_p) * order.iter().map(weight).sum::<f64>();
            let kept = nucleus(&mut order, falling, weight, enough);
            order.truncate(kept);
        }
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let unit = (Stream::new(&[self.seed, 0x7361_6d70]).bits(index) >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * total;
        for (token, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return Some(*token);
            }
        }
        // Rounding took the last bit of the sum: the last token that can come at all.
        order.iter().zip(&weights).rev().find(|(_, weight)| **weight > 0.0).map(|(token, _)| *token)
    }
}

/// How many of the likeliest tokens weigh `enough` together; these are then the first of `order`, by falling weight. A few
/// tokens hold most of the weight: no more of a vocabulary is sorted than it takes.
fn nucleus(
    order: &mut [u32],
    falling: impl Fn(&u32, &u32) -> std::cmp::Ordering + Copy,
    weight: impl Fn(&u32) -> f64,
    enough: f64,
) -> usize {
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < order.len() {
        let next = (8 * sorted).max(64).min(order.len());
        let rest = &mut order[sorted..];
        if next - sorted < rest.len() {
            rest.select_nth_unstable_by(next - sorted - 1, falling);
        }
        rest[..next - sorted].sort_unstable_by(falling);
        for (at, token) in rest[..next - sorted].iter().enumerate() {
            sum += weight(token);
            if sum >= enough {
                return sorted + at + 1;
            }
        }
        sorted = next;
    }
    order.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampling: &Sampling, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        (0..20_000).for_each(|i| counts[sampling.pick(logits, i).unwrap() as usize] += 1);
        counts
    }

    #[test]
    fn tokens_come_as_often_as_they_should() {
        let logits: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let all = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 3 };
        for (count, p) in counts(&all, &logits).iter().zip([0.1, 0.2, 0.3, 0.4]) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.015);
        }
        let two = counts(&Sampling { top_k: 2, ..all.clone() }, &logits);
        assert!(two[0] + two[1] == 0 && (two[3] as f64 / 20_000.0 - 4.0 / 7.0).abs() < 0.015);
        let most = counts(&Sampling { top_p: 0.65, ..all.clone() }, &logits);
        assert!(most[0] + most[1] == 0 && most[2] > 0);
        // 0.1 and 0.2 are less than 0.6 of 0.4.
        let near = counts(&Sampling { min_p: 0.6, ..all.clone() }, &logits);
        assert!(near[0] + near[1] == 0 && (near[3] as f64 / 20_000.0 - 4.0 / 7.0).abs() < 0.015);
        let cold = counts(&Sampling { temperature: 0.5, ..all.clone() }, &logits);
        assert!((cold[3] as f64 / 20_000.0 - 16.0 / 30.0).abs() < 0.015);
        assert_eq!(counts(&all, &logits), counts(&all, &logits));
    }

    #[test]
    fn a_nucleus_is_that_of_a_vocabulary_sorted_whole() {
        for (tokens, distinct) in [(1, 9), (63, 9), (64, 1000), (65, 1000), (513, 5), (5000, 100_000)] {
            let stream = Stream::new(&[tokens]);
            let weights: Vec<f64> = (0..tokens).map(|i| (1 + stream.bits(i) % distinct) as f64).collect();
            let falling =
                |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
            let mut whole: Vec<u32> = (0..tokens as u32).collect();
            whole.sort_by(falling);
            let total: f64 = weights.iter().sum();
            for p in [0.0, 0.01, 0.5, 0.9, 0.999, 1.0, 2.0] {
                let mut order: Vec<u32> = (0..tokens as u32).rev().collect();
                let kept = nucleus(&mut order, falling, |i| weights[*i as usize], p * total);
                let mut sum = 0.0;
                let enough = |i: &u32| {
                    sum += weights[*i as usize];
                    sum >= p * total
                };
                assert_eq!(kept, whole.iter().position(enough).map_or(whole.len(), |last| last + 1));
                assert_eq!(order[..kept], whole[..kept], "{tokens} {p}");
            }
        }
    }

    #[test]
    fn the_likeliest_token_ties_low_and_nan_never() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(greedy.pick(&[0.0, 2.0, f32::NAN, 2.0], 0), Some(1));
        assert_eq!(greedy.pick(&[f32::NAN], 0), None);
        assert_eq!(greedy.pick(&[], 0), None);
        assert_eq!(greedy.pick(&[-0.0, 0.0], 0), Some(0));
        assert_eq!(Sampling::default().pick(&[f32::NEG_INFINITY, 1.0], 5), Some(1));
        for i in 0..50 {
            assert_eq!(Sampling::default().pick(&[0.0, f32::INFINITY, 1.0], i), Some(1));
            assert_eq!(Sampling::default().pick(&[f32::NEG_INFINITY; 3], i), Some(0));
            assert_eq!(Sampling { temperature: 1e-40, ..Sampling::default() }.pick(&[0.0, 1.0], i), Some(1));
        }
        assert!(Sampling { top_p: 0.0, ..Sampling::default() }.validate().is_err());
        assert!(Sampling { temperature: f32::NAN, ..Sampling::default() }.validate().is_err());
    }
}
