//! Running means of what experts give, for the gradient of routers (2504.12463).

use std::sync::{Mutex, PoisonError};

/// Of each expert: the running mean of its outputs over optimiser steps, and what this step has seen so far.
#[derive(Debug, Default)]
pub struct RunningMeans(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// \[E, L\]; empty before the first step.
    means: Vec<f32>,
    /// Sums of this step, \[E, L\], and of how many outputs, \[E\].
    sums: Vec<f64>,
    counts: Vec<u64>,
}

impl RunningMeans {
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The means \[E, L\], if a step has been taken.
    pub fn values(&self) -> Option<Vec<f32>> {
        self.with(|state| (!state.means.is_empty()).then(|| state.means.clone()))
    }

    /// Means as they were saved.
    pub fn restore(&self, means: Vec<f32>) {
        self.with(|state| *state = State { means, ..State::default() });
    }

    /// Adds outputs \[N, L\] of `experts` \[N\], of `count` experts.
    pub(super) fn add(
        &self,
        experts: impl Iterator<Item = usize>,
        outputs: &[f32],
        width: usize,
        count: usize,
    ) {
        self.with(|state| {
            state.sums.resize(count * width, 0.0);
            state.counts.resize(count, 0);
            for (e, row) in experts.zip(outputs.chunks_exact(width)).filter(|(e, _)| *e < count) {
                state.counts[e] += 1;
                let sums = state.sums[e * width..][..width].iter_mut();
                sums.zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        });
    }

    /// Ends an optimiser step: means of experts that were used move to those of this step by 1 - `decay`; an expert's first is taken whole.
    pub fn step(&self, decay: f64) {
        self.with(|state| {
            if state.counts.is_empty() {
                return;
            }
            let width = state.sums.len() / state.counts.len();
            state.means.resize(state.sums.len(), 0.0);
            for (e, count) in state.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                // An expert that was never used has 0 for a mean.
                let first = state.means[e * width..][..width].iter().all(|mean| *mean == 0.0);
                for at in e * width..(e + 1) * width {
                    let new = state.sums[at] / *count as f64;
                    let old = f64::from(state.means[at]);
                    state.means[at] = if first { new } else { decay * old + (1.0 - decay) * new } as f32;
                }
            }
            state.sums.clear();
            state.counts.clear();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_follow_the_steps_and_not_how_a_step_is_cut() {
        let (whole, cut) = (RunningMeans::default(), RunningMeans::default());
        for step in 0..3 {
            let x = [1.0 + step as f32, 2.0, 3.0, 4.0, 5.0, 6.0];
            whole.add([0, 1, 0].into_iter(), &x, 2, 3);
            cut.add([0].into_iter(), &x[..2], 2, 3);
            cut.add([1, 0].into_iter(), &x[2..], 2, 3);
            whole.step(0.5);
            cut.step(0.5);
        }
        let got = whole.values().unwrap();
        assert_eq!(got, cut.values().unwrap());
        // Expert 0: 3, 3.5, 4 in its first place; expert 2 was never used.
        assert_eq!(got, [3.625, 4.0, 3.0, 4.0, 0.0, 0.0]);
        let read = RunningMeans::default();
        read.restore(got.clone());
        assert_eq!(read.values(), Some(got));
    }
}
