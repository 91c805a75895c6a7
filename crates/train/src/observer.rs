//! What a training run tells while it runs. Whoever wants to know implements [`Observer`]: a progress bar, a log file,
//! a dashboard, a test. The trainer knows none of them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::alarms::Alarm;
use crate::error::Result;
use crate::schedule::Limits;

/// What is known when a run starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Parameters, each counted once.
    pub parameters: u64,
    /// Parameters that one token meets (see [`crate::presets::Footprint`]).
    pub active_parameters: u64,
    /// Tokens to train on in all, where the data have an end; for people only.
    pub training_tokens: Option<u64>,
    /// Tokens of one optimiser step.
    pub tokens_per_step: u64,
    /// When the run ends.
    pub limits: Limits,
    /// The last step that is already done, when an earlier run is continued.
    pub resumed_from: Option<u64>,
    /// Seconds of training before this process, when an earlier run is continued.
    pub seconds_before: f64,
    /// Threads in use.
    pub threads: usize,
}

/// One optimiser step: a line of `metrics.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimiser steps done, this one included: the first is 1.
    pub step: u64,
    /// Tokens trained on so far, this step included.
    pub tokens: u64,
    /// Mean next-token cross-entropy in nats, without any balance term.
    pub loss: f64,
    /// What is minimised: `loss` and every term times its coefficient.
    pub total: f64,
    /// Every balance term by name, before its coefficient.
    pub losses: BTreeMap<String, f64>,
    /// The learning rate of this step.
    pub lr: f64,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// Speed of this step.
    pub tokens_per_second: f64,
    /// Every MoE layer's load.
    pub layers: Vec<LayerStats>,
}

/// How one MoE layer's tokens were spread over its experts, in one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerStats {
    /// The layer's place in the model, from 0; dense layers are counted too.
    pub layer: usize,
    /// Coefficient of variation of the experts' loads (population): 0 is even.
    pub load_cv: f64,
    /// Entropy of the load over ln E: 1 is even, 0 is one expert for all.
    pub entropy: f64,
    /// Experts without a token in this step.
    pub dead: usize,
    /// Assignments dropped for want of capacity.
    pub drops: u64,
    /// Share of the assignments by expert \[E\]; sums to 1.
    pub load: Vec<f32>,
}

impl LayerStats {
    /// The figures of a layer from its assignments by expert \[E\].
    pub fn from_counts(layer: usize, counts: &[u64], drops: u64) -> Self {
        let experts = counts.len() as f64;
        let sum = counts.iter().sum::<u64>() as f64;
        if counts.is_empty() || sum == 0.0 {
            return Self {
                layer,
                dead: counts.len(),
                drops,
                load: vec![0.0; counts.len()],
                ..Self::default()
            };
        }
        let share = |&c: &u64| c as f64 / sum;
        let variance = counts.iter().map(|c| (share(c) * experts - 1.0).powi(2)).sum::<f64>() / experts;
        let entropy: f64 = counts.iter().map(share).filter(|&f| f > 0.0).map(|f| -f * f.ln()).sum();
        Self {
            layer,
            load_cv: variance.sqrt(),
            entropy: if counts.len() == 1 { 1.0 } else { (entropy / experts.ln()).clamp(0.0, 1.0) },
            dead: counts.iter().filter(|&&c| c == 0).count(),
            drops,
            load: counts.iter().map(|c| share(c) as f32).collect(),
        }
    }
}

/// One evaluation on held-out text: a line of `metrics.jsonl`, told apart by `eval_loss`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean next-token cross-entropy in nats.
    pub eval_loss: f64,
    /// Bits per byte of text.
    pub bits_per_byte: f64,
    /// Tokens that were predicted.
    pub eval_tokens: u64,
    /// The same by domain.
    pub domains: BTreeMap<String, DomainEval>,
}

/// Held-out loss of one domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainEval {
    /// Mean next-token cross-entropy in nats.
    pub loss: f64,
    /// Bits per byte of text.
    pub bits_per_byte: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Its steps, tokens or minutes were used up.
    Done,
    /// The user asked it to stop; it can be resumed.
    Interrupted,
}

/// What is known when a run ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Why it ended.
    pub ending: Ending,
    /// Optimiser steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Time spent training, over all resumptions.
    pub seconds: f64,
    /// Training speed over this process's share of the run.
    pub tokens_per_second: f64,
    /// The last evaluation.
    pub eval: Option<EvalRecord>,
}

