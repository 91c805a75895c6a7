//! Ablations: what switching an expert off does to the loss, and whether that bears out a label.
//!
//! The model runs elsewhere, twice over the same tokens: as it is, and with the expert taken out. Here the differences are
//! summed up. Tokens of one document go well or badly together, so a standard error goes by documents, not by tokens.

use super::label::{Label, LabelKind};
use crate::error::{InsightError, Result};
use crate::statistics::numbers::{normal_quantile, ratio};
use crate::trace::Trace;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The probability by chance, on one side, below which a difference counts.
pub const LEVEL: f64 = 0.01;

/// Texts that a mean must be over to be compared.
pub(super) const FEWEST_TEXTS: u64 = 3;

/// What some tokens lose: the mean of (loss with the expert off) - (loss without the ablation), in nats per token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// The mean over tokens.
    pub mean: f64,
    /// Its standard error, from the differences between documents. None for one document.
    pub standard_error: Option<f64>,
    /// Tokens.
    pub count: u64,
    /// Documents that they are from.
    pub texts: u64,
}

impl Delta {
    /// That of tokens given by their document and their difference. None of no tokens.
    pub fn of(deltas: impl Iterator<Item = (u32, f64)>) -> Option<Self> {
        let mut sums = Sums::default();
        deltas.for_each(|(text, delta)| sums.add(text, delta));
        sums.delta()
    }
}

/// Sums of differences, and how many they are of, by document.
#[derive(Clone, Default)]
struct Sums(BTreeMap<u32, (f64, u64)>);

impl Sums {
    fn add(&mut self, text: u32, delta: f64) {
        if delta.is_finite() {
            let (sum, count) = self.0.entry(text).or_default();
            *sum += delta;
            *count += 1;
        }
    }

    fn delta(&self) -> Option<Delta> {
        let texts = &self.0;
        let count: u64 = texts.values().map(|(_, count)| count).sum();
        let n = count as f64;
        let mean = ratio(texts.values().map(|(sum, _)| sum).sum(), n)?;
        // The mean is a ratio of sums over texts; this is its error by linearisation, with texts as the units.
        let groups = texts.len() as f64;
        let square: f64 = texts.values().map(|(sum, count)| (sum - mean * *count as f64).powi(2)).sum();
        let error = (groups / (groups - 1.0) * square).sqrt() / n;
        let standard_error = (texts.len() > 1 && error.is_finite()).then_some(error);
        Some(Delta { mean, standard_error, count, texts: texts.len() as u64 })
    }
}

/// What switching an expert off does, with a label in mind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ablation {
    /// The layer, by number.
    pub layer: usize,
    /// The expert.
    pub expert: u16,
    /// Over all tokens.
    pub all: Option<Delta>,
    /// By domain: \[D\].
    pub domains: Vec<Option<Delta>>,
    /// Over the tokens that the label is true of.
    pub labelled: Option<Delta>,
    /// Over all others.
    pub others: Option<Delta>,
}

impl Ablation {
    /// Sums up an ablation of a layer's expert: `off` has the loss of each token of the trace with the expert switched off, \[N\]. Tokens that
    /// have no loss there or in the trace do not count.
    pub fn of(trace: &Trace, layer: usize, expert: u16, label: &Label, off: &[f32]) -> Result<Self> {
        trace.validate()?;
        let n = trace.len();
        if off.len() != n {
            return Err(InsightError::trace(format!(
                "{} losses with an expert off, the trace has {n}",
                off.len()
            )));
        }
        let covers = label.covering(trace);
        let mut domains = vec![Sums::default(); trace.about.domains.len()];
        let [mut all, mut labelled, mut others] = [const { Sums(BTreeMap::new()) }; 3];
        for row in 0..n {
            let (text, delta) = (trace.document(row), f64::from(off[row]) - f64::from(trace.loss[row]));
            all.add(text, delta);
            domains[usize::from(trace.domains[row])].add(text, delta);
            if covers(row) { labelled.add(text, delta) } else { others.add(text, delta) }
        }
        Ok(Self {
            layer,
            expert,
            all: all.delta(),
            domains: domains.iter().map(Sums::delta).collect(),
            labelled: labelled.delta(),
            others: others.delta(),
        })
    }
}

