//! `compare`: dense models, experts and ensembles on the user's text at equal cost, with a verdict; or a sweep over shapes.

use super::texts::cache_folder;
use super::{on_threads, print, print_json, size};
use crate::cli::CompareArgs;
use crate::failure::{Failure, Result};
use crate::ui::{DataProgress, INTERRUPTED, catch_interrupts};
use senmon_compare::analysis::Analysis;
use senmon_compare::files::{self, COMPARISON, SWEEP};
use senmon_compare::page::Facts;
use senmon_compare::plan::{Arm, Ask, Equality, Plan};
use senmon_compare::record::{Record, Results};
use senmon_compare::run::{self, Outcomes, Place, Watch};
use senmon_compare::statistics::mean;
use senmon_compare::sweep::{Axis, Sweep, axis, grid, search};
use senmon_compare::verdict::{Verdict, verdicts};
use senmon_train::RunConfig;
use senmon_train::layers::Layers;
use senmon_train::observer::{EvalRecord, StepRecord};
use senmon_train::setup::configure;
use senmon_train::terminal::{duration, short};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Steps are told as often.
const EVERY: Duration = Duration::from_secs(10);

pub(super) fn run(args: CompareArgs) -> Result<()> {
    catch_interrupts();
    senmon_kernels::process::keep_freed_memory();
    let layers = layers(&args)?;
    let base = configure(layers.clone())?;
    on_threads(base.train.threads, move || compare(&args, &layers, &base))?
}

/// The configuration that flags say.
fn layers(args: &CompareArgs) -> Result<Layers> {
    let mut layers = Layers::new();
    if let Some(preset) = &args.preset {
        layers = layers.preset(preset);
    }
    if let Some(file) = &args.config {
        layers = layers.file(file)?;
    }
    for argument in &args.set {
        layers = layers.set(argument)?;
    }
    if !args.data.is_empty() {
        let paths: Vec<String> = args.data.iter().map(|p| p.display().to_string()).collect();
        layers = layers.set_value("data.paths", paths)?;
    }
    if let Some(path) = &args.tokenizer {
        layers = layers.set_value("data.tokenizer", path.display().to_string())?;
    }
    for (key, value) in [("data.domains", &args.domains), ("data.column", &args.column)] {
        if let Some(value) = value {
            layers = layers.set_value(key, value.as_str())?;
        }
    }
    if let Some(threads) = args.common.threads {
        layers = layers.set_value("train.threads", i64::try_from(threads).unwrap_or(i64::MAX))?;
    }
    Ok(layers)
}

