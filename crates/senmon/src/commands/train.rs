//! `train`: a run begun or gone on with, and what came of it.

use super::text::{Manner, continue_all};
use super::texts::cache_folder;
use super::{on_threads, print, print_json, size};
use crate::cli::TrainArgs;
use crate::failure::{Failure, Result};
use crate::ui::{DataProgress, INTERRUPTED, on_terminal, peak_memory};
use indicatif::ProgressDrawTarget;
use senmon_dashboard::{Address, Dashboard};
use senmon_data::TextTokenizer;
use senmon_models::penalties::Penalties;
use senmon_models::sampling::Sampling;
use senmon_train::RunConfig;
use senmon_train::alarms::Alarm;
use senmon_train::eval::EvalText;
use senmon_train::folder::RunFolder;
use senmon_train::jsonl::Jsonl;
use senmon_train::layers::Layers;
use senmon_train::observer::{Ending, Observer, Observers, StepRecord, Summary};
use senmon_train::presets::{Footprint, footprint};
use senmon_train::recent::{Recent, cv};
use senmon_train::setup::{self, Setup};
use senmon_train::tensorboard::TensorBoard;
use senmon_train::terminal::{Terminal, duration, short};
use senmon_train::trainer::Trainer;
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Steps that the load in the last table is averaged over.
const LOAD_STEPS: usize = 50;

pub(super) fn run(mut args: TrainArgs) -> Result<()> {
    // An address that cannot be had ends the command before anything is made.
    let mut live = args.dashboard.as_ref().map(|address| open(address.as_deref(), &args)).transpose()?;
    if let Some(init) = &mut args.init {
        super::hub::find(init, args.common.quiet)?;
    }
    crate::ui::catch_interrupts();
    senmon_kernels::process::keep_freed_memory();
    let ended = prepare(args, live.as_mut());
    match (&mut live, &ended) {
        (Some(live), Err(failure)) if !failure.is_interruption() => live.failed(&failure.to_string()),
        _ => {}
    }
    ended
}

fn prepare(args: TrainArgs, live: Option<&mut Dashboard>) -> Result<()> {
    if args.resume {
        let folder = RunFolder::resume(&args.out)?;
        let layers = Layers::over(folder.read_config()?);
        let fixed = [
            ("--data", !args.data.is_empty()),
            ("--batches", args.batches.is_some()),
            ("--tokenizer", args.tokenizer.is_some()),
        ];
        for (flag, given) in fixed {
            if given {
                return Err(Failure::mistake(format!(
                    "{flag} does not go with --resume: a run goes on with what it began with (to train on something else, \
                     say --init {} --out ANOTHER)",
                    args.out.display()
                )));
            }
        }
        let config = flags(layers, &args)?.resolve()?;
        return on_threads(config.train.threads, move || {
            let progress = DataProgress::new(args.common.quiet);
            let setup = setup::resume(config, folder, &cache_folder(), &progress)?;
            progress.done();
            train(setup, &args, live)
        })?;
    }
    let config = new_config(&args)?;
    on_threads(config.train.threads, move || {
        let progress = DataProgress::new(args.common.quiet);
        let setup = setup::create(config, &args.out, &cache_folder(), &progress)?;
        progress.done();
        train(setup, &args, live)
    })?
}

/// The configuration of a run that begins.
fn new_config(args: &TrainArgs) -> Result<RunConfig> {
    let mut layers = Layers::new();
    if let Some(preset) = &args.preset {
        layers = layers.preset(preset);
    }
    Ok(setup::configure(flags(layers, args)?)?)
}

/// What flags say, over files and under nothing.
fn flags(mut layers: Layers, args: &TrainArgs) -> Result<Layers> {
    if let Some(file) = &args.config {
        layers = layers.file(file)?;
    }
    for argument in &args.set {
        layers = layers.set(argument)?;
    }
    let path = |path: &Path| path.display().to_string();
    if !args.data.is_empty() {
        let paths: Vec<String> = args.data.iter().map(|p| path(p)).collect();
        layers = layers.set_value("data.paths", paths)?;
    }
    let paths =
        [("train.init", &args.init), ("train.batches", &args.batches), ("data.tokenizer", &args.tokenizer)];
    for (key, value) in paths {
        if let Some(value) = value {
            layers = layers.set_value(key, path(value))?;
        }
    }
    for (key, value) in [("data.domains", &args.domains), ("data.column", &args.column)] {
        if let Some(value) = value {
            layers = layers.set_value(key, value.as_str())?;
        }
    }
    if let Some(precision) = args.precision {
        layers = layers.set_value("train.precision", precision.name())?;
    }
    let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    for (flag, key, value) in
        [("--steps", "train.steps", &args.steps), ("--tokens", "train.tokens", &args.tokens)]
    {
        if let Some(value) = value {
            layers = layers.set_value(key, whole(size(flag, value)?))?;
        }
    }
    if let Some(minutes) = args.minutes {
        layers = layers.set_value("train.minutes", minutes)?;
    }
    for (key, value) in [
        ("train.seed", args.seed),
        ("train.trace_every", args.trace_every),
        ("train.threads", args.common.threads.map(|n| n as u64)),
    ] {
        if let Some(value) = value {
            layers = layers.set_value(key, whole(value))?;
        }
    }
    Ok(layers)
}