/// What a check by ablation says of a label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Without the expert the model loses where the label says, more than elsewhere and more than without another expert.
    Confirmed,
    /// It does not, or there is too little to tell.
    #[default]
    Unclear,
}

/// A verdict and what it rests on. Each comparison is a difference over its standard error; None where it cannot be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Confirmation {
    /// Confirmed if all three comparisons are above what they need.
    pub verdict: Verdict,
    /// What the labelled tokens lose, against what the others lose.
    pub over_others: Compared,
    /// What the labelled tokens lose, against what they lose without the control.
    pub over_control: Compared,
    /// By how much the labelled tokens lose more than others, against the same without the control: tokens that any ablation hurts more
    /// confirm nothing.
    pub contrast: Compared,
}

/// A difference, in standard errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// The difference over its standard error. By chance it is about 0, give or take 1.
    pub z: Option<f64>,
    /// What it must exceed: the quantile of Student's t at [`LEVEL`] on one side, for one degree of freedom less than the
    /// fewest texts that a mean is over.
    pub needed: Option<f64>,
}

impl Compared {
    /// A sum of means with these signs.
    fn of(parts: &[(f64, &Delta)]) -> Self {
        let fewest = parts.iter().map(|(_, delta)| delta.texts).min().unwrap_or(0);
        let errors: Option<Vec<f64>> = parts.iter().map(|(_, delta)| delta.standard_error).collect();
        let Some(errors) = errors.filter(|_| fewest >= FEWEST_TEXTS) else { return Self::default() };
        let difference: f64 = parts.iter().map(|(sign, delta)| sign * delta.mean).sum();
        // Means over the same texts rise and fall together; taking them for independent errs on the safe side.
        let error = errors.iter().map(|error| error * error).sum::<f64>().sqrt();
        let z = ratio(difference, error);
        Self { z, needed: z.map(|_| student(fewest - 1)) }
    }

    fn holds(&self) -> bool {
        self.z.zip(self.needed).is_some_and(|(z, needed)| z > needed)
    }
}

/// Whether an ablation bears out a label: only if the tokens that the label is true of lose, significantly more than all others, and both
/// significantly more than with a control, another expert of the same layer drawn at random, switched off.
pub fn confirm(label: &Label, ablation: &Ablation, control: &Ablation) -> Confirmation {
    let same_place = ablation.layer == control.layer && ablation.expert != control.expert;
    if label.kind == LabelKind::None || !same_place {
        return Confirmation::default();
    }
    let parts = (ablation.labelled, ablation.others, control.labelled, control.others);
    let (Some(mine), Some(others), Some(theirs), Some(their_others)) = parts else {
        return Confirmation::default();
    };
    let over_others = Compared::of(&[(1.0, &mine), (-1.0, &others)]);
    let over_control = Compared::of(&[(1.0, &mine), (-1.0, &theirs)]);
    let contrast = Compared::of(&[(1.0, &mine), (-1.0, &others), (-1.0, &theirs), (1.0, &their_others)]);
    let all = mine.mean > 0.0 && over_others.holds() && over_control.holds() && contrast.holds();
    let verdict = if all { Verdict::Confirmed } else { Verdict::Unclear };
    Confirmation { verdict, over_others, over_control, contrast }
}