/// Watches a run. Every method does nothing unless it is written; an error ends the run.
pub trait Observer {
    /// The run is about to take its first step.
    fn started(&mut self, _info: &RunInfo) -> Result<()> {
        Ok(())
    }
    /// A step is done.
    fn step(&mut self, _record: &StepRecord) -> Result<()> {
        Ok(())
    }
    /// The model has been evaluated.
    fn evaluated(&mut self, _record: &EvalRecord) -> Result<()> {
        Ok(())
    }
    /// Something is going wrong.
    fn alarm(&mut self, _alarm: &Alarm) -> Result<()> {
        Ok(())
    }
    /// What was told so far must be safe on disk: a checkpoint of `step` is about to be completed. A resumed run never
    /// tells again what came before its checkpoint.
    fn saving(&mut self, _step: u64) -> Result<()> {
        Ok(())
    }
    /// A checkpoint is complete.
    fn saved(&mut self, _step: u64, _path: &Path) -> Result<()> {
        Ok(())
    }
    /// The run is over.
    fn finished(&mut self, _summary: &Summary) -> Result<()> {
        Ok(())
    }
}

/// Several observers as one; they are told in order.
#[derive(Default)]
pub struct Observers<'a>(Vec<Box<dyn Observer + 'a>>);

impl<'a> Observers<'a> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more.
    pub fn with(mut self, observer: impl Observer + 'a) -> Self {
        self.0.push(Box::new(observer));
        self
    }

    /// One more.
    pub fn push(&mut self, observer: impl Observer + 'a) {
        self.0.push(Box::new(observer));
    }
}

impl Observer for Observers<'_> {
    fn started(&mut self, info: &RunInfo) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.started(info))
    }
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.step(record))
    }
    fn evaluated(&mut self, record: &EvalRecord) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.evaluated(record))
    }
    fn alarm(&mut self, alarm: &Alarm) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.alarm(alarm))
    }
    fn saving(&mut self, step: u64) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.saving(step))
    }
    fn saved(&mut self, step: u64, path: &Path) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.saved(step, path))
    }
    fn finished(&mut self, summary: &Summary) -> Result<()> {
        self.0.iter_mut().try_for_each(|o| o.finished(summary))
    }
}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn started(&mut self, info: &RunInfo) -> Result<()> {
        (**self).started(info)
    }
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        (**self).step(record)
    }
    fn evaluated(&mut self, record: &EvalRecord) -> Result<()> {
        (**self).evaluated(record)
    }
    fn alarm(&mut self, alarm: &Alarm) -> Result<()> {
        (**self).alarm(alarm)
    }
    fn saving(&mut self, step: u64) -> Result<()> {
        (**self).saving(step)
    }
    fn saved(&mut self, step: u64, path: &Path) -> Result<()> {
        (**self).saved(step, path)
    }
    fn finished(&mut self, summary: &Summary) -> Result<()> {
        (**self).finished(summary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_even_load_and_a_collapsed_one() {
        let even = LayerStats::from_counts(3, &[5, 5, 5, 5], 0);
        assert_eq!((even.layer, even.load_cv, even.dead), (3, 0.0, 0));
        assert!((even.entropy - 1.0).abs() < 1e-12);
        let one = LayerStats::from_counts(0, &[0, 20, 0, 0], 2);
        assert_eq!((one.entropy, one.dead, one.drops), (0.0, 3, 2));
        assert!((one.load_cv - 3f64.sqrt()).abs() < 1e-12);
        assert_eq!(LayerStats::from_counts(0, &[], 0).load_cv, 0.0);
        assert_eq!(LayerStats::from_counts(0, &[0, 0], 0).dead, 2);
        assert_eq!(LayerStats::from_counts(0, &[7], 0).entropy, 1.0);
    }

    proptest! {
        #[test]
        fn figures_stay_in_their_bounds(counts in prop::collection::vec(0u64..1000, 1..70)) {
            let s = LayerStats::from_counts(0, &counts, 0);
            prop_assert!((0.0..=1.0).contains(&s.entropy));
            prop_assert!(s.load_cv >= 0.0 && s.load_cv <= (counts.len() as f64 - 1.0).sqrt() + 1e-9);
            if counts.iter().sum::<u64>() > 0 {
                prop_assert!((s.load.iter().sum::<f32>() - 1.0).abs() < 1e-4);
            }
        }
    }
}
