//! Intervals for differences and ratios of runs that are paired by seed and by held-out text. `docs/compare.md` has the formulas.

use serde::{Deserialize, Serialize};

use crate::student::{two_sided_p, two_sided_quantile};

/// An estimate with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// What is estimated.
    pub estimate: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// 1 - α of this interval alone.
    pub level: f64,
    /// Degrees of freedom.
    pub df: f64,
    /// Two-sided p of "there is no difference", before any correction.
    pub p: f64,
}

impl Interval {
    /// `estimate` ± t·`error`.
    fn around(estimate: f64, error: f64, df: f64, alpha: f64) -> Self {
        // Without any spread a difference is what it is.
        let (half, p) = match error > 0.0 {
            true => (two_sided_quantile(alpha, df) * error, two_sided_p(estimate / error, df)),
            false => (0.0, if estimate == 0.0 { 1.0 } else { 0.0 }),
        };
        Self { estimate, low: estimate - half, high: estimate + half, level: 1.0 - alpha, df, p }
    }

    /// The interval of exp of what this one is of.
    fn exp(self) -> Self {
        Self { estimate: self.estimate.exp(), low: self.low.exp(), high: self.high.exp(), ..self }
    }
}

/// Mean of some values; NaN for none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Variance of a sample (n - 1 below).
pub fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)
}

/// Student's interval for the mean of paired differences, one a seed; none for fewer than two.
pub fn paired(differences: &[f64], alpha: f64) -> Option<Interval> {
    let n = differences.len() as f64;
    (differences.len() > 1).then(|| {
        let error = (variance(differences) / n).sqrt();
        Interval::around(mean(differences), error, n - 1.0, alpha)
    })
}

/// The interval for a mean difference that varies by seed and by block of held-out text.
///
/// `differences` \[N, G\] has the difference of seed s on block g, `weights` \[G\] the share of block g in all of the text. The variance is
/// that of two crossed random effects, V = V_seeds + V_blocks - V_both (what is of neither is in the first two), never less than
/// that of seeds or of blocks alone. Its degrees of freedom are those of the smaller of the two, less one: Satterthwaite's would be many more
/// just where few seeds happen to lie close together, and the interval would miss too often. None for fewer than two seeds.
pub fn crossed(differences: &[Vec<f64>], weights: &[f64], alpha: f64) -> Option<Interval> {
    let (n, g) = (differences.len(), weights.len());
    if n < 2 || differences.iter().any(|row| row.len() != g) {
        return None;
    }
    let total: f64 = weights.iter().sum();
    let share: Vec<f64> = weights.iter().map(|w| w / total).collect();
    let by_seed: Vec<f64> =
        differences.iter().map(|row| row.iter().zip(&share).map(|(d, w)| d * w).sum()).collect();
    let estimate = mean(&by_seed);
    let (nf, gf) = (n as f64, g as f64);
    let seeds = variance(&by_seed) / nf;
    if g < 2 {
        return Some(Interval::around(estimate, seeds.sqrt(), nf - 1.0, alpha));
    }
    // A ratio of sums over blocks of unequal size is linear in these: their mean over blocks and seeds is the estimate.
    let z = |s: usize, b: usize| estimate + gf * share[b] * (differences[s][b] - estimate);
    let of_block: Vec<f64> = (0..g).map(|b| (0..n).map(|s| z(s, b)).sum::<f64>() / nf).collect();
    let of_seed: Vec<f64> = (0..n).map(|s| (0..g).map(|b| z(s, b)).sum::<f64>() / gf).collect();
    let blocks = variance(&of_block) / gf;
    let rest: f64 = (0..n)
        .flat_map(|s| (0..g).map(move |b| (s, b)))
        .map(|(s, b)| (z(s, b) - of_seed[s] - of_block[b] + estimate).powi(2))
        .sum();
    let both = rest / ((nf - 1.0) * (gf - 1.0)) / (nf * gf);
    let variance = (seeds + blocks - both).max(seeds).max(blocks);
    Some(Interval::around(estimate, variance.sqrt(), (nf - 1.0).min(gf - 1.0), alpha))
}

