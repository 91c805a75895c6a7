//! Trains what a plan has, one run after another, each to be gone on with where it stopped.
//!
//! The trainer runs from one evaluation to the next; in between it has saved, and the held-out loss of each token is written to
//! `held_out/` in the run's folder, from which ensembles are made. Time is that of the median step times the steps: what else the
//! machine did, and that a run was interrupted, plays no part.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use senmon_data::Progress;
use senmon_kernels::simd::Level;
use senmon_train::TrainError;
use senmon_train::config::RunConfig;
use senmon_train::eval::EvalText;
use senmon_train::folder::{CONFIG, RunFolder};
use senmon_train::jsonl::{self, Jsonl, Line};
use senmon_train::observer::{EvalRecord, Observer, Observers, StepRecord};
use senmon_train::setup::{self, Setup};

use crate::error::{CompareError, Result};
use crate::heldout::{self, BLOCKS};
use crate::plan::{Job, Model, Plan, evaluations, hash_of, prepared, whole_steps};
use crate::record::{Point, Record, Results};
use crate::sizes::measure;

/// Steps that a speed is measured over, before and after those that warm up.
const PROBE: (u64, u64) = (3, 12);

/// Is told how a comparison goes. Every method does nothing unless it is written.
pub trait Watch {
    /// Run `number` of `of` (from 1) begins or is gone on with.
    fn begins(&mut self, _name: &str, _number: usize, _of: usize) {}
    /// A step is done, the last of which will be `last`.
    fn step(&mut self, _record: &StepRecord, _last: u64) {}
    /// The model under way has been evaluated.
    fn evaluated(&mut self, _record: &EvalRecord) {}
    /// A run is done.
    fn ends(&mut self, _record: &Record) {}
    /// Something that the user should know.
    fn note(&mut self, _text: &str) {}
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Watch for Silent {}

/// Where a comparison is, and who watches it.
pub struct Place<'a> {
    /// The folder of the comparison.
    pub out: &'a Path,
    /// Where text is kept as tokens.
    pub cache: &'a Path,
    /// Is told how text is read.
    pub data: &'a dyn Progress,
    /// Is told how runs go.
    pub watch: &'a mut dyn Watch,
    /// Set to end.
    pub interrupted: &'a AtomicBool,
}

/// What one model measured with one seed.
pub type Outcomes = Vec<Vec<Record>>;

/// Trains all runs of a plan that are not done, and puts ensembles together: by model, a record for each seed. A model that diverges is
/// taken out of the plan, and the others are compared.
pub fn run_all(plan: &mut Plan, results: &mut Results, place: &mut Place) -> Result<Outcomes> {
    let jobs = plan.jobs()?;
    let subject = plan.subject().cloned();
    let mut failed: BTreeMap<usize, String> = BTreeMap::new();
    for (number, job) in jobs.iter().enumerate() {
        if failed.contains_key(&job.model) {
            continue;
        }
        let record = one(job, results, place, (number, jobs.len()))?;
        if let Some(reason) = record.failed {
            let lr = job.config.optimizer.lr;
            failed.insert(
                job.model,
                format!("diverged with seed {} at learning rate {lr}: {reason}", job.seed),
            );
        }
    }
    for (model, why) in failed.iter().rev() {
        plan.drop_model(*model, why);
    }
    if plan.subject() != subject.as_ref() || plan.pairs().is_empty() {
        let why = failed.values().next().cloned().unwrap_or_default();
        let what = format!(
            "nothing is left to compare: {why}; all arms need another optimizer.lr, and another --out"
        );
        return Err(CompareError::Mistake(what));
    }
    let jobs = plan.jobs()?;
    let mut outcomes = Vec::new();
    for (m, model) in plan.models.iter().enumerate() {
        let mut of_seeds = Vec::new();
        for &seed in &plan.seeds {
            let own: Vec<&Job> = jobs.iter().filter(|job| job.model == m && job.seed == seed).collect();
            of_seeds.push(match own.as_slice() {
                [one] => found(results, one)?,
                several => together(model, seed, several, results, place.out)?,
            });
        }
        outcomes.push(of_seeds);
    }
    Ok(outcomes)
}

