//! What several statistics are made of: figures with their chance, distributions, entropies, tails of the normal distribution.

use senmon_moe::rng::Stream;
use serde::{Deserialize, Serialize};

/// A figure, and what it would be by chance. None where there is nothing to measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// As measured.
    pub value: Option<f64>,
    /// With a router to which all experts are alike and no token differs from another.
    pub chance: Option<f64>,
    /// With such a router that gives each expert the load it has here; None where the load is what is measured.
    pub by_load: Option<f64>,
}

impl Figure {
    pub(crate) fn new(value: Option<f64>, chance: Option<f64>, by_load: Option<f64>) -> Self {
        Self {
            value: value.and_then(finite),
            chance: chance.and_then(finite),
            by_load: by_load.and_then(finite),
        }
    }
}

/// How some values are spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many there are.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, that of a population (divided by the count).
    pub std: f64,
    /// The least.
    pub min: f64,
    /// The 5th percentile. Percentiles lie between the two values next to them, linearly, as numpy's do.
    pub p05: f64,
    /// The 25th.
    pub p25: f64,
    /// The 50th, the median.
    pub p50: f64,
    /// The 75th.
    pub p75: f64,
    /// The 95th.
    pub p95: f64,
    /// The greatest.
    pub max: f64,
}

impl Distribution {
    /// That of the finite ones of `values`, if there are any.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|x| x.is_finite());
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count as f64;
        let std = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64).sqrt();
        let at = |share: f64| {
            let place = share * (count - 1) as f64;
            let (low, part) = (place.floor() as usize, place.fract());
            let high = (low + 1).min(count - 1);
            values[low] + part * (values[high] - values[low])
        };
        let (p05, p25, p50, p75, p95) = (at(0.05), at(0.25), at(0.5), at(0.75), at(0.95));
        Some(Self { count: count as u64, mean, std, min, p05, p25, p50, p75, p95, max })
    }
}

/// What two things tell of each other, over a table of counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Information {
    /// Mutual information, in nats.
    pub nats: f64,
    /// The same over √(H(rows)·H(columns)): 0 nothing, 1 each fixes the other (Strehl and Ghosh 2002). None where a side has
    /// one value only.
    pub normalized: Option<f64>,
    /// The nats that independent tokens would show by chance, to first order (Miller 1955): a table of few tokens always
    /// looks related.
    pub expected: f64,
    /// The mean of the nats over seeded shuffles which leave whole texts together, where they were made: tokens of a text are
    /// alike, so chance gives more than [`expected`](Self::expected).
    pub shuffled: Option<f64>,
    /// The mean of the normalized over the same shuffles.
    pub shuffled_normalized: Option<f64>,
}

/// Entropies of a table of counts \[R, C\], in nats: of its rows, of its columns, of both.
pub(crate) struct Entropies {
    pub rows: f64,
    pub columns: f64,
    pub both: f64,
}

impl Entropies {
    pub fn of(table: &[u64], columns: usize) -> Self {
        let sums: Vec<u64> = table.chunks(columns.max(1)).map(|row| row.iter().sum()).collect();
        let mut down = vec![0u64; columns];
        for row in table.chunks(columns.max(1)) {
            down.iter_mut().zip(row).for_each(|(sum, n)| *sum += n);
        }
        Self { rows: entropy(&sums), columns: entropy(&down), both: entropy(table) }
    }

    /// Mutual information in nats. It is never less than 0 but for rounding.
    pub fn nats(&self) -> f64 {
        (self.rows + self.columns - self.both).max(0.0)
    }

    pub fn normalized(&self) -> Option<f64> {
        let most = (self.rows * self.columns).sqrt();
        // An entropy that is not 0 but for rounding.
        if most > 1e-9 { Some((self.nats() / most).min(1.0)) } else { None }
    }
}

impl Information {
    /// That of a table of counts \[R, C\] to which each token contributes `each` rows, all different (1 where rows are first
    /// choices, K where they are all of a token's experts).
    pub(crate) fn of(table: &[u64], columns: usize, each: f64) -> Self {
        let entropies = Entropies::of(table, columns);
        let total: u64 = table.iter().sum();
        let rows = table.chunks(columns.max(1)).filter(|row| row.iter().any(|n| *n > 0)).count();
        let used = (0..columns).filter(|c| table.iter().skip(*c).step_by(columns).any(|n| *n > 0)).count();
        // Chi-squared of a table has (R - 1)(C - 1) degrees of freedom, (R - K)(C - 1) where a token has K different rows,
        // and 2·n·nats is nearly chi-squared.
        let freedom = (rows as f64 - each).max(0.0) * used.saturating_sub(1) as f64;
        let expected = if total == 0 { 0.0 } else { freedom / (2.0 * total as f64) };
        Self { nats: entropies.nats(), normalized: entropies.normalized(), expected, ..Self::default() }
    }
}

/// Entropy of counts, in nats.
pub(crate) fn entropy(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let term = |n: &u64| {
        let p = *n as f64 / total as f64;
        -p * p.ln()
    };
    counts.iter().filter(|n| **n > 0).map(term).sum()
}

/// A number, if it is one.
pub(crate) fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

/// a / b, where that is a number.
pub(crate) fn ratio(a: f64, b: f64) -> Option<f64> {
    finite(a / b)
}

/// a / b of counts, where b is not 0.
pub(crate) fn share(a: u64, b: u64) -> Option<f64> {
    ratio(a as f64, b as f64)
}

