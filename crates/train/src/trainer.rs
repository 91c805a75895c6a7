//! The training loop: steps, evaluations, checkpoints, alarms, until a limit or the user ends it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use senmon_models::decoder::Decoder;

use crate::alarms::Alarms;
use crate::balancing::Balancing;
use crate::config::RunConfig;
use crate::error::{Result, TrainError};
use crate::eval::{EvalText, evaluate};
use crate::folder::RunFolder;
use crate::observer::{Ending, EvalRecord, Observer, RunInfo, StepRecord, Summary};
use crate::presets::footprint;
use crate::schedule::{Limits, TrainingClock};
use crate::state::{self, Progress};
use crate::step::{AdamW, MicroBatch, step};
use crate::tracing;
use senmon_insight::About;

/// Where batches come from.
pub trait BatchSource {
    /// Micro-batch number `index` since the start of the run: the same for every call.
    fn micro_batch(&self, index: u64) -> Result<MicroBatch>;

    /// Micro-batches there are, where they have an end.
    fn len(&self) -> Option<u64> {
        None
    }

    /// There are none.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Tokens to train on, where known; for people.
    fn training_tokens(&self) -> Option<u64> {
        None
    }
}

/// A run, ready to go: [`crate::setup`] puts one together.
pub struct Trainer {
    /// What the run is.
    pub config: RunConfig,
    /// Where it is written.
    pub folder: RunFolder,
    /// The model.
    pub decoder: Decoder,
    /// Its optimiser.
    pub adamw: AdamW,
    /// How its load is kept even.
    pub balancing: Balancing,
    /// Where it stands.
    pub progress: Progress,
    /// What it has noticed.
    pub alarms: Alarms,
    /// What it is fed.
    pub source: Box<dyn BatchSource>,
    /// Held-out text for evaluations during the run, and for the last one.
    pub eval: Option<(EvalText, EvalText)>,
    /// Files that go into each checkpoint as they are (`tokenizer.json`).
    pub extra: Vec<PathBuf>,
}

impl Trainer {
    /// True if there is nothing left to do.
    pub fn is_over(&self) -> bool {
        let seconds = Duration::try_from_secs_f64(self.progress.seconds).unwrap_or_default();
        let evaluated = self.eval.is_none() || self.progress.evaluated == self.progress.step;
        evaluated && self.limits().reached(self.progress.step, self.progress.tokens, seconds)
    }

    /// When the run ends, by its configuration or with its batches.
    fn limits(&self) -> Limits {
        let mut limits = self.config.limits();
        if let Some(len) = self.source.len() {
            let steps = len / self.config.train.accumulate.max(1) as u64;
            limits.steps = Some(limits.steps.map_or(steps, |limit| limit.min(steps)));
        }
        limits
    }

