//! What goes wrong in a run, noticed while it runs: experts that die, routers that collapse, loads that drift apart, a
//! loss that jumps. Each is told once, with a remedy, and again only after it had passed.

use std::collections::{BTreeMap, BTreeSet};

use senmon_moe::router;
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::observer::{LayerStats, StepRecord};

/// Something is going wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alarm {
    /// The step in which it was noticed.
    pub step: u64,
    /// What.
    pub kind: AlarmKind,
    /// The layer it is about, from 0.
    pub layer: Option<usize>,
    /// The experts it is about, from 0.
    pub experts: Vec<usize>,
    /// What was seen, in one line.
    pub message: String,
    /// What to try, in one line.
    pub remedy: String,
}

/// The kinds of alarms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlarmKind {
    /// Experts have had no token for many steps.
    DeadExpert,
    /// A router sends nearly everything to as few experts as it can.
    Collapsed,
    /// The loads of a layer's experts have been far apart for many steps.
    LoadCv,
    /// The loss is far above what it was.
    LossSpike,
}

/// When an alarm is raised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlarmBounds {
    /// An expert without a token for this many steps is dead.
    pub dead_steps: u64,
    /// A load CV above this, for [`sustained`](Self::sustained) steps, is too much; below 0.8 of it, it has passed.
    pub load_cv: f64,
    /// A router whose evenness (0: K experts take all; 1: all take the same) stays below this has collapsed; above
    /// twice that, it has recovered.
    pub evenness: f64,
    /// A router that sends more than this share of the tokens to one expert has collapsed too.
    pub share: f64,
    /// Steps that a load must stay bad.
    pub sustained: u64,
    /// A loss this many mean deviations, and at least a tenth, above its running mean is a spike.
    pub spike: f64,
    /// Steps before the loss is watched.
    pub spike_after: u64,
}

impl Default for AlarmBounds {
    fn default() -> Self {
        Self {
            dead_steps: 100,
            load_cv: 1.0,
            evenness: 0.25,
            share: 0.95,
            sustained: 50,
            spike: 8.0,
            spike_after: 50,
        }
    }
}

/// Watches the steps of a run. It is part of the run's state: serialised and read back, it goes on as if it had never
/// stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alarms {
    bounds: AlarmBounds,
    remedies: Remedies,
    layers: BTreeMap<usize, LayerWatch>,
    loss: LossWatch,
}

/// What the run's configuration says of balancing, for the remedies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Remedies {
    top_k: usize,
    aux: f64,
    bias_rate: f64,
    has_bias: bool,
    lr: f64,
    clip: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct LayerWatch {
    /// Steps since each expert \[E\] last had a token.
    idle: Vec<u64>,
    /// Experts already told of.
    dead: BTreeSet<usize>,
    cv: Sustained,
    collapse: Sustained,
}

/// Something that must last before it is told, and be gone before it is told again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sustained {
    steps: u64,
    raised: bool,
}