fn found(results: &Results, job: &Job) -> Result<Record> {
    let missing = || CompareError::Mistake(format!("{}: there is no result of it", job.name));
    results.find(&job.hash).cloned().ok_or_else(missing)
}

/// One run to its end, or what it was recorded with. `at` is its number, from 0, of how many.
pub fn one(job: &Job, results: &mut Results, place: &mut Place, at: (usize, usize)) -> Result<Record> {
    // Told as soon as it is known, not after hours of more training.
    let others = || results.records().iter().filter(|other| other.failed.is_none());
    let same_text = |record: &Record| match others().find(|other| other.data != record.data) {
        Some(other) if record.failed.is_none() => Err(CompareError::Mistake(format!(
            "the text is not what it was: {} and {} were trained on other texts; choose another --out",
            other.name, record.name
        ))),
        _ => Ok(()),
    };
    if let Some(record) = results.find(&job.hash) {
        same_text(record)?;
        return Ok(record.clone());
    }
    let machine = machine();
    if let Some(other) = others().find(|other| !other.machine.is_empty() && other.machine != machine) {
        let what = format!(
            "{} was timed with {}, this is {machine}: times would not compare; go on as it was, or choose another --out",
            other.name, other.machine
        );
        return Err(CompareError::Mistake(what));
    }
    let interrupted = || CompareError::Interrupted { done: at.0, of: at.1 };
    if place.interrupted.load(Ordering::Relaxed) {
        return Err(interrupted());
    }
    place.watch.begins(&job.name, at.0 + 1, at.1);
    let record = match train(job, place) {
        Ok(Some(record)) => record,
        Ok(None) => return Err(interrupted()),
        Err(e) if e.is_interruption() => return Err(interrupted()),
        Err(CompareError::Train(e)) if matches!(*e, TrainError::NonFinite { .. }) => {
            Record { failed: Some(e.to_string()), ..begun(job, &job.config)? }
        }
        Err(CompareError::Train(source)) => return Err(CompareError::Run { name: job.name.clone(), source }),
        Err(e) => return Err(e),
    };
    same_text(&record)?;
    place.watch.ends(&record);
    results.add(record.clone())?;
    Ok(record)
}

/// What is known of a run before it is trained.
fn begun(job: &Job, config: &RunConfig) -> Result<Record> {
    let f = measure(config)?;
    Ok(Record {
        hash: job.hash.clone(),
        name: job.name.clone(),
        seed: job.seed,
        members: 1,
        parameters: f.total,
        active_parameters: f.active,
        flops_per_token: f.flops_per_token,
        ..Record::default()
    })
}

/// What times depend on beside the run: threads and the instruction set.
fn machine() -> String {
    let threads = rayon::current_num_threads();
    format!("{threads} {} and {}", if threads == 1 { "thread" } else { "threads" }, Level::current().name())
}

/// The folder of a run.
pub fn folder(out: &Path, name: &str) -> PathBuf {
    out.join("runs").join(name)
}

fn losses_at(out: &Path, name: &str, step: u64) -> PathBuf {
    folder(out, name).join("held_out").join(format!("step-{step:08}.safetensors"))
}

/// A run, begun or gone on with.
fn opened(config: &RunConfig, root: &Path, place: &Place) -> Result<Setup> {
    Ok(match root.join(CONFIG).is_file() {
        true => setup::resume(config.clone(), RunFolder::resume(root)?, place.cache, place.data)?,
        false => setup::create(config.clone(), root, place.cache, place.data)?,
    })
}

