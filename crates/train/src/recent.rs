//! The last steps of a run, and what they come to: single steps jump about.

use std::collections::VecDeque;

use crate::observer::StepRecord;

/// The newest steps, a fixed number of them at most.
#[derive(Clone, Debug)]
pub struct Recent {
    most: usize,
    steps: VecDeque<StepRecord>,
}

impl Recent {
    /// Of the newest `most` steps (1 at least); none yet.
    pub fn of(most: usize) -> Self {
        Self { most: most.max(1), steps: VecDeque::new() }
    }

    /// One more step; the oldest gives way.
    pub fn push(&mut self, record: StepRecord) {
        if self.steps.len() == self.most {
            self.steps.pop_front();
        }
        self.steps.push_back(record);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The newest step.
    pub fn last(&self) -> Option<&StepRecord> {
        self.steps.back()
    }

    /// The mean of a figure over the steps.
    pub fn mean(&self, of: impl Fn(&StepRecord) -> f64) -> Option<f64> {
        (!self.is_empty()).then(|| self.steps.iter().map(of).sum::<f64>() / self.steps.len() as f64)
    }

    /// Each MoE layer's number and its load over the steps: shares \[E\] that sum to 1.
    pub fn loads(&self) -> Vec<(usize, Vec<f64>)> {
        let Some(first) = self.steps.front() else { return Vec::new() };
        let mut means: Vec<(usize, Vec<f64>)> =
            first.layers.iter().map(|layer| (layer.layer, vec![0.0; layer.load.len()])).collect();
        for step in &self.steps {
            for ((_, mean), layer) in means.iter_mut().zip(&step.layers) {
                for (mean, share) in mean.iter_mut().zip(&layer.load) {
                    *mean += f64::from(*share) / self.steps.len() as f64;
                }
            }
        }
        means
    }

    /// Assignments that a layer dropped per step.
    pub fn drops(&self, layer: usize) -> f64 {
        let of_layer = self.steps.iter().flat_map(|step| &step.layers).filter(|l| l.layer == layer);
        of_layer.map(|l| l.drops as f64).sum::<f64>() / self.steps.len().max(1) as f64
    }
}

/// Coefficient of variation (population) of shares.
pub fn cv(load: &[f64]) -> f64 {
    let experts = load.len() as f64;
    (load.iter().map(|share| (share * experts - 1.0).powi(2)).sum::<f64>() / experts.max(1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::LayerStats;

    fn step(step: u64, loss: f64, counts: &[u64], drops: u64) -> StepRecord {
        StepRecord {
            step,
            loss,
            layers: vec![LayerStats::from_counts(1, counts, drops)],
            ..StepRecord::default()
        }
    }

    #[test]
    fn only_the_newest_count() {
        let mut recent = Recent::of(2);
        assert!(recent.is_empty() && recent.loads().is_empty() && recent.mean(|s| s.loss).is_none());
        for record in [step(1, 9.0, &[1, 0], 8), step(2, 3.0, &[1, 1], 2), step(3, 1.0, &[0, 1], 1)] {
            recent.push(record);
        }
        assert_eq!((recent.len(), recent.last().map(|s| s.step)), (2, Some(3)));
        assert_eq!(recent.mean(|s| s.loss), Some(2.0));
        assert_eq!(recent.loads(), [(1, vec![0.25, 0.75])]);
        assert_eq!((recent.drops(1), recent.drops(0)), (1.5, 0.0));
        assert_eq!(cv(&recent.loads()[0].1), 0.5);
    }
}