impl Sustained {
    /// True in the one step in which it has lasted long enough.
    fn see(&mut self, bad: bool, good: bool, long: u64) -> bool {
        self.steps = if bad { self.steps + 1 } else { 0 };
        if self.raised {
            self.raised = !good;
            return false;
        }
        self.raised = bad && self.steps >= long;
        self.raised
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct LossWatch {
    steps: u64,
    mean: f64,
    deviation: f64,
    raised: bool,
}

impl Alarms {
    /// Watches a run of this configuration.
    pub fn new(bounds: AlarmBounds, config: &RunConfig) -> Self {
        Self {
            bounds,
            remedies: Remedies {
                top_k: config.experts.top_k,
                aux: config.balance.aux,
                bias_rate: config.balance.bias_rate,
                has_bias: router::kind(&config.router.kind).is_ok_and(|kind| kind.selection_bias),
                lr: config.optimizer.lr,
                clip: config.optimizer.clip,
            },
            layers: BTreeMap::new(),
            loss: LossWatch::default(),
        }
    }

    /// Looks at a step; answers what has newly gone wrong.
    pub fn watch(&mut self, record: &StepRecord) -> Vec<Alarm> {
        let mut found = Vec::new();
        for stats in &record.layers {
            let watch = self.layers.entry(stats.layer).or_default();
            watch.see(record.step, stats, &self.bounds, &self.remedies, &mut found);
        }
        found.extend(self.loss.see(record, &self.bounds, &self.remedies));
        found
    }
}

impl LayerWatch {
    fn see(
        &mut self,
        step: u64,
        stats: &LayerStats,
        bounds: &AlarmBounds,
        remedies: &Remedies,
        found: &mut Vec<Alarm>,
    ) {
        let experts = stats.load.len();
        let top_k = remedies.top_k.clamp(1, experts.max(1));
        if experts < 2 || top_k >= experts {
            return;
        }
        let mut raise = |kind, experts: Vec<usize>, message: String| {
            let remedy = remedies.of(kind);
            found.push(Alarm { step, kind, layer: Some(stats.layer), experts, message, remedy });
        };

        self.idle.resize(experts, 0);
        let mut newly = Vec::new();
        for (expert, (&load, idle)) in stats.load.iter().zip(&mut self.idle).enumerate() {
            *idle = if load > 0.0 { 0 } else { *idle + 1 };
            if load > 0.0 {
                self.dead.remove(&expert);
            } else if *idle >= bounds.dead_steps && self.dead.insert(expert) {
                newly.push(expert);
            }
        }
        if !newly.is_empty() {
            let who = if newly.len() == 1 { "expert" } else { "experts" };
            let list = newly.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let message = format!(
                "layer {}: {who} {list} had no token for {} steps ({} of {experts} are dead)",
                stats.layer,
                bounds.dead_steps,
                self.dead.len()
            );
            raise(AlarmKind::DeadExpert, newly, message);
        }

        // The least entropy that K experts per token allow is ln K / ln E.
        let least = (top_k as f64).ln() / (experts as f64).ln();
        let evenness = (stats.entropy - least) / (1.0 - least);
        let (busiest, share) = stats
            .load
            .iter()
            .enumerate()
            .map(|(expert, &load)| (expert, f64::from(load) * top_k as f64))
            .fold((0, 0.0), |best, next| if next.1 > best.1 { next } else { best });
        let bad = evenness < bounds.evenness || share > bounds.share;
        let good = evenness > 2.0 * bounds.evenness && share < 0.9 * bounds.share;
        if self.collapse.see(bad, good, bounds.sustained) {
            let message = format!(
                "layer {}: the router has collapsed: expert {busiest} gets {:.0} % of the tokens, the load's entropy is \
                 {:.2} (even: 1)",
                stats.layer,
                100.0 * share,
                stats.entropy
            );
            raise(AlarmKind::Collapsed, vec![busiest], message);
        }

        let (bad, good) = (stats.load_cv > bounds.load_cv, stats.load_cv < 0.8 * bounds.load_cv);
        if self.cv.see(bad, good, bounds.sustained) && !self.collapse.raised {
            let message = format!(
                "layer {}: the load's coefficient of variation is {:.2}, above {} for {} steps; expert {busiest} is the \
                 busiest",
                stats.layer, stats.load_cv, bounds.load_cv, bounds.sustained
            );
            raise(AlarmKind::LoadCv, vec![busiest], message);
        }
    }
}

impl LossWatch {
    fn see(&mut self, record: &StepRecord, bounds: &AlarmBounds, remedies: &Remedies) -> Option<Alarm> {
        let loss = record.loss;
        if !loss.is_finite() {
            return None;
        }
        if self.steps == 0 {
            (self.mean, self.deviation) = (loss, 0.0);
        }
        self.steps += 1;
        let limit = self.mean + (bounds.spike * self.deviation).max(0.1 * self.mean.abs());
        let alarm = (self.steps > bounds.spike_after && loss > limit && !self.raised).then(|| Alarm {
            step: record.step,
            kind: AlarmKind::LossSpike,
            layer: None,
            experts: Vec::new(),
            message: format!("the loss jumped to {loss:.3}, from {:.3} on average", self.mean),
            remedy: remedies.of(AlarmKind::LossSpike),
        });
        if alarm.is_some() {
            self.raised = true;
        } else if loss < self.mean + 0.5 * (limit - self.mean) {
            self.raised = false;
        }
        // A spike moves the mean no further than the limit does, so that a new level becomes the normal one in time.
        let seen = if self.steps > bounds.spike_after { loss.min(limit) } else { loss };
        let rate = (1.0 / self.steps as f64).max(0.05);
        self.deviation += rate * ((seen - self.mean).abs() - self.deviation);
        self.mean += rate * (seen - self.mean);
        alarm
    }
}

impl Remedies {
    fn of(&self, kind: AlarmKind) -> String {
        let more_balance = if self.has_bias {
            let rate = if self.bias_rate > 0.0 { 2.0 * self.bias_rate } else { 1e-3 };
            format!("--set balance.bias_rate={}", tidy(rate))
        } else {
            let aux = if self.aux > 0.0 { 2.0 * self.aux } else { 0.01 };
            format!("--set balance.aux={}", tidy(aux))
        };
        let slower = tidy(self.lr / 2.0);
        match kind {
            AlarmKind::DeadExpert => format!(
                "try {more_balance}; an expert that stays dead costs memory and does nothing, fewer experts would do"
            ),
            AlarmKind::Collapsed => {
                format!(
                    "try {more_balance}, --set balance.z=0.001, or a lower rate: --set optimizer.lr={slower}"
                )
            }
            AlarmKind::LoadCv => format!("try {more_balance}"),
            AlarmKind::LossSpike if self.clip == 0.0 => {
                format!("try --set optimizer.clip=1, or a lower rate: --set optimizer.lr={slower}")
            }
            AlarmKind::LossSpike => {
                format!("if it does not come down, go back to a checkpoint with --set optimizer.lr={slower}")
            }
        }
    }
}

/// A number with at most three digits that count.
fn tidy(x: f64) -> f64 {
    format!("{x:.2e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(step: u64, loss: f64, counts: &[u64]) -> StepRecord {
        StepRecord {
            step,
            loss,
            layers: vec![LayerStats::from_counts(2, counts, 0)],
            ..StepRecord::default()
        }
    }

    /// Runs `counts` for a number of steps each; answers (step, kind, experts) of every alarm.
    fn alarms(config: &RunConfig, phases: &[(u64, &[u64])]) -> Vec<Alarm> {
        let mut watch = Alarms::new(AlarmBounds::default(), config);
        let mut step = 0;
        let mut all = Vec::new();
        for (steps, counts) in phases {
            for _ in 0..*steps {
                step += 1;
                all.extend(watch.watch(&record(step, 1.0, counts)));
                // The state survives being saved at any step.
                let saved = serde_json::to_string(&watch).unwrap();
                watch = serde_json::from_str(&saved).unwrap();
            }
        }
        all
    }

    const EVEN: &[u64] = &[10; 8];

    #[test]
    fn dead_experts_are_told_once_and_again_after_they_lived() {
        let two_dead: &[u64] = &[12, 0, 10, 10, 0, 10, 12, 10];
        let found = alarms(
            &RunConfig::default(),
            &[(99, two_dead), (1, EVEN), (300, two_dead), (1, EVEN), (100, two_dead)],
        );
        let seen: Vec<_> = found.iter().map(|a| (a.step, a.kind, a.layer, a.experts.clone())).collect();
        let dead = AlarmKind::DeadExpert;
        assert_eq!(seen, [(200, dead, Some(2), vec![1, 4]), (501, dead, Some(2), vec![1, 4])]);
        assert!(found[0].message.contains("layer 2: experts 1, 4"), "{}", found[0].message);
        assert!(found[0].remedy.contains("balance.aux=0.02"), "{}", found[0].remedy);
    }

    #[test]
    fn a_collapsed_router_is_told_once_and_again_after_it_recovered() {
        let collapsed: &[u64] = &[500, 480, 1, 1, 1, 1, 1, 1];
        let found =
            alarms(&RunConfig::default(), &[(200, collapsed), (1, EVEN), (49, collapsed), (1, collapsed)]);
        let seen: Vec<_> = found.iter().map(|a| (a.step, a.kind)).collect();
        assert_eq!(seen, [(50, AlarmKind::Collapsed), (251, AlarmKind::Collapsed)]);
    }

    #[test]
    fn one_expert_for_every_token_is_a_collapse() {
        let mut config = RunConfig::default();
        config.router.kind = "sigmoid_bias".into();
        config.balance.bias_rate = 1e-3;
        let hog: &[u64] = &[980, 140, 140, 140, 140, 140, 140, 140];
        let found = alarms(&config, &[(60, hog)]);
        assert_eq!(
            (found.len(), found[0].kind, &found[0].experts[..]),
            (1, AlarmKind::Collapsed, &[0usize][..])
        );
        assert!(found[0].remedy.contains("balance.bias_rate=0.002"), "{}", found[0].remedy);
    }

    #[test]
    fn a_load_far_from_even_is_told_when_it_lasts() {
        let uneven: &[u64] = &[400, 300, 40, 30, 30, 30, 30, 30];
        assert!(LayerStats::from_counts(0, uneven, 0).load_cv > 1.0);
        let found = alarms(&RunConfig::default(), &[(49, uneven), (1, EVEN), (200, uneven)]);
        let seen: Vec<_> = found.iter().map(|a| (a.step, a.kind)).collect();
        assert_eq!(seen, [(100, AlarmKind::LoadCv)]);
    }

    #[test]
    fn a_dense_mixture_has_nothing_to_watch() {
        let mut config = RunConfig::default();
        config.experts.top_k = 8;
        assert_eq!(alarms(&config, &[(300, &[80, 0, 0, 0, 0, 0, 0, 0])]), []);
        assert_eq!(alarms(&config, &[(300, &[])]), []);
    }

    #[test]
    fn a_jump_of_the_loss_is_told_once() {
        let mut watch = Alarms::new(AlarmBounds::default(), &RunConfig::default());
        let mut found = Vec::new();
        for step in 1..=600 {
            let normal = 2.0 + 6.0 * (-(step as f64) / 40.0).exp() + 0.05 * (step as f64).sin();
            let loss = if (300..310).contains(&step) || step == 500 { normal + 3.0 } else { normal };
            found.extend(watch.watch(&record(step, loss, EVEN)).into_iter().map(|a| (a.step, a.kind)));
        }
        assert_eq!(found, [(300, AlarmKind::LossSpike), (500, AlarmKind::LossSpike)]);
        assert_eq!(watch.watch(&record(601, f64::NAN, EVEN)), []);
    }

    proptest! {
        #[test]
        fn a_healthy_run_is_quiet(seed in 0u64..1000) {
            let mut watch = Alarms::new(AlarmBounds::default(), &RunConfig::default());
            for step in 1..400u64 {
                let noise = |i: u64| (step.wrapping_mul(6364136223846793005).wrapping_add(i * 77 + seed) >> 33) % 40;
                let counts: Vec<_> = (0..8).map(|i| 100 + noise(i)).collect();
                let loss = 8.0 - 0.01 * step as f64 + 0.002 * noise(9) as f64;
                prop_assert_eq!(watch.watch(&record(step, loss, &counts)), []);
            }
        }

        #[test]
        fn any_record_is_answered(
            loads in prop::collection::vec(prop::collection::vec(any::<f32>(), 0..6), 1..4), loss: f64, cv: f64, entropy: f64
        ) {
            let mut watch = Alarms::new(AlarmBounds::default(), &RunConfig::default());
            for step in 0..120 {
                let layers = loads
                    .iter()
                    .enumerate()
                    .map(|(layer, load)| LayerStats {
                        layer, load_cv: cv, entropy, load: load.clone(), ..LayerStats::default()
                    })
                    .collect();
                watch.watch(&StepRecord { step, loss, layers, ..StepRecord::default() });
            }
        }
    }
}