/// The probability that `k` experts drawn of `experts`, all different, are none of `marked` given ones.
pub(crate) fn apart(experts: usize, marked: usize, k: usize) -> f64 {
    let free = |i: usize| experts.saturating_sub(marked + i) as f64 / experts.saturating_sub(i).max(1) as f64;
    (0..k).map(free).product()
}

/// ln P(Z > z) of a standard normal Z.
pub(crate) fn ln_tail(z: f64) -> f64 {
    if z < 0.0 {
        return (-ln_tail(-z).exp()).ln_1p();
    }
    let ln_density = -0.5 * z * z - 0.5 * std::f64::consts::TAU.ln();
    if z < 2.5 {
        // Φ(z) - 1/2 = φ(z) Σ z^(2n+1) / (1·3·5 … (2n+1)).
        let (mut term, mut sum) = (z, z);
        for n in 1..60 {
            term *= z * z / (2 * n + 1) as f64;
            sum += term;
        }
        return (0.5 - ln_density.exp() * sum).ln();
    }
    // Laplace's continued fraction: φ(z) / (z + 1/(z + 2/(z + 3/ …))).
    ln_density - (1..120).rev().fold(z, |below, n| z + f64::from(n) / below).ln()
}

/// The z with P(Z ≤ z) = p.
pub(crate) fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-40.0, 40.0);
    for _ in 0..80 {
        let middle = 0.5 * (low + high);
        if ln_tail(-middle).exp() < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// By how many standard deviations the greatest of `n` values lies above their mean, where they are normal and their sum is
/// fixed: the expected greatest of n (Blom 1958), and √(n/(n-1)) for the correlation -1/(n-1) that a fixed sum brings.
pub(crate) fn expected_greatest(n: usize) -> f64 {
    if n < 2 {
        return 0.0;
    }
    let n = n as f64;
    normal_quantile((n - 0.375) / (n + 0.25)) * (n / (n - 1.0)).sqrt()
}

/// An order of 0..n, by Fisher and Yates from the highest place down.
pub(crate) fn shuffled(stream: Stream, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let draw = u128::from(stream.bits(i as u64)) * (i as u128 + 1);
        order.swap(i, (draw >> 64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-9 * b.abs().max(1e-3), "{a} is not {b}");
    }

    #[test]
    fn tails_of_the_normal_distribution_are_those_of_tables() {
        near(ln_tail(0.0), 0.5f64.ln());
        near(ln_tail(1.0), 0.158_655_253_931_457_05f64.ln());
        near(ln_tail(-1.0), 0.841_344_746_068_542_9f64.ln());
        near(ln_tail(3.0), 0.001_349_898_031_630_094_5f64.ln());
        near(ln_tail(10.0), 7.619_853_024_160_527e-24f64.ln());
        // Both ways of computing it meet.
        assert!((ln_tail(2.5 - 1e-9) - ln_tail(2.5)).abs() < 1e-7);
        assert!(ln_tail(1e4).is_finite());
        near(normal_quantile(0.975), 1.959_963_984_540_054);
        near(normal_quantile(0.01), -2.326_347_874_040_841);
    }

    #[test]
    fn the_greatest_of_even_draws_is_as_far_out_as_expected() {
        // 4096 tokens, each at one of 16: the mean of the greatest count over repetitions.
        let (experts, tokens, times) = (16, 4096, 200);
        let mut sum = 0.0;
        for time in 0..times {
            let stream = Stream::new(&[time]);
            let mut counts = vec![0u32; experts];
            (0..tokens).for_each(|t| counts[(stream.bits(t) % 16) as usize] += 1);
            sum += f64::from(counts.into_iter().max().unwrap());
        }
        let (mean, p) = (tokens as f64 / experts as f64, 1.0 / experts as f64);
        let wanted = mean + expected_greatest(experts) * (tokens as f64 * p * (1.0 - p)).sqrt();
        let found = sum / times as f64;
        assert!((found / wanted - 1.0).abs() < 0.01, "{found} against {wanted}");
    }

    #[test]
    fn information_is_nothing_for_what_is_independent_and_all_for_what_is_the_same() {
        let independent = Information::of(&[2, 4, 3, 6], 2, 1.0);
        near(independent.nats, 0.0);
        near(independent.expected, 1.0 / 30.0);
        let same = Information::of(&[5, 0, 0, 0, 5, 0], 3, 1.0);
        near(same.nats, 2f64.ln());
        near(same.normalized.unwrap(), 1.0);
        assert_eq!(Information::of(&[5, 7], 2, 1.0).normalized, None);
        assert_eq!(Information::of(&[], 0, 1.0), Information::default());
    }

    #[test]
    fn draws_without_replacement_are_apart_as_binomials_say() {
        // 1 - C(6, 2) / C(8, 2), which the Mixtral paper rounds to 46 %.
        near(1.0 - apart(8, 2, 2), 13.0 / 28.0);
        near(apart(4, 2, 3), 0.0);
        near(apart(0, 0, 0), 1.0);
    }

    #[test]
    fn a_shuffle_is_a_permutation_and_always_the_same() {
        let order = shuffled(Stream::new(&[1]), 50);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..50) && order == shuffled(Stream::new(&[1]), 50));
        assert_ne!(order, shuffled(Stream::new(&[2]), 50));
    }

    #[test]
    fn distributions_have_the_percentiles_of_numpy() {
        let found = Distribution::of(vec![4.0, f64::NAN, 1.0, 2.0]).unwrap();
        assert_eq!((found.count, found.min, found.p50, found.max), (3, 1.0, 2.0, 4.0));
        near(found.p25, 1.5);
        near(found.p95, 3.8);
        assert_eq!(Distribution::of(vec![f64::NAN]), None);
    }
}