/// Trains to the end; nothing if it was interrupted.
fn train(job: &Job, place: &mut Place) -> Result<Option<Record>> {
    let root = folder(place.out, &job.name);
    reset_peak_memory();
    let Setup { mut trainer, notes, .. } = opened(&job.config, &root, place)?;
    for note in notes {
        place.watch.note(&format!("{}: {note}", job.name));
    }
    // The same text on the way and at the end.
    let Some((text, _)) = trainer.eval.take() else {
        return Err(CompareError::Mistake("no text is held out: set data.holdout".into()));
    };
    // What a run under way was begun with is not mixed with a text that has changed since.
    let key = root.join("text");
    match std::fs::read_to_string(&key) {
        Ok(known) if known != trainer.progress.data => {
            return Err(CompareError::Mistake(format!(
                "the text is not what it was when {} was begun: choose another --out",
                job.name
            )));
        }
        Ok(_) => {}
        Err(_) => senmon_files::write_whole(&key, |to| to.write_all(trainer.progress.data.as_bytes()))
            .map_err(CompareError::io("write", &key))?,
    }
    let windows = heldout::windows(&text);
    if windows.is_empty() {
        return Err(CompareError::Mistake(
            "the held-out text has no whole window: hold more out (data.holdout)".into(),
        ));
    }
    let metrics = trainer.folder.metrics();
    let first = trainer.progress.step;
    let mut log = if first > 0 { Jsonl::resume(&metrics, first)? } else { Jsonl::create(&metrics)? };
    let mut evaluated = evals(&metrics)?.last().map_or(0, |e| e.step);
    let due = evaluations(&job.config);
    let last = due.last().copied().unwrap_or(0);
    let stop = AtomicBool::new(false);
    let held = root.join("held_out");
    std::fs::create_dir_all(&held).map_err(CompareError::io("create", &held))?;
    loop {
        let (step, tokens) = (trainer.progress.step, trainer.progress.tokens);
        if due.contains(&step) && evaluated < step {
            let cancelled = || place.interrupted.load(Ordering::Relaxed);
            let batch = job.config.train.batch;
            let Some(losses) = senmon_train::eval::losses(&trainer.decoder, &text, batch, &cancelled)? else {
                return Ok(None);
            };
            heldout::finite(&losses, step)?;
            heldout::write(&losses_at(place.out, &job.name, step), &losses)?;
            let record = told(&text, &heldout::summed(&windows, &losses), step, tokens);
            log.evaluated(&record)?;
            place.watch.evaluated(&record);
            evaluated = step;
        }
        if step >= last {
            break;
        }
        if place.interrupted.load(Ordering::Relaxed) {
            return Ok(None);
        }
        stop.store(false, Ordering::Relaxed);
        let mut pacer =
            Pacer { due: &due, last, stop: &stop, interrupted: place.interrupted, watch: place.watch };
        let mut observers = Observers::new().with(&mut log);
        observers.push(&mut pacer);
        trainer.run(&mut observers, &stop)?;
    }
    let data = trainer.progress.data.clone();
    let begun = begun(job, &trainer.config)?;
    drop(trainer);
    let tokens = job.config.tokens_per_step() * last;
    let mut record = Record {
        tokens,
        steps: last,
        seconds: tokens as f64 / median_speed(&metrics)?,
        peak_memory_bytes: peak_memory(),
        machine: machine(),
        data,
        domains: text.domains.clone(),
        windows,
        ..begun
    };
    let points: Vec<(u64, u64)> = evals(&metrics)?.iter().map(|e| (e.step, e.tokens)).collect();
    fill(&mut record, &points, |step| heldout::read(&losses_at(place.out, &job.name, step)))?;
    Ok(Some(record))
}

