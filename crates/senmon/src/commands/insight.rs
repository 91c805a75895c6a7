//! `inspect` with text: what the router and the experts do with it.

use super::routing::Routers;
use super::texts;
use crate::cli::InspectArgs;
use crate::failure::{Failure, Result};
use crate::ui::{INTERRUPTED, Passes};
use senmon_insight::report::{self, Page, Report, Side, Training};
use senmon_insight::statistics::{self, Alike, Options, Saturation, Statistics};
use senmon_insight::words::{self, Checked, LayerWords, WordOptions};
use senmon_insight::{About, Trace};
use senmon_models::audit::Audit;
use senmon_models::checkpoint::{self, Opened};
use senmon_models::decoder::Decoder;
use senmon_models::files;
use senmon_models::identity::model_hash;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_models::text::TokenizerSource;
use senmon_train::eval::EvalText;
use senmon_train::folder::{METRICS, TRACES, step_of_trace};
use senmon_train::jsonl::{self, Line};
use senmon_train::{ablation, likeness, tracing};
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Tokens that are looked at unless the user says how many.
const TOKENS: &str = "32k";

/// What there is to say of a text's routing.
pub(super) struct Looked {
    pub statistics: Statistics,
    /// Words for experts, and what became of them.
    words: Vec<LayerWords>,
    checked: Option<Vec<Vec<Checked>>>,
    /// How alike experts are.
    alike: Vec<Alike>,
}

impl Looked {
    /// For programs.
    pub fn document(&self) -> Value {
        json!({
            "options": Options::default(), "statistics": self.statistics, "words": self.words, "checked": self.checked,
            "alike": self.alike,
        })
    }
}

/// The kinds of a model's routers; refused where it has none.
fn kind(model: &Path, loaded: &Opened) -> Result<String> {
    match Routers::of_decoder(&loaded.spec).kind() {
        "" => Err(Failure::mistake(format!("{} has no experts to look at", model.display()))),
        kind => Ok(kind.to_owned()),
    }
}

/// The text run through the model, and its routing.
fn routed(text: &EvalText, model: &Path, loaded: Opened, router: String) -> Result<(Decoder, Trace)> {
    fits(text, &loaded.spec)?;
    let about = About { model: model_hash(model)?, router, domains: Vec::new() };
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    let trace = tracing::record(&decoder, text, about, true, &cancelled)?;
    let trace = trace.ok_or_else(|| Failure::interrupted("interrupted: nothing was written"))?;
    Ok((decoder, trace))
}

/// Refuses more text than memory has room for the routing of.
fn fits(text: &EvalText, spec: &ModelSpec) -> Result<()> {
    let tokens: usize = text.windows.iter().map(|(window, _)| window.len()).sum();
    // Logits of all experts; of each slot an expert, a weight and whether it was dropped.
    let of_layer = |ffn: &FfnSpec| match ffn {
        FfnSpec::Moe(moe) => 4 * moe.experts + 7 * moe.top_k,
        FfnSpec::Dense(_) => 0,
    };
    let needed = tokens as u64 * spec.layers.iter().map(of_layer).sum::<usize>() as u64;
    match senmon_files::available_memory() {
        Some(free) if needed > free / 2 => Err(Failure::mistake(format!(
            "the routing of {tokens} tokens takes {:.1} GB, {:.1} GB of memory are free: say a smaller --max-tokens",
            needed as f64 / 1e9,
            free as f64 / 1e9
        ))),
        _ => Ok(()),
    }
}

fn cancelled() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Writes a page.
fn write(file: &Path, page: &Page) -> Result<()> {
    let html = page.to_html().map_err(|e| Failure::other(e.to_string()))?;
    Ok(files::write_whole(file, |w| w.write_all(html.as_bytes()))?)
}