/// The interval for a ratio over seeds and blocks of held-out text, Student's for the mean of its logarithm: the estimate is the
/// geometric mean. `without` \[G\] has the mean logarithm over seeds with each block left out: its jackknife variance is added to that of
/// seeds; nothing there, and seeds are all that varies. p is of "the ratio is 1". None for fewer than two, or where one is not positive.
pub fn ratio(ratios: &[f64], without: &[f64], alpha: f64) -> Option<Interval> {
    let sound = ratios.iter().all(|r| *r > 0.0 && r.is_finite()) && without.iter().all(|x| x.is_finite());
    if !sound || ratios.len() < 2 {
        return None;
    }
    let logs: Vec<f64> = ratios.iter().map(|r| r.ln()).collect();
    let (n, g) = (logs.len() as f64, without.len() as f64);
    let seeds = variance(&logs) / n;
    let (blocks, df) = match without.len() {
        0 | 1 => (0.0, n - 1.0),
        _ => (variance(without) * (g - 1.0).powi(2) / g, (n - 1.0).min(g - 1.0)),
    };
    Some(Interval::around(mean(&logs), (seeds + blocks).sqrt(), df, alpha).exp())
}

/// p values corrected by Holm's rule, in the order given.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let (mut out, mut least) = (vec![0.0; p.len()], 0.0f64);
    for (rank, place) in order.into_iter().enumerate() {
        least = least.max((p[place] * (p.len() - rank) as f64).min(1.0));
        out[place] = least;
    }
    out
}

/// α of each of `comparisons` intervals that hold together with probability 1 - `alpha` (Bonferroni).
pub fn alpha_of_each(alpha: f64, comparisons: usize) -> f64 {
    alpha / comparisons.max(1) as f64
}

/// The value of a curve at `x`, on straight lines between its points; that of the nearest end outside of them. NaN without points.
pub fn value_at(curve: &[(f64, f64)], x: f64) -> f64 {
    let Some(after) = curve.iter().position(|(at, _)| *at >= x) else {
        return curve.last().map_or(f64::NAN, |(_, y)| *y);
    };
    let (x1, y1) = curve[after];
    match after.checked_sub(1).map(|before| curve[before]) {
        Some((x0, y0)) if x1 > x0 => y0 + (y1 - y0) * (x - x0) / (x1 - x0),
        _ => y1,
    }
}

/// Where a curve first comes down to `level`, on straight lines between its points; none where it never does (the run is censored). A
/// curve that is below from its first point on counts from there.
pub fn first_at(curve: &[(f64, f64)], level: f64) -> Option<f64> {
    let after = curve.iter().position(|(_, y)| *y <= level)?;
    let (x1, y1) = curve[after];
    Some(match after.checked_sub(1).map(|before| curve[before]) {
        Some((x0, y0)) if y0 > y1 => x0 + (x1 - x0) * (y0 - level) / (y0 - y1),
        _ => x1,
    })
}