/// The quantile of Student's t at [`LEVEL`] on one side, for `freedom` degrees.
pub(super) fn student(freedom: u64) -> f64 {
    // Beyond, the two distributions differ by less than 1 % of the quantile.
    const NORMAL: u64 = 200;
    if freedom > NORMAL {
        return normal_quantile(1.0 - LEVEL);
    }
    let (mut low, mut high) = (0.0, 1e3);
    for _ in 0..80 {
        let middle = 0.5 * (low + high);
        if student_tail(middle, freedom) > LEVEL { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// P(T > t) of Student's t, t ≥ 0: the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
fn student_tail(t: f64, freedom: u64) -> f64 {
    let angle = (t / (freedom as f64).sqrt()).atan();
    let (sin, cos) = angle.sin_cos();
    let odd = freedom % 2 == 1;
    // Powers of the cosine up to ν - 2, each term from the one before.
    let (mut term, mut sum) = (if odd { cos } else { 1.0 }, 0.0);
    let mut power = if odd { 1 } else { 0 };
    while power + 2 <= freedom {
        sum += term;
        term *= cos * cos * (power + 1) as f64 / (power + 2) as f64;
        power += 2;
    }
    let within = if odd { std::f64::consts::FRAC_2_PI * (angle + sin * sum) } else { sin * sum };
    0.5 * (1.0 - within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_student_are_those_of_tables() {
        for (freedom, wanted) in [
            (2, 6.964_557),
            (3, 4.540_703),
            (4, 3.746_947),
            (9, 2.821_438),
            (30, 2.457_262),
            (100, 2.364_217),
        ] {
            assert!((student(freedom) - wanted).abs() < 1e-4, "{freedom}: {}", student(freedom));
        }
        assert!((student(1000) - 2.326_348).abs() < 1e-5);
    }

    #[test]
    fn an_error_goes_by_texts() {
        // Tokens of a text that all differ by the same are one observation each.
        let found = Delta::of((0..4).flat_map(|text| (0..10).map(move |_| (text, f64::from(text))))).unwrap();
        assert_eq!((found.mean, found.count, found.texts), (1.5, 40, 4));
        let of_four = (5.0f64 / 3.0).sqrt() / 2.0;
        assert!((found.standard_error.unwrap() - of_four).abs() < 1e-12);
        assert_eq!(Delta::of([(0, 1.0), (0, f64::NAN)].into_iter()).unwrap().standard_error, None);
        assert_eq!(Delta::of(std::iter::empty()), None);
    }

    #[test]
    fn a_label_is_confirmed_only_against_others_and_against_the_control() {
        let delta = |mean: f64| Some(Delta { mean, standard_error: Some(0.01), count: 100, texts: 20 });
        let of = |expert: u16, labelled: f64, others: f64| Ablation {
            expert,
            labelled: delta(labelled),
            others: delta(others),
            ..Ablation::default()
        };
        let label = Label { kind: LabelKind::Domain, domain: Some(0), ..Label::default() };
        let verdict = |mine: &Ablation, control: &Ablation| confirm(&label, mine, control).verdict;
        let quiet = of(1, 0.0, 0.0);
        assert_eq!(verdict(&of(0, 0.5, 0.1), &quiet), Verdict::Confirmed);
        assert_eq!(verdict(&of(0, 0.5, 0.5), &quiet), Verdict::Unclear);
        assert_eq!(verdict(&of(0, 0.5, 0.1), &of(1, 0.5, 0.1)), Verdict::Unclear);
        // Less harm than elsewhere is no harm.
        assert_eq!(verdict(&of(0, -0.1, -0.5), &of(1, -0.4, -0.4)), Verdict::Unclear);
        // Another expert hurts these tokens less, but they lose more than others by as much.
        assert_eq!(verdict(&of(0, 0.9, 0.6), &of(1, 0.4, 0.1)), Verdict::Unclear);
        assert_eq!(verdict(&of(0, 0.5, 0.1), &of(0, 0.0, 0.0)), Verdict::Unclear);
        let none = Label::default();
        assert_eq!(confirm(&none, &of(0, 0.5, 0.1), &quiet), Confirmation::default());
        let few = |ablation: Ablation| Ablation {
            labelled: Some(Delta { texts: 2, ..ablation.labelled.unwrap() }),
            ..ablation
        };
        assert_eq!(verdict(&few(of(0, 0.5, 0.1)), &quiet), Verdict::Unclear);
    }
}