/// The curve, blocks and windows of a record from the losses at its evaluations.
fn fill(record: &mut Record, points: &[(u64, u64)], losses: impl Fn(u64) -> Result<Vec<f32>>) -> Result<()> {
    let empty = record.windows.clone();
    let predicted: usize = empty.iter().map(|window| window.tokens as usize).sum();
    for &(step, tokens) in points {
        let losses = losses(step)?;
        if losses.len() != predicted {
            return Err(CompareError::Mistake(format!(
                "{}: step {step} has losses of {} held-out tokens, there are {predicted}: choose another --out",
                record.name,
                losses.len()
            )));
        }
        let windows = heldout::summed(&empty, &losses);
        let (blocks, bytes) = heldout::by_block(&windows, BLOCKS);
        record.curve.push(Point { step, tokens, bits_per_byte: heldout::bits_per_byte(&windows), blocks });
        (record.block_bytes, record.windows) = (bytes, windows);
    }
    record.bits_per_byte = record.curve.last().map_or(f64::NAN, |p| p.bits_per_byte);
    Ok(())
}

/// An ensemble's record, from those of its members and their losses.
fn together(model: &Model, seed: u64, jobs: &[&Job], results: &mut Results, out: &Path) -> Result<Record> {
    let hashes: Vec<&str> = jobs.iter().map(|job| job.hash.as_str()).collect();
    let hash = blake3::hash(hashes.join(" ").as_bytes()).to_hex()[..16].to_owned();
    if let Some(record) = results.find(&hash) {
        return Ok(record.clone());
    }
    let members = jobs.iter().map(|job| found(results, job)).collect::<Result<Vec<_>>>()?;
    let Some(first) = members.first() else {
        return Err(CompareError::Mistake(format!("{} has no members", model.name)));
    };
    let mut record = Record {
        hash,
        name: format!("{}-seed{seed}", model.name),
        seed,
        members: jobs.len(),
        parameters: members.iter().map(|m| m.parameters).sum(),
        active_parameters: members.iter().map(|m| m.active_parameters).sum(),
        flops_per_token: members.iter().map(|m| m.flops_per_token).sum(),
        seconds: members.iter().map(|m| m.seconds).sum(),
        curve: Vec::new(),
        ..first.clone()
    };
    let points: Vec<(u64, u64)> = first.curve.iter().map(|p| (p.step, p.tokens)).collect();
    fill(&mut record, &points, |step| {
        let read = |m: &Record| heldout::read(&losses_at(out, &m.name, step));
        Ok(heldout::averaged(&members.iter().map(read).collect::<Result<Vec<_>>>()?))
    })?;
    results.add(record.clone())?;
    Ok(record)
}

/// An evaluation as the trainer would tell it.
fn told(text: &EvalText, windows: &[crate::record::Window], step: u64, tokens: u64) -> EvalRecord {
    let figures = |of: &[&crate::record::Window]| {
        let nats: f64 = of.iter().map(|w| w.nats).sum();
        let count: u64 = of.iter().map(|w| u64::from(w.tokens)).sum();
        senmon_train::observer::DomainEval {
            loss: nats / count.max(1) as f64,
            bits_per_byte: heldout::bits_per_byte(of.iter().copied()),
            tokens: count,
        }
    };
    let all = figures(&windows.iter().collect::<Vec<_>>());
    let domains = text.domains.iter().enumerate().filter_map(|(d, name)| {
        let own: Vec<_> = windows.iter().filter(|w| w.domain as usize == d).collect();
        (!own.is_empty()).then(|| (name.clone(), figures(&own)))
    });
    EvalRecord {
        step,
        tokens,
        eval_loss: all.loss,
        bits_per_byte: all.bits_per_byte,
        eval_tokens: all.tokens,
        domains: domains.collect(),
    }
}

fn evals(metrics: &Path) -> Result<Vec<EvalRecord>> {
    let lines = jsonl::read(metrics)?.into_iter();
    Ok(lines.filter_map(|line| if let Line::Eval(eval) = line { Some(eval) } else { None }).collect())
}