/// Runs the text through the model; what is wanted in files is written.
pub(super) fn of_text(args: &InspectArgs, loaded: Opened) -> Result<Looked> {
    let model = &args.from.model;
    let kind = kind(model, &loaded)?;
    for file in [&args.trace, &args.report].into_iter().flatten() {
        super::check_out(file)?;
    }
    // What cannot be read is told before the long work.
    let training = if args.report.is_some() { training(model)? } else { None };
    let tokenizer = loaded.tokenizer.as_ref().map(TokenizerSource::load).transpose()?;
    let text = texts::windows(&args.text, model, &loaded, TOKENS, args.common.quiet)?;
    let (decoder, trace) = routed(&text, model, loaded, kind.clone())?;
    if let Some(file) = &args.trace {
        trace.write(file)?;
    }
    let statistics = statistics::of(&trace, &Options::default())?;
    if args.report.is_none() && !args.common.json {
        return Ok(Looked { statistics, words: Vec::new(), checked: None, alike: Vec::new() });
    }
    let token = |id: u32| match tokenizer.as_ref().and_then(|tokenizer| tokenizer.decode(&[id], false).ok()) {
        Some(text) => text,
        None => format!("<{id}>"),
    };
    let words = words::of(&trace, &WordOptions::default(), &token)?;
    let checked = match args.no_ablation || kind == "soft" {
        true => None,
        false => {
            let bar = Passes::new(args.common.quiet, "switching experts off");
            let mut progress = |done: usize, all: usize| bar.show(done, all);
            let found = ablation::check(&decoder, &trace, &words, 0, &mut progress, &cancelled)?;
            bar.done();
            Some(found.ok_or_else(|| Failure::interrupted("interrupted: no report was written"))?)
        }
    };
    let alike = match args.no_likeness {
        true => Vec::new(),
        false => {
            let bar = Passes::new(args.common.quiet, "comparing experts");
            let mut progress = |done: usize, all: usize| bar.show(done, all);
            let found = likeness::of(&decoder, &trace, &mut progress, &cancelled)?;
            bar.done();
            found.ok_or_else(|| Failure::interrupted("interrupted: no report was written"))?
        }
    };
    if let Some(file) = &args.report {
        let name = model.file_name().unwrap_or(model.as_os_str()).to_string_lossy();
        let report = Report {
            model: &name,
            trace: &trace,
            statistics: &statistics,
            words: &words,
            checked: checked.as_deref(),
            alike: &alike,
            training: training.as_ref(),
            token: &token,
        };
        write(file, &report.page())?;
    }
    Ok(Looked { statistics, words, checked, alike })
}

/// The routing of two models on the same text.
pub(super) struct Two {
    names: [String; 2],
    statistics: [Statistics; 2],
    /// How often they choose the same experts, where that can be said.
    agreement: Option<Vec<Saturation>>,
}

impl Two {
    /// For programs.
    pub fn document(&self) -> Value {
        let [a, b] = &self.statistics;
        json!({ "names": self.names, "first": a, "second": b, "agreement": self.agreement })
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for (name, statistics) in self.names.iter().zip(&self.statistics) {
            let _ = write!(out, "\n{name}{}", table(statistics));
        }
        for layer in self.agreement.iter().flatten() {
            let percent = |x: Option<f64>| x.map_or_else(|| "-".into(), |x| format!("{:.1} %", 100.0 * x));
            let _ = writeln!(
                out,
                "layer {}: {} of experts in common ({} by chance)",
                layer.layer,
                percent(layer.experts.value),
                percent(layer.experts.chance)
            );
        }
        out
    }
}

/// Runs the text through two models.
pub(super) fn of_two(args: &InspectArgs, first: Opened, other: &Path) -> Result<Two> {
    if args.trace.is_some() {
        return Err(Failure::mistake("--trace is of one model: it does not go with --compare"));
    }
    if let Some(file) = &args.report {
        super::check_out(file)?;
    }
    let second = checkpoint::open(other, args.from.audit_or(Audit::Full))?;
    let model = args.from.model.as_path();
    let kinds = [kind(model, &first)?, kind(other, &second)?];
    // Both see the same text: what is named, or what the first one held out. Windows are as long as those of a run where one of them is
    // one's, and fit both.
    let mut text = args.text.clone();
    for run in [model, other] {
        let of_run = texts::run_of(run)?.map(|config| config.train.sequence);
        text.sequence = text.sequence.or(of_run);
    }
    let most = first.spec.max_positions.min(second.spec.max_positions);
    text.sequence = Some(text.sequence.unwrap_or(256).min(most));
    let quiet = args.common.quiet;
    let windows = texts::windows(&text, model, &first, TOKENS, quiet)?;
    let same_tokens = tokenizer_text(&first)? == tokenizer_text(&second)?;
    // A model of other tokens sees the same characters, cut otherwise.
    let of_second = match (same_tokens, text.data.is_empty()) {
        (true, _) => windows.clone(),
        (false, false) => texts::windows(&text, other, &second, TOKENS, quiet)?,
        (false, true) => {
            return Err(Failure::mistake(format!(
                "{} and {} have different tokenizers: say --data PATH, the text that both are to see",
                model.display(),
                other.display()
            )));
        }
    };
    let names = short_names(model, other);
    let mut sides = Vec::new();
    let both = [(model, first, windows), (other, second, of_second)];
    for ((model, loaded, windows), kind) in both.into_iter().zip(kinds) {
        let (_, trace) = routed(&windows, model, loaded, kind)?;
        let statistics = statistics::of(&trace, &Options::default())?;
        sides.push((trace, statistics));
    }
    let [a, b] = &sides[..] else { return Err(Failure::other("two models are compared")) };
    if let Some(file) = &args.report {
        let page = report::compare(
            Side { name: &names[0], trace: &a.0, statistics: &a.1 },
            Side { name: &names[1], trace: &b.0, statistics: &b.1 },
        );
        write(file, &page)?;
    }
    let agreement = statistics::saturation(&a.0, &b.0).ok();
    Ok(Two { names, statistics: [a.1.clone(), b.1.clone()], agreement })
}