fn compare(args: &CompareArgs, layers: &Layers, base: &RunConfig) -> Result<()> {
    let quiet = args.common.quiet;
    let axes = args.sweep.iter().map(|text| axis(text)).collect::<senmon_compare::Result<Vec<Axis>>>()?;
    let arms = args.arms.iter().map(|name| name.parse()).collect::<senmon_compare::Result<Vec<Arm>>>()?;
    let equal =
        args.equal.iter().map(|name| name.parse()).collect::<senmon_compare::Result<Vec<Equality>>>()?;
    if args.plan && args.common.json {
        return Err(Failure::mistake("--plan is told in words: leave out --json"));
    }
    let mut ask = Ask {
        base: base.clone(),
        layers: layers.clone(),
        tokens: 1,
        seeds: args.seeds,
        arms,
        routers: args.routers.clone(),
        equal,
        members: args.members,
    };
    // What cannot be compared is told before anything is made.
    if axes.is_empty() {
        Plan::new(&ask)?;
    }
    // Before anything is measured or trained there: the folder is this process's, and holds no run.
    let mut results = if args.plan { None } else { Some(Results::open(&args.out)?) };
    let progress = DataProgress::new(quiet);
    let cache = cache_folder();
    let mut lines = Lines { quiet, last: None };
    let mut place = Place {
        out: &args.out,
        cache: &cache,
        data: &progress,
        watch: &mut lines,
        interrupted: &INTERRUPTED,
    };
    let t = &base.train;
    ask.tokens = match (&args.tokens, args.minutes.or(t.minutes)) {
        (Some(tokens), _) => size("--tokens", tokens)?,
        (None, Some(minutes)) => run::tokens_of_minutes(base, minutes, !args.plan, &mut place)?,
        (None, None) => t.tokens.or(t.steps.map(|s| s.saturating_mul(base.tokens_per_step()))).unwrap_or(0),
    };
    if ask.tokens == 0 || args.seeds == 0 {
        return Err(Failure::mistake("expected --tokens and --seeds of 1 or more"));
    }
    if axes.is_empty() {
        let mut plan = Plan::new(&ask)?;
        if !quiet || args.plan {
            let words = plan_words(&plan)?;
            if args.plan {
                return print(&words);
            }
            eprint!("{words}");
        }
        let Some(results) = &mut results else { return Ok(()) };
        let outcomes = run::run_all(&mut plan, results, &mut place)?;
        let analysis = Analysis::new(&plan, &outcomes);
        let said = verdicts(&analysis);
        let mut facts = facts(args, base, ask.tokens);
        facts.push(("Learning rate".into(), format!("{}, the same for all", base.optimizer.lr)));
        let document = files::write(&args.out, &plan, &outcomes, &analysis, &said, &facts)?;
        return match args.common.json {
            true => print_json(&document),
            false => print(&words(args, &plan, &outcomes, &said)),
        };
    }
    let (candidates, skipped) = grid(layers, base, &axes)?;
    let flops =
        3.0 * senmon_compare::sizes::measure(&senmon_compare::plan::prepared(base)?)?.flops_per_token as f64;
    if args.plan {
        let mut text = format!(
            "{} candidates, {} training FLOPs each at the end\n",
            candidates.len(),
            short(flops * ask.tokens as f64)
        );
        candidates.iter().for_each(|c| {
            let _ = writeln!(text, "{}", c.name);
        });
        return print(&text);
    }
    let Some(results) = &mut results else { return Ok(()) };
    let mut found = search(&candidates, flops * ask.tokens as f64, args.seeds, results, &mut place)?;
    found.skipped = skipped;
    let document = files::write_sweep(&args.out, &found, &facts(args, base, ask.tokens))?;
    match args.common.json {
        true => print_json(&document),
        false => print(&sweep_words(args, &found)),
    }
}

fn facts(args: &CompareArgs, base: &RunConfig, tokens: u64) -> Facts {
    let paths: Vec<String> = base.data.paths.iter().map(|p| p.display().to_string()).collect();
    let fact = |name: &str, value: String| (name.to_owned(), value);
    let mut facts = vec![
        fact("Text", paths.join(", ")),
        fact(
            "Model with experts",
            format!(
                "preset {}, {} layers, {} experts per token",
                base.model.preset, base.model.layers, base.experts.top_k
            ),
        ),
        fact("Budget", format!("{} tokens of it", short(tokens as f64))),
        fact("Seeds", args.seeds.to_string()),
        fact("Threads", rayon::current_num_threads().to_string()),
    ];
    if !args.set.is_empty() {
        facts.push(fact("Set", args.set.join(", ")));
    }
    facts
}

/// What will be trained.
fn plan_words(plan: &Plan) -> Result<String> {
    let jobs = plan.jobs()?.len();
    let mut out = format!("{jobs} runs of {} models, {} seeds\n", plan.models.len(), plan.seeds.len());
    for (m, model) in plan.models.iter().enumerate() {
        let at = plan.places.iter().filter(|p| p.model == m);
        let mut at: Vec<String> = at.map(|p| format!("{} {:.3}", p.equality.name(), p.ratio)).collect();
        at.dedup();
        let members = if model.members > 1 { format!("{} × ", model.members) } else { String::new() };
        let _ = writeln!(
            out,
            "{:<32} {members}{} tokens, {} parameters, {} active; of the first arm's: {}",
            model.name,
            short(model.tokens as f64),
            short(model.footprint.total as f64),
            short(model.footprint.active as f64),
            at.join(", ")
        );
    }
    for missing in &plan.missing {
        let _ = writeln!(out, "{} is not at {}: {}", missing.arm, missing.equality.words(), missing.why);
    }
    Ok(out)
}