/// Trains to the end and tells what came of it.
fn train(setup: Setup, args: &TrainArgs, mut live: Option<&mut Dashboard>) -> Result<()> {
    let Setup { mut trainer, tokenizer, report, notes } = setup;
    let quiet = args.common.quiet;
    if !quiet {
        if let Some(report) = &report {
            eprintln!("{report}");
        }
        for note in &notes {
            eprintln!("note: {note}");
        }
    }
    let root = trainer.folder.root().to_owned();
    let first = trainer.progress.step;
    let mut seen = Seen { recent: Recent::of(LOAD_STEPS), alarms: Vec::new() };
    if let Some(live) = &mut live {
        live.prepared(described(&trainer, args));
    }
    let mut observers = Observers::new();
    if !quiet {
        match on_terminal() {
            true => observers.push(Terminal::bar(ProgressDrawTarget::stderr())),
            false => observers.push(Terminal::lines(std::io::stderr(), Duration::from_secs(10))),
        }
    }
    let metrics = trainer.folder.metrics();
    observers.push(if first > 0 { Jsonl::resume(&metrics, first)? } else { Jsonl::create(&metrics)? });
    observers.push(TensorBoard::create(&root)?);
    observers.push(&mut seen);
    if let Some(live) = live {
        let remembered = match first {
            0 => Ok(()),
            _ => live.remember(&metrics, &|| INTERRUPTED.load(Ordering::Relaxed)),
        };
        if let Err(error) = remembered {
            eprintln!("note: the live view lacks what came before: {error}");
        }
        observers.push(live);
    }
    let summary = trainer.run(&mut observers, &INTERRUPTED)?;
    drop(observers);

    let again = format!("senmon train --resume --out {}", args.out.display());
    if summary.ending == Ending::Interrupted {
        return Err(Failure::interrupted(format!(
            "interrupted; step {} is saved, go on by: {again}",
            summary.steps
        )));
    }
    let spec = trainer.decoder.spec();
    let cost = footprint(spec, trainer.config.train.sequence);
    let sample = match (&tokenizer, quiet && !args.common.json) {
        (Some(tokenizer), false) => {
            let sampling = Sampling { seed: trainer.config.train.seed, ..Sampling::default() };
            let (decoder, prompt) = (&trainer.decoder, prompt(&trainer.eval, tokenizer)?);
            let manner = Manner {
                tokenizer: tokenizer.inner(),
                sampling,
                penalties: Penalties::default(),
                max_tokens: 96,
                logprobs: None,
                eos: &decoder.spec().tokens.eos,
                stops: &[],
            };
            let prompts = [prompt];
            let done = continue_all(decoder, &manner, &prompts, 1, None, &mut |_, _| Ok(()))?;
            let text: String = done.into_iter().map(|done| done.text).collect();
            let [prompt] = prompts;
            Some((prompt, text))
        }
        _ => None,
    };
    let (family, _) = senmon_models::families::config_json(spec, &trainer.config.model.family)?;
    if args.common.json {
        return print_json(&serde_json::json!({
            "out": root,
            "family": family.name,
            "steps": summary.steps,
            "tokens": summary.tokens,
            "seconds": summary.seconds,
            "tokens_per_second": summary.tokens_per_second,
            "loss": seen.recent.last().map(|last| last.loss),
            "parameters": cost.total,
            "active_parameters": cost.active,
            "flops_per_token": cost.flops_per_token,
            "peak_memory_bytes": peak_memory(),
            "eval": summary.eval,
            "load": seen.recent.loads().into_iter().map(|(layer, load)| serde_json::json!({
                "layer": layer, "load": load, "cv": cv(&load), "drops": seen.recent.drops(layer),
            })).collect::<Vec<_>>(),
            "alarms": seen.alarms,
            "data": report,
            "sample": sample.map(|(prompt, text)| serde_json::json!({ "prompt": prompt, "text": text })),
        }));
    }
    print(&words(&summary, &cost, &seen, family.name, &root))?;
    if let Some((prompt, text)) = sample {
        print(&format!("\nA sample ({prompt:?} was given):\n{prompt}{text}\n"))?;
    }
    if !quiet {
        let show = args.out.display();
        eprintln!(
            "\nsaved in {show}; try: senmon generate {show} --prompt {:?}; go further by: {again} --tokens N",
            "pub fn "
        );
    }
    Ok(())
}

