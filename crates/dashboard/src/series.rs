//! Figures over the steps of a run, in bounded memory: when there are too many points, neighbours become one.

/// Means of `width` figures over stretches of steps. All stretches but the last hold equally many steps.
#[derive(Clone, Debug)]
pub struct Series {
    width: usize,
    most: usize,
    /// Steps that a whole stretch holds.
    stride: u64,
    stretches: Vec<Stretch>,
}

#[derive(Clone, Debug)]
struct Stretch {
    steps: u64,
    step_sum: f64,
    sums: Vec<f64>,
}

impl Stretch {
    fn take(&mut self, other: &Self) {
        self.steps += other.steps;
        self.step_sum += other.step_sum;
        for (sum, more) in self.sums.iter_mut().zip(&other.sums) {
            *sum += more;
        }
    }
}

impl Series {
    /// Of `width` figures a step, `most` points at most (2 at least).
    pub fn new(width: usize, most: usize) -> Self {
        Self { width, most: most.max(2), stride: 1, stretches: Vec::new() }
    }

    /// One more step with its figures; missing ones count as NaN, and so does every mean with one in it.
    pub fn push(&mut self, step: u64, figures: impl IntoIterator<Item = f64>) {
        let mut sums: Vec<f64> = figures.into_iter().take(self.width).collect();
        sums.resize(self.width, f64::NAN);
        let one = Stretch { steps: 1, step_sum: step as f64, sums };
        match self.stretches.last_mut() {
            Some(last) if last.steps < self.stride => last.take(&one),
            _ => {
                if self.stretches.len() == self.most {
                    self.halve();
                }
                match self.stretches.last_mut() {
                    Some(last) if last.steps < self.stride => last.take(&one),
                    _ => self.stretches.push(one),
                }
            }
        }
    }

    fn halve(&mut self) {
        self.stride *= 2;
        self.stretches = self
            .stretches
            .chunks(2)
            .map(|pair| {
                let mut first = pair[0].clone();
                if let Some(second) = pair.get(1) {
                    first.take(second);
                }
                first
            })
            .collect();
    }

    /// How many points there are.
    pub fn len(&self) -> usize {
        self.stretches.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.stretches.is_empty()
    }

    /// The mean step of each point.
    pub fn steps(&self) -> impl Iterator<Item = f64> + '_ {
        self.stretches.iter().map(|stretch| stretch.step_sum / stretch.steps as f64)
    }

    /// The mean of figure `which` at each point; NaN where there is no such figure.
    pub fn figure(&self, which: usize) -> impl Iterator<Item = f64> + '_ {
        self.stretches
            .iter()
            .map(move |stretch| stretch.sums.get(which).copied().unwrap_or(f64::NAN) / stretch.steps as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_means_of_equal_stretches() {
        for most in [2, 3, 4, 7, 8] {
            for steps in [1u64, 2, 5, 8, 9, 64, 1000] {
                let mut series = Series::new(2, most);
                for step in 1..=steps {
                    series.push(step, [step as f64, 1.0]);
                }
                assert!(series.len() <= most && !series.is_empty());
                // Weighted by how long they are, the means give back the whole.
                let held: u64 = series.stretches.iter().map(|s| s.steps).sum();
                assert_eq!(held, steps);
                let whole: f64 = series.stretches.iter().map(|s| s.sums[0]).sum();
                assert_eq!(whole, (steps * (steps + 1) / 2) as f64);
                assert!(series.steps().zip(series.figure(0)).all(|(step, mean)| step == mean));
                assert!(series.figure(1).all(|mean| mean == 1.0));
                let whole = &series.stretches[..series.len() - 1];
                assert!(whole.iter().all(|s| s.steps == series.stride), "{most} {steps}");
            }
        }
    }

    #[test]
    fn what_is_missing_is_not_a_number() {
        let mut series = Series::new(3, 4);
        series.push(1, [1.0]);
        assert!(series.figure(2).all(f64::is_nan) && series.figure(9).all(f64::is_nan));
        assert_eq!(series.figure(0).next(), Some(1.0));
    }
}