/// Tokens per second of the median step.
fn median_speed(metrics: &Path) -> Result<f64> {
    let lines = jsonl::read(metrics)?.into_iter();
    let mut speeds: Vec<f64> = lines
        .filter_map(|line| if let Line::Step(s) = line { Some(s.tokens_per_second) } else { None })
        .collect();
    speeds.sort_by(f64::total_cmp);
    Ok(speeds.get(speeds.len() / 2).copied().unwrap_or(f64::NAN))
}

/// Ends the trainer after the steps that are due, or when the user wants it.
struct Pacer<'a> {
    due: &'a [u64],
    last: u64,
    stop: &'a AtomicBool,
    interrupted: &'a AtomicBool,
    watch: &'a mut dyn Watch,
}

impl Observer for Pacer<'_> {
    fn step(&mut self, record: &StepRecord) -> senmon_train::Result<()> {
        self.watch.step(record, self.last);
        if self.due.contains(&record.step) || self.interrupted.load(Ordering::Relaxed) {
            self.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The tokens that the configuration's model is trained on in so many minutes on this machine, by the median of a few steps; measured
/// once, then kept in `budget.json`; where it is not known and not to be measured now, that is refused.
pub fn tokens_of_minutes(
    base: &RunConfig,
    minutes: f64,
    measure_now: bool,
    place: &mut Place,
) -> Result<u64> {
    if !(minutes > 0.0 && minutes.is_finite()) {
        return Err(CompareError::Mistake(format!("--minutes {minutes}: expected a number above 0")));
    }
    let mut config = prepared(base)?;
    let path = place.out.join("budget.json");
    let hash = hash_of(&config)?;
    let bad = |e: serde_json::Error| CompareError::File { path: path.clone(), reason: e.to_string() };
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Budget {
        hash: String,
        minutes: f64,
        tokens_per_second: f64,
    }
    let speed = match std::fs::read(&path) {
        Ok(bytes) => Some(serde_json::from_slice::<Budget>(&bytes).map_err(bad)?),
        Err(_) => None,
    };
    let speed = match speed.filter(|known| known.hash == hash) {
        Some(known) => known.tokens_per_second,
        None if !measure_now => {
            let what = "--minutes with --plan: how fast this machine trains is not known yet, say --tokens";
            return Err(CompareError::Mistake(what.into()));
        }
        None => {
            let root = folder(place.out, "probe");
            if root.exists() {
                std::fs::remove_dir_all(&root).map_err(CompareError::io("remove", &root))?;
            }
            config.train.tokens = Some(config.tokens_per_step() * (PROBE.0 + PROBE.1));
            let Setup { mut trainer, .. } = setup::create(config.clone(), &root, place.cache, place.data)?;
            trainer.eval = None;
            let mut speeds = Speeds(Vec::new());
            trainer.run(&mut speeds, place.interrupted)?;
            drop(trainer);
            std::fs::remove_dir_all(&root).map_err(CompareError::io("remove", &root))?;
            if place.interrupted.load(Ordering::Relaxed) {
                return Err(CompareError::Unmeasured);
            }
            let mut speeds = speeds.0.split_off(PROBE.0 as usize);
            speeds.sort_by(f64::total_cmp);
            let tokens_per_second = speeds.get(speeds.len() / 2).copied().unwrap_or(1.0);
            let budget = serde_json::to_vec(&Budget { hash, minutes, tokens_per_second }).map_err(bad)?;
            senmon_files::write_whole(&path, |to| to.write_all(&budget))
                .map_err(CompareError::io("write", &path))?;
            tokens_per_second
        }
    };
    Ok(whole_steps(&config, speed * 60.0 * minutes))
}

struct Speeds(Vec<f64>);

impl Observer for Speeds {
    fn step(&mut self, record: &StepRecord) -> senmon_train::Result<()> {
        self.0.push(record.tokens_per_second);
        Ok(())
    }
}

/// Forgets the most memory that this process has held; where the system cannot, the mark stays that of all runs so far.
fn reset_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The most memory that this process has held, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