    /// Trains to the end, telling `observer`, or until `interrupted` is set; the last state is saved.
    pub fn run(&mut self, observer: &mut dyn Observer, interrupted: &AtomicBool) -> Result<Summary> {
        let config = self.config.clone();
        let t = &config.train;
        let accumulate = t.accumulate.max(1);
        let limits = self.limits();
        let mut schedule = config.schedule();
        if limits.minutes.is_none() {
            schedule.total_steps = limits.total_steps(config.tokens_per_step());
        }
        let stopped = || interrupted.load(Ordering::Relaxed);
        let costs = footprint(self.decoder.spec(), t.sequence);
        let tokens_per_step = config.tokens_per_step();
        let first = self.progress.step;
        observer.started(&RunInfo {
            parameters: costs.total,
            active_parameters: costs.active,
            training_tokens: self.source.training_tokens(),
            tokens_per_step,
            limits,
            resumed_from: (first > 0).then_some(first),
            seconds_before: self.progress.seconds,
            threads: rayon::current_num_threads(),
        })?;
        if t.trace_every > 0 && (self.decoder.moe_layers().next().is_none() || self.eval.is_none()) {
            let what = "train.trace_every asks for the routing of held-out text, and there are no experts or no such text";
            return Err(TrainError::Conflict(what.into()));
        }
        if t.trace_every > 0 && first == 0 {
            self.trace(&stopped)?;
        }
        let clock = TrainingClock::resume(self.progress.seconds);
        let (mut saved, mut eval): (u64, Option<EvalRecord>) = (first, None);
        let due = |every: u64, step: u64| every > 0 && step > 0 && step.is_multiple_of(every);
        let before = self.progress.tokens;
        let mut training_seconds = 0.0;
        let over = |progress: &Progress| limits.reached(progress.step, progress.tokens, clock.elapsed());
        // An evaluation that an interruption cut short comes now.
        if due(t.eval_every, first) && self.progress.evaluated < first && !over(&self.progress) {
            eval = self.evaluate(false, observer, &stopped)?;
        }
        while !over(&self.progress) && !stopped() {
            let started = Instant::now();
            let number = self.progress.step + 1;
            let done = limits.progress(self.progress.step, self.progress.tokens, clock.elapsed());
            let lr = schedule.lr(number - 1, done);
            let advice = format!(
                "the checkpoint of step {saved} is good: go on from it by --resume with a lower optimizer.lr or optimizer.clip"
            );
            let (source, mut tokens) = (&self.source, 0u64);
            let done = self.progress.step * accumulate as u64;
            let mut next = |micro: usize| {
                let batch = source.micro_batch(done + micro as u64)?;
                tokens += (batch.tokens.len() - batch.batch) as u64;
                Ok(batch)
            };
            let outcome = step(
                &self.decoder,
                &mut self.adamw,
                &mut self.balancing,
                &config.optimizer,
                number,
                lr,
                t.seed,
                accumulate,
                &mut next,
                &advice,
            )?;
            self.progress.step = number;
            self.progress.tokens += tokens;
            self.progress.seconds = clock.elapsed().as_secs_f64();
            let seconds = started.elapsed().as_secs_f64();
            training_seconds += seconds;
            let record = StepRecord {
                step: number,
                tokens: self.progress.tokens,
                loss: outcome.loss,
                total: outcome.total,
                losses: outcome.losses,
                lr,
                grad_norm: outcome.grad_norm,
                tokens_per_second: tokens as f64 / seconds.max(1e-9),
                layers: outcome.layers,
            };
            observer.step(&record)?;
            for alarm in self.alarms.watch(&record) {
                observer.alarm(&alarm)?;
            }
            if over(&self.progress) {
                break;
            }
            if due(t.trace_every, number) {
                self.trace(&stopped)?;
            }
            if due(t.eval_every, number) {
                eval = self.evaluate(false, observer, &stopped)?.or(eval);
            }
            if due(t.save_every, number) && !stopped() {
                self.save(observer, saved)?;
                saved = number;
            }
        }
        if t.trace_every > 0 && over(&self.progress) {
            self.trace(&stopped)?;
        }
        let evaluated = self.progress.evaluated;
        // The last evaluation comes before the last save: a run resumed from there does not tell it twice.
        if !stopped() && self.progress.evaluated < self.progress.step {
            eval = self.evaluate(true, observer, &stopped)?.or(eval);
        }
        let ending = if stopped() { Ending::Interrupted } else { Ending::Done };
        if saved != self.progress.step || self.progress.evaluated > evaluated {
            self.save(observer, saved)?;
        }
        let summary = Summary {
            ending,
            steps: self.progress.step,
            tokens: self.progress.tokens,
            seconds: self.progress.seconds,
            tokens_per_second: (self.progress.tokens - before) as f64 / f64::max(training_seconds, 1e-9),
            eval,
        };
        observer.finished(&summary)?;
        Ok(summary)
    }

    /// Evaluates on some of the held-out text, or on all of it; nothing if there is none, or when stopped meanwhile.
    fn evaluate(
        &mut self,
        all: bool,
        observer: &mut dyn Observer,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<EvalRecord>> {
        let Some((some, whole)) = &self.eval else { return Ok(None) };
        let (step, tokens) = (self.progress.step, self.progress.tokens);
        let text = if all { whole } else { some };
        let record = evaluate(&self.decoder, text, self.config.train.batch, step, tokens, stopped)?;
        if let Some(record) = &record {
            observer.evaluated(record)?;
            self.progress.evaluated = step;
        }
        Ok(record)
    }

    /// Writes the routing of the probe at the present step, unless it is there already or the run is stopped meanwhile.
    fn trace(&self, stopped: &dyn Fn() -> bool) -> Result<()> {
        let Some((text, _)) = &self.eval else { return Ok(()) };
        let path = self.folder.trace(self.progress.step);
        let probe = probe(text, self.config.train.trace_tokens as usize);
        let router = self.decoder.moe_layers().next().map(|(_, layer)| layer.config().router.kind.clone());
        let about = About {
            model: format!("step {}", self.progress.step),
            router: router.unwrap_or_default(),
            domains: Vec::new(),
        };
        if let Some(trace) = tracing::record(&self.decoder, &probe, about, true, stopped)? {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(TrainError::io("create", folder))?;
            }
            trace.write(&path)?;
        }
        Ok(())
    }