/// Mean, lowest and highest of several curves at the points of the first, as far as all of them go.
pub fn band(curves: &[Vec<(f64, f64)>]) -> Vec<(f64, f64, f64, f64)> {
    let Some(first) = curves.first() else { return Vec::new() };
    let end = curves.iter().filter_map(|c| c.last()).map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let points = first.iter().map(|(x, _)| x.min(end));
    points
        .map(|x| {
            let values: Vec<f64> = curves.iter().map(|curve| value_at(curve, x)).collect();
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            (x, mean(&values), low, high)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-9 * b.abs().max(1.0), "{a} is not {b}");
    }

    #[test]
    fn a_paired_interval_by_hand() {
        // Mean 0.2, variance 0.01: standard error 0.1/√3, t of two degrees 4.30265.
        let i = paired(&[0.1, 0.2, 0.3], 0.05).unwrap();
        near(i.estimate, 0.2);
        near(i.high - i.estimate, 4.302_652_729_749_464 * 0.1 / 3f64.sqrt());
        near(i.p, 0.074_179_900_227_448_6);
        assert!(paired(&[0.1], 0.05).is_none());
        let same = paired(&[0.5, 0.5], 0.05).unwrap();
        assert_eq!((same.low, same.high, same.p), (0.5, 0.5, 0.0));
        assert_eq!(paired(&[0.0, 0.0], 0.05).unwrap().p, 1.0);
    }

    #[test]
    fn a_crossed_interval_has_both_sources() {
        // Seeds alone: every block of a seed is alike, so it is the paired interval.
        let seeds = vec![vec![0.1; 4], vec![0.2; 4], vec![0.3; 4]];
        let (a, b) = (crossed(&seeds, &[1.0; 4], 0.05).unwrap(), paired(&[0.1, 0.2, 0.3], 0.05).unwrap());
        near(a.estimate, b.estimate);
        near(a.low, b.low);
        near(a.df, 2.0);
        // Blocks alone: seeds agree, and the interval is that of the blocks.
        let row = [0.1, 0.2, 0.3, 0.2];
        let blocks = vec![row.to_vec(), row.to_vec()];
        let (a, b) = (crossed(&blocks, &[1.0; 4], 0.05).unwrap(), paired(&row, 0.05).unwrap());
        assert!(a.low < b.low && a.df == 1.0, "two seeds are no more than two");
        near(
            (a.high - a.estimate) / two_sided_quantile(0.05, 1.0),
            (b.high - b.estimate) / two_sided_quantile(0.05, 3.0),
        );
        // Blocks of unequal size: the estimate is that of the whole text.
        let a = crossed(&[vec![1.0, 0.0], vec![1.0, 0.0]], &[3.0, 1.0], 0.05).unwrap();
        near(a.estimate, 0.75);
        assert!(crossed(&[row.to_vec()], &[1.0; 4], 0.05).is_none());
    }

    /// How often an interval misses the truth, 0, when seeds and blocks vary as said.
    #[test]
    fn intervals_miss_no_more_often_than_they_say() {
        let mut state = 9u64;
        let mut normal = move || {
            let mut uniform = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
            };
            (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
        };
        for (seeds, alpha) in [(2, 0.05), (3, 0.05), (3, 0.05 / 14.0), (5, 0.05)] {
            for of_seeds in [0.1f64, 0.5, 0.95] {
                let (rounds, blocks) = (4000, 20);
                let missed = (0..rounds)
                    .filter(|_| {
                        let by_block: Vec<f64> = (0..blocks).map(|_| normal()).collect();
                        let rows: Vec<Vec<f64>> = (0..seeds)
                            .map(|_| {
                                let seed = normal() * of_seeds.sqrt();
                                let rest = ((1.0 - of_seeds) * 10.0).sqrt();
                                by_block.iter().map(|b| seed + rest * (b + normal()) / 2f64.sqrt()).collect()
                            })
                            .collect();
                        let i = crossed(&rows, &vec![1.0; blocks], alpha).unwrap();
                        i.low > 0.0 || i.high < 0.0
                    })
                    .count() as f64;
                // Three standard deviations of a count that is as it should be.
                let most = alpha * rounds as f64;
                assert!(missed <= most + 3.0 * most.sqrt(), "{seeds} seeds, {of_seeds}: {missed} of {most}");
            }
        }
    }

    #[test]
    fn ratios_are_means_of_logarithms() {
        let i = ratio(&[0.5, 2.0], &[], 0.05).unwrap();
        near(i.estimate, 1.0);
        near(i.low * i.high, 1.0);
        assert!(ratio(&[0.5, 0.0], &[], 0.05).is_none() && ratio(&[0.5], &[], 0.05).is_none());
        assert_eq!(ratio(&[0.5, 0.5], &[], 0.05).unwrap().high, 0.5f64.ln().exp());
        // Blocks add to it: of four the jackknife variance is 3/4 of the sum of squares.
        let by_block = [-0.1, 0.1, -0.1, 0.1].map(|d| 0.5f64.ln() + d);
        let i = ratio(&[0.5, 0.5], &by_block, 0.05).unwrap();
        near((i.high / i.estimate).ln(), 12.706_204_736_174_7 * (0.75 * 0.04f64).sqrt());
        assert!(ratio(&[0.5, 0.5], &[f64::NAN, 0.1], 0.05).is_none());
    }

    #[test]
    fn holm_by_hand() {
        // Sorted 0.01, 0.02, 0.04: times 3, 2, 1.
        let p = holm(&[0.04, 0.01, 0.02]);
        near(p[0], 0.04);
        near(p[1], 0.03);
        near(p[2], 0.04);
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
        near(alpha_of_each(0.05, 5), 0.01);
    }

    #[test]
    fn curves_are_read_on_straight_lines() {
        let curve = [(1.0, 4.0), (2.0, 2.0), (4.0, 3.0), (5.0, 1.0)];
        assert_eq!(value_at(&curve, 1.5), 3.0);
        assert_eq!(value_at(&curve, 0.0), 4.0);
        assert_eq!(value_at(&curve, 9.0), 1.0);
        assert!(value_at(&[], 1.0).is_nan());
        assert_eq!(first_at(&curve, 3.0), Some(1.5));
        assert_eq!(first_at(&curve, 1.5), Some(4.75));
        assert_eq!(first_at(&curve, 5.0), Some(1.0));
        assert_eq!(first_at(&curve, 0.5), None);
        let two = [vec![(0.0, 1.0), (2.0, 3.0)], vec![(0.0, 3.0), (4.0, 7.0)]];
        assert_eq!(band(&two), [(0.0, 2.0, 1.0, 3.0), (2.0, 4.0, 3.0, 5.0)]);
    }
}
