//! What the page shows: all that a run has told, thinned out.

use std::collections::VecDeque;
use std::time::Duration;

use senmon_train::alarms::Alarm;
use senmon_train::observer::{Ending, EvalRecord, RunInfo, StepRecord, Summary};
use senmon_train::recent::Recent;
use senmon_train::schedule::{TimeLeft, TrainingClock};

use crate::Run;
use crate::series::Series;

/// Points of a curve, at most.
const POINTS: usize = 400;
/// Points of an expert's load over the run, at most.
const MOMENTS: usize = 64;
/// Steps that present figures are means of.
pub(crate) const STEPS: usize = 50;
/// Alarms that are kept.
const ALARMS: usize = 100;

/// Where the figures of a step stand in [`View::curve`]; those of layer i follow, [`PER_LAYER`] each.
pub(crate) const LOSS: usize = 0;
pub(crate) const RATE: usize = 1;
pub(crate) const NORM: usize = 2;
/// Seconds per token.
pub(crate) const TIME: usize = 3;
const FIXED: usize = 4;
const PER_LAYER: usize = 2;

/// How a run ended.
pub(crate) enum End {
    Done,
    Interrupted,
    Failed(String),
}

/// All that a run has told.
pub(crate) struct View {
    pub run: Run,
    pub info: Option<RunInfo>,
    clock: TrainingClock,
    left: TimeLeft,
    /// How far it has come in \[0, 1\], and how long it still takes.
    pub progress: Option<(f64, Option<Duration>)>,
    pub recent: Recent,
    pub curve: Series,
    /// The load of each expert of each layer, one layer after the other.
    pub loads: Series,
    pub evals: Series,
    pub last_eval: Option<EvalRecord>,
    /// The newest first.
    pub alarms: VecDeque<Alarm>,
    pub alarm_count: usize,
    pub saved: Option<u64>,
    pub end: Option<End>,
    /// Time that training took, once it is over.
    pub seconds: Option<f64>,
}

impl View {
    pub fn new(run: Run) -> Self {
        let experts: usize = run.layers.iter().map(|(_, experts)| experts).sum();
        Self {
            curve: Series::new(FIXED + PER_LAYER * run.layers.len(), POINTS),
            loads: Series::new(experts, MOMENTS),
            evals: Series::new(1, POINTS),
            run,
            info: None,
            clock: TrainingClock::resume(0.0),
            left: TimeLeft::default(),
            progress: None,
            recent: Recent::of(STEPS),
            last_eval: None,
            alarms: VecDeque::new(),
            alarm_count: 0,
            saved: None,
            end: None,
            seconds: None,
        }
    }

    pub fn started(&mut self, info: &RunInfo) {
        self.clock = TrainingClock::resume(info.seconds_before);
        self.saved = info.resumed_from.or(self.saved);
        self.info = Some(info.clone());
        let last = self.recent.last().map(|record| (record.step, record.tokens));
        if let Some((step, tokens)) = last {
            self.came_to(step, tokens);
        }
    }

    fn came_to(&mut self, step: u64, tokens: u64) {
        if let Some(info) = &self.info {
            let progress = info.limits.progress(step, tokens, self.clock.elapsed());
            self.progress = Some((progress, self.left.at(progress)));
        }
    }

    pub fn step(&mut self, record: &StepRecord) {
        // Times can be averaged, speeds cannot.
        let fixed = [record.loss, record.lr, record.grad_norm, 1.0 / record.tokens_per_second];
        let layers = record.layers.iter().flat_map(|layer| [layer.load_cv, layer.entropy]);
        self.curve.push(record.step, fixed.into_iter().chain(layers));
        self.loads
            .push(record.step, record.layers.iter().flat_map(|layer| &layer.load).map(|&x| f64::from(x)));
        self.came_to(record.step, record.tokens);
        self.recent.push(record.clone());
    }

    pub fn evaluated(&mut self, record: &EvalRecord) {
        self.evals.push(record.step, [record.eval_loss]);
        self.last_eval = Some(record.clone());
    }

    pub fn alarm(&mut self, alarm: &Alarm) {
        self.alarm_count += 1;
        self.alarms.push_front(alarm.clone());
        self.alarms.truncate(ALARMS);
    }

    pub fn finished(&mut self, summary: &Summary) {
        self.seconds = Some(summary.seconds);
        self.end = Some(match summary.ending {
            Ending::Done => End::Done,
            Ending::Interrupted => End::Interrupted,
        });
    }

    pub fn failed(&mut self, message: &str) {
        self.end = Some(End::Failed(message.to_owned()));
    }

    /// Tokens per second over the last steps.
    pub fn speed(&self) -> Option<f64> {
        self.recent.mean(|step| 1.0 / step.tokens_per_second).map(|seconds| 1.0 / seconds)
    }

    /// Time spent training so far.
    pub fn elapsed(&self) -> Duration {
        match self.seconds {
            Some(seconds) => Duration::try_from_secs_f64(seconds).unwrap_or_default(),
            None => self.clock.elapsed(),
        }
    }

    /// A layer's load CV and entropy: places in [`View::curve`].
    pub fn of_layer(place: usize) -> (usize, usize) {
        (FIXED + PER_LAYER * place, FIXED + PER_LAYER * place + 1)
    }

    /// The least even layer of late: its place among the MoE layers.
    pub fn least_even(&self) -> Option<usize> {
        let cv =
            |place: usize| self.recent.mean(|step| step.layers.get(place).map_or(0.0, |layer| layer.load_cv));
        (0..self.run.layers.len()).max_by(|&a, &b| cv(a).unwrap_or(0.0).total_cmp(&cv(b).unwrap_or(0.0)))
    }
}