    /// Saves; `before` is the step of the newest checkpoint.
    fn save(&self, observer: &mut dyn Observer, before: u64) -> Result<()> {
        let unsaved = |what| TrainError::Unsaved { what: Box::new(what), step: before };
        observer.saving(self.progress.step).map_err(unsaved)?;
        let checkpoint = state::save(
            &self.folder,
            &self.decoder,
            &self.adamw,
            &self.balancing,
            &self.progress,
            &self.alarms,
            &self.config.model.family,
            &self.extra,
        )
        .map_err(unsaved)?;
        observer.saved(checkpoint.step, &checkpoint.path)?;
        self.folder.prune(self.config.train.keep)?;
        Ok(())
    }
}

/// About `tokens` tokens of a text, the same for the same text, from all over it.
fn probe(text: &EvalText, tokens: usize) -> EvalText {
    let width = text.windows.first().map_or(1, |(window, _)| window.len().saturating_sub(1)).max(1);
    let wanted = tokens.div_ceil(width).clamp(1, text.windows.len().max(1));
    let places = || (0..wanted.min(text.windows.len())).map(|i| i * text.windows.len() / wanted);
    EvalText {
        windows: places().map(|at| text.windows[at].clone()).collect(),
        documents: places().filter_map(|at| text.documents.get(at).copied()).collect(),
        domains: text.domains.clone(),
        bytes_of_token: text.bytes_of_token.clone(),
    }
}

/// Batches from a file, each once and in order: what `--batches` gives.
#[derive(Debug)]
pub struct ReplaySource {
    tokens: Vec<u32>,
    batch: usize,
    width: usize,
}

impl ReplaySource {
    /// B and S of the file's batches.
    pub fn shape_of(path: &std::path::Path) -> Result<(usize, usize)> {
        // The tokens are checked when the model is known.
        Ok(Self::open(path, u32::MAX as usize)?.shape())
    }

    /// Reads tensor `tokens` \[N, B, S + 1\] (u32, or non-negative i32 or i64) of a safetensors file; ids must be below `vocab`.
    pub fn open(path: &std::path::Path, vocab: usize) -> Result<Self> {
        let bad = |reason: String| TrainError::State { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let file = safetensors::SafeTensors::deserialize(&bytes)
            .map_err(|e| bad(format!("is not a whole safetensors file: {e}")))?;
        let view = file.tensor("tokens").map_err(|_| bad("has no tensor `tokens` [N, B, S + 1]".into()))?;
        let &[_, batch, width] = view.shape() else {
            return Err(bad(format!("`tokens` has shape {:?}, expected [N, B, S + 1]", view.shape())));
        };
        if batch == 0 || width < 2 {
            return Err(bad(format!("`tokens` {:?} holds no sequence of two tokens or more", view.shape())));
        }
        let data = view.data();
        let ids: Vec<i64> = match view.dtype() {
            safetensors::Dtype::U32 => data
                .chunks_exact(4)
                .map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            safetensors::Dtype::I32 => data
                .chunks_exact(4)
                .map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            safetensors::Dtype::I64 => data
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
                .collect(),
            other => return Err(bad(format!("`tokens` is {other:?}, expected U32, I32 or I64"))),
        };
        let tokens = ids
            .into_iter()
            .map(|id| match u32::try_from(id) {
                Ok(token) if (token as usize) < vocab => Ok(token),
                _ => Err(bad(format!("token {id} does not fit a vocabulary of {vocab}"))),
            })
            .collect::<Result<Vec<u32>>>()?;
        Ok(Self { tokens, batch, width })
    }

    /// Its one batch after the other, \[N, B, S + 1\], as one line.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// B and S.
    pub fn shape(&self) -> (usize, usize) {
        (self.batch, self.width - 1)
    }
}

impl BatchSource for ReplaySource {
    fn micro_batch(&self, index: u64) -> Result<MicroBatch> {
        let size = self.batch * self.width;
        let batch = self.tokens.chunks_exact(size).nth(index as usize).ok_or_else(|| {
            TrainError::Conflict(format!(
                "there are {} batches, number {index} was asked for",
                self.tokens.len() / size
            ))
        })?;
        Ok(MicroBatch { tokens: batch.to_vec(), batch: self.batch })
    }

    fn len(&self) -> Option<u64> {
        Some((self.tokens.len() / (self.batch * self.width)) as u64)
    }
}