/// The live view, at an address or where there is room; where that is, is said even to who wants to hear nothing else.
fn open(address: Option<&str>, args: &TrainArgs) -> Result<Dashboard> {
    let address = address.map_or_else(|| Ok(Address::default()), str::parse)?;
    let live = Dashboard::open(address.bind()?, args.out.display().to_string())?;
    eprintln!("live view: {}", live.url());
    Ok(live)
}

/// What the live view tells of a run.
fn described(trainer: &Trainer, args: &TrainArgs) -> senmon_dashboard::Run {
    let layers: Vec<(usize, usize)> =
        trainer.decoder.moe_layers().map(|(layer, moe)| (layer, moe.config().choices())).collect();
    let mut facts = Vec::new();
    if let (Some((_, moe)), Some((_, experts))) = (trainer.decoder.moe_layers().next(), layers.first()) {
        facts.push(("router".to_owned(), moe.config().router.kind.clone()));
        facts.push(("MoE layers".to_owned(), format!("{} of {experts} experts", layers.len())));
    }
    senmon_dashboard::Run { name: args.out.display().to_string(), facts, layers }
}

/// The beginning of a held-out text of the largest domain.
fn prompt(eval: &Option<(EvalText, EvalText)>, tokenizer: &TextTokenizer) -> Result<String> {
    let Some((_, text)) = eval else { return Ok(String::new()) };
    let Some((window, _)) = text.windows.iter().find(|(_, domain)| *domain == 0).or(text.windows.first())
    else {
        return Ok(String::new());
    };
    let text = tokenizer.decode(&window[..window.len().min(24)])?;
    // Neither half a character nor the end of another text.
    Ok(text.trim_matches('\u{fffd}').to_owned())
}

/// What the last table needs of the run.
struct Seen {
    recent: Recent,
    alarms: Vec<Alarm>,
}

impl Observer for Seen {
    fn step(&mut self, record: &StepRecord) -> senmon_train::Result<()> {
        self.recent.push(record.clone());
        Ok(())
    }

    fn alarm(&mut self, alarm: &Alarm) -> senmon_train::Result<()> {
        self.alarms.push(alarm.clone());
        Ok(())
    }
}

/// The table at the end.
fn words(summary: &Summary, cost: &Footprint, seen: &Seen, family: &str, root: &Path) -> String {
    let mut out = String::new();
    let time = duration(Duration::try_from_secs_f64(summary.seconds).unwrap_or_default());
    let mut line = |what: &str, value: String| {
        let _ = writeln!(out, "{what:<12} {value}");
    };
    line("run", format!("{}, readable as {family}", root.display()));
    line(
        "trained",
        format!(
            "{} steps, {} tokens in {time}, {} tokens/s",
            summary.steps,
            short(summary.tokens as f64),
            short(summary.tokens_per_second)
        ),
    );
    line(
        "parameters",
        format!("{} in total, {} active per token", short(cost.total as f64), short(cost.active as f64)),
    );
    if let Some(peak) = peak_memory() {
        line("peak memory", format!("{:.2} GB", peak as f64 / 1e9));
    }
    if let Some(last) = seen.recent.last() {
        let terms: String = last.losses.iter().map(|(name, value)| format!(", {name} {value:.4}")).collect();
        line("last step", format!("loss {:.4}{terms}", last.loss));
    }
    if !seen.alarms.is_empty() {
        line("alarms", format!("{}, see metrics.jsonl", seen.alarms.len()));
    }
    if let Some(eval) = &summary.eval {
        let _ = write!(out, "\nheld-out text\n{}", super::eval::table(eval));
    }
    let loads = seen.recent.loads();
    if !loads.is_empty() {
        let steps = seen.recent.len();
        let _ =
            writeln!(out, "\nload of each expert in % of its layer's tokens, over the last {steps} steps");
        let _ = writeln!(out, "layer     CV  experts");
        for (layer, load) in loads {
            let mut shares: String =
                load.iter().take(32).map(|share| format!(" {:>4.1}", 100.0 * share)).collect();
            if load.len() > 32 {
                let _ = write!(shares, " and {} more", load.len() - 32);
            }
            let _ = writeln!(out, "{layer:>5}  {:>5.3} {shares}", cv(&load));
        }
    }
    out
}