/// What was found.
fn words(args: &CompareArgs, plan: &Plan, outcomes: &Outcomes, said: &[Verdict]) -> String {
    let mut out = String::new();
    for verdict in said {
        let _ = writeln!(out, "{}", verdict.sentence);
        for note in &verdict.notes {
            let _ = writeln!(out, "    {note}");
        }
    }
    let _ = writeln!(
        out,
        "\n{:<32} {:>8} {:>8} {:>8} {:>9} {:>9}  by seed",
        "held-out bits per byte", "total", "active", "tokens", "time", "mean"
    );
    for (model, records) in plan.models.iter().zip(outcomes) {
        let bits: Vec<f64> = records.iter().map(|r| r.bits_per_byte).collect();
        let seconds = mean(&records.iter().map(|r| r.seconds).collect::<Vec<_>>());
        let by_seed: Vec<String> = bits.iter().map(|b| format!("{b:.4}")).collect();
        let _ = writeln!(
            out,
            "{:<32} {:>8} {:>8} {:>8} {:>9} {:>9.4}  {}",
            model.name,
            short(model.footprint.total as f64),
            short(model.footprint.active as f64),
            short(model.tokens as f64),
            duration(Duration::try_from_secs_f64(seconds).unwrap_or_default()),
            mean(&bits),
            by_seed.join(", ")
        );
    }
    let _ = writeln!(out, "\nthe page: {}", args.out.join(COMPARISON).display());
    out
}

fn sweep_words(args: &CompareArgs, found: &Sweep) -> String {
    let mut out = String::new();
    for line in &found.words {
        let _ = writeln!(out, "{line}");
    }
    let _ = writeln!(
        out,
        "\n{:<32} {:>8} {:>8} {:>5} {:>9}  dropped",
        "candidate", "total", "active", "rungs", "bits/byte"
    );
    for row in &found.rows {
        let bits = row.bits_per_byte.map_or_else(|| "-".to_owned(), |b| format!("{b:.4}"));
        let _ = writeln!(
            out,
            "{:<32} {:>8} {:>8} {:>5} {bits:>9}  {}",
            row.name,
            short(row.parameters as f64),
            short(row.active_parameters as f64),
            row.rungs,
            row.dropped.as_deref().unwrap_or("")
        );
    }
    for line in &found.skipped {
        let _ = writeln!(out, "no model: {line}");
    }
    let sets: String = found.chosen.iter().map(|set| format!(" --set {set}")).collect();
    let _ =
        writeln!(out, "\nthe page: {}\ntry: senmon compare --data …{sets}", args.out.join(SWEEP).display());
    out
}

/// Tells how it goes, a line now and then.
struct Lines {
    quiet: bool,
    last: Option<Instant>,
}

impl Watch for Lines {
    fn begins(&mut self, name: &str, number: usize, of: usize) {
        self.last = Some(Instant::now());
        if !self.quiet {
            eprintln!("run {number} of {of}: {name}");
        }
    }

    fn step(&mut self, record: &StepRecord, last: u64) {
        if !self.quiet && self.last.is_none_or(|told| told.elapsed() >= EVERY) {
            self.last = Some(Instant::now());
            let speed = short(record.tokens_per_second);
            eprintln!("  step {} of {last}, loss {:.4}, {speed} tokens/s", record.step, record.loss);
        }
    }

    fn evaluated(&mut self, record: &EvalRecord) {
        if !self.quiet && self.last.is_none_or(|told| told.elapsed() >= EVERY) {
            eprintln!("  step {}: {:.4} held-out bits per byte", record.step, record.bits_per_byte);
        }
    }

    fn ends(&mut self, record: &Record) {
        if !self.quiet {
            match &record.failed {
                Some(why) => eprintln!("  {why}"),
                None => eprintln!(
                    "  {:.4} held-out bits per byte after {} tokens",
                    record.bits_per_byte,
                    short(record.tokens as f64)
                ),
            }
        }
    }

    fn note(&mut self, text: &str) {
        if !self.quiet {
            eprintln!("note: {text}");
        }
    }
}