/// What two models are called: their last names where these tell them apart, else their paths.
fn short_names(a: &Path, b: &Path) -> [String; 2] {
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    match (last(a), last(b)) {
        (Some(a), Some(b)) if a != b => [a, b],
        _ => [a.display().to_string(), b.display().to_string()],
    }
}

/// A model's tokenizer as it is in its file, to see whether two are one.
fn tokenizer_text(loaded: &Opened) -> Result<Option<Vec<u8>>> {
    let Some(source) = &loaded.tokenizer else { return Ok(None) };
    let file = source.file()?;
    let text = std::fs::read(&file);
    Ok(Some(text.map_err(|e| Failure::mistake(format!("cannot read {}: {e}", file.display())))?))
}

/// How the run of a run folder went.
fn training(model: &Path) -> Result<Option<Training>> {
    let metrics = model.join(METRICS);
    if !metrics.is_file() {
        return Ok(None);
    }
    let mut training = Training::default();
    jsonl::each(&metrics, |line| {
        let Line::Step(step) = line else { return ControlFlow::Continue(()) };
        training.steps.push(step.step);
        for layer in step.layers {
            let place = training.layers.iter().position(|(number, ..)| *number == layer.layer);
            let place = place.unwrap_or_else(|| {
                training.layers.push((layer.layer, Vec::new(), Vec::new()));
                training.layers.len() - 1
            });
            training.layers[place].1.push(layer.load_cv);
            training.layers[place].2.push(layer.entropy);
        }
        ControlFlow::Continue(())
    })?;
    let mut traces: Vec<(u64, PathBuf)> = std::fs::read_dir(model.join(TRACES))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect::<Vec<_>>())
        .unwrap_or_default()
        .into_iter()
        .filter_map(|path| Some((step_of_trace(&path)?, path)))
        .collect();
    traces.sort();
    if let Some((_, last)) = traces.last() {
        let last = Trace::read(last)?;
        for (step, path) in &traces {
            // Of an earlier run in the same folder, or of other text: nothing to compare.
            if let Ok(found) = statistics::saturation(&Trace::read(path)?, &last) {
                training.saturation.push((*step, found));
            }
        }
    }
    Ok(Some(training))
}

/// For people: a line for each layer.
pub(super) fn table(statistics: &Statistics) -> String {
    let number = |x: Option<f64>, digits: usize| x.map_or_else(|| "-".into(), |x| format!("{x:.digits$}"));
    let mut out = String::new();
    let _ = writeln!(
        out,
        "\n{} tokens of {} texts in {} domains, loss {} nats per token; (by chance)\n\n\
         {:<10} {:>13}  {:>13}  {:>5}  {:>13}  {:>13}  {:>13}",
        statistics.tokens,
        statistics.texts,
        statistics.domains.len(),
        number(statistics.loss, 3),
        "layer",
        "load CV",
        "entropy",
        "dead",
        "greatest p",
        "same as last",
        "tells domain"
    );
    for layer in &statistics.layers {
        let name = layer.name.clone().unwrap_or_else(|| layer.layer.to_string());
        let pair = |value: Option<f64>, chance: Option<f64>| match value {
            None => "-".into(),
            Some(_) => format!("{} ({})", number(value, 2), number(chance, 2)),
        };
        let figure = |f: &statistics::Figure| pair(f.value, f.chance);
        let domain = &layer.domains.information;
        let _ = writeln!(
            out,
            "{name:<10} {:>13}  {:>13}  {:>5}  {:>13}  {:>13}  {:>13}",
            figure(&layer.load.cv),
            figure(&layer.load.entropy),
            layer.load.dead.len(),
            figure(&layer.confidence.mean_probability),
            figure(&layer.repeats.all.first_rate),
            pair(domain.normalized, domain.shuffled_normalized),
        );
    }
    out.push_str("\nWhat each figure is: docs/insight.md\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_where_they_tell_apart() {
        let names = |a: &str, b: &str| short_names(Path::new(a), Path::new(b));
        assert_eq!(names("runs/a", "runs/a/checkpoints/step-7"), ["a", "step-7"]);
        assert_eq!(names("x/a", "y/a"), ["x/a", "y/a"]);
    }
}
