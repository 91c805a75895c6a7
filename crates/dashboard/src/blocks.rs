//! The page of a view, block by block.

use std::time::Duration;

use senmon_page::{
    Axis, Block, Cell, Column, Figure, Figures, Format, Heat, Line, Lines, Page, Reference, Rich, Scale,
    Section, Table, Tone, Verdict, spread,
};
use senmon_train::terminal::{duration, short};

use crate::series::Series;
use crate::view::{End, LOSS, NORM, RATE, STEPS, TIME, View};

/// Layers of which curves are drawn, at most.
const CURVES: usize = 8;

/// The page as it is now. `events` is the address of what changes.
pub(crate) fn page(view: &View, events: &str) -> Page {
    let mut page = Page::new(&view.run.name)
        .subtitle("A training run, live. The page keeps itself up to date while the run lasts.")
        .live(events);
    page.facts.clone_from(&view.run.facts);
    if let Some(info) = &view.info {
        page = page
            .fact("parameters", short(info.parameters as f64))
            .fact("active per token", short(info.active_parameters as f64))
            .fact("tokens a step", short(info.tokens_per_step as f64))
            .fact("threads", info.threads.to_string());
    }
    page = page
        .section(Section::new("now", "Now").block(state(view)).block(now(view)))
        .section(Section::new("alarms", "Alarms").block(verdict(view)).block(alarms(view)));
    page = page.section(learning(view));
    if !view.run.layers.is_empty() {
        page = page.section(load(view));
    }
    page.footer("Served by senmon train --dashboard to this machine alone; all figures are in metrics.jsonl of the run, too.")
}

/// The blocks as the page's script takes them: all that can change.
pub(crate) fn blocks(page: &Page) -> senmon_page::Result<Vec<String>> {
    page.sections.iter().flat_map(|section| &section.blocks).map(Block::to_json).collect()
}

fn state(view: &View) -> Block {
    let steps = view.recent.last().map_or(0, |step| step.step);
    let of = view.info.as_ref().and_then(|info| info.limits.steps);
    let step = match of {
        Some(of) => format!("step {steps} of {of}"),
        None => format!("step {steps}"),
    };
    let time = duration(view.elapsed());
    let saved = match view.saved {
        Some(step) => format!("Step {step} is saved."),
        None => "Nothing is saved yet.".to_owned(),
    };
    let verdict = match &view.end {
        Some(End::Done) => {
            Verdict::new(Tone::Good, "done", format!("The run is over after {steps} steps and {time}."))
        }
        Some(End::Interrupted) => Verdict::new(
            Tone::Unclear,
            "interrupted",
            Rich::new()
                .text(format!("The run was interrupted at {step}; go on by "))
                .code(format!("senmon train --resume --out {}", view.run.name)),
        ),
        Some(End::Failed(message)) => {
            Verdict::new(Tone::Bad, "failed", format!("The run ended at {step}: {message}"))
        }
        None => {
            let label = if view.info.is_some() { "training" } else { "preparing" };
            Verdict::new(Tone::Neutral, label, sentence(view, &step, &time))
        }
    };
    Block::from(verdict.note(saved)).id("state")
}

fn sentence(view: &View, step: &str, time: &str) -> String {
    if view.info.is_none() {
        return "Data and model are being made ready.".to_owned();
    }
    let Some((progress, left)) = view.progress else { return "The first step is being computed.".to_owned() };
    let left = left.map_or(String::new(), |left: Duration| format!(", {} left", duration(left)));
    format!(
        "{}{}, {:.0} % of the run, after {time}{left}.",
        step[..1].to_uppercase(),
        &step[1..],
        100.0 * progress
    )
}

/// A block of large numbers.
fn now(view: &View) -> Block {
    let mean = |of: fn(&senmon_train::observer::StepRecord) -> f64| view.recent.mean(of).unwrap_or(f64::NAN);
    let tokens = view.recent.last().map_or(0.0, |step| step.tokens as f64);
    let mut figures = vec![
        Figure::new(format!("loss, mean of {} steps", view.recent.len().max(1)), mean(|s| s.loss))
            .format(Format::fixed(3)),
        Figure::new(
            "held-out bits per byte",
            view.last_eval.as_ref().map_or(f64::NAN, |eval| eval.bits_per_byte),
        )
        .format(Format::fixed(3)),
        Figure::new("tokens per second", view.speed().unwrap_or(f64::NAN)).format(Format::compact()),
        Figure::new("tokens so far", tokens).format(Format::compact()),
    ];
    if let Some(place) = view.least_even() {
        let cv = view.recent.mean(|step| step.layers.get(place).map_or(0.0, |layer| layer.load_cv));
        let layer = view.run.layers[place].0;
        figures.push(
            Figure::new(format!("load CV of layer {layer}, the least even"), cv.unwrap_or(f64::NAN))
                .format(Format::fixed(2)),
        );
        let idle =
            |step: &senmon_train::observer::StepRecord| step.layers.iter().map(|l| l.dead).sum::<usize>();
        let idle = view.recent.last().map_or(f64::NAN, |step| idle(step) as f64);
        figures.push(Figure::new("experts without a token in the last step", idle).format(Format::integer()));
        let drops = |s: &senmon_train::observer::StepRecord| s.layers.iter().map(|l| l.drops as f64).sum();
        if mean(drops) > 0.0 {
            figures.push(Figure::new("dropped per step", mean(drops)).format(Format::compact()));
        }
    }
    Block::from(Figures::new(figures)).id("figures")
}

fn verdict(view: &View) -> Block {
    let verdict = match view.alarms.front() {
        None => Verdict::new(
            Tone::Good,
            "none",
            "Nothing has gone wrong so far: no dead expert, no collapsed router, no load far from even, no jump of the loss.",
        ),
        Some(alarm) => Verdict::new(
            Tone::Bad,
            if view.alarm_count == 1 { "1 alarm".to_owned() } else { format!("{} alarms", view.alarm_count) },
            format!("Step {}: {}.", alarm.step, alarm.message),
        )
        .note(Rich::new().strong("What to try: ").text(alarm.remedy.clone())),
    };
    Block::from(verdict.announced()).id("alarm")
}

fn alarms(view: &View) -> Block {
    let columns = [
        Column::number("step", Format::integer()),
        Column::text("layer"),
        Column::text("what was seen"),
        Column::text("what to try"),
    ];
    let rows = view.alarms.iter().map(|alarm| {
        [
            Cell::from(alarm.step as f64),
            alarm.layer.map(|layer| layer.to_string()).as_deref().into(),
            alarm.message.as_str().into(),
            alarm.remedy.as_str().into(),
        ]
    });
    let mut table = Table::new("Alarms, the newest first", columns).rows(rows);
    if view.alarm_count > view.alarms.len() {
        table = table.note(format!("The newest {} of {}.", view.alarms.len(), view.alarm_count));
    }
    Block::from(table).id("all-alarms")
}

/// Lines over optimiser steps.
fn lines(title: &str, y: Axis) -> Lines {
    Lines::new(title, Axis::new("optimiser step").format(Format::integer()), y)
}

fn line(name: impl Into<String>, series: &Series, figure: usize) -> Line {
    Line::new(name, series.steps(), series.figure(figure))
}

fn learning(view: &View) -> Section {
    let curve = &view.curve;
    let loss = lines("Loss", Axis::new("nats per token").format(Format::fixed(3)))
        .note("In training, each point a mean over steps side by side, and on held-out text.")
        .line(line("training", curve, LOSS))
        .line(line("held-out", &view.evals, 0).points());
    let single = |title, axis, format, figure| {
        Block::from(lines(title, Axis::new(axis).format(format)).line(line(title, curve, figure)))
            .id(format!("curve-{figure}"))
    };
    let speed = Line::new("speed", curve.steps(), curve.figure(TIME).map(|seconds| 1.0 / seconds));
    let speed = lines("Speed", Axis::new("tokens per second").format(Format::compact())).line(speed);
    Section::new("learning", "Learning")
        .block(Block::from(loss).id("loss"))
        .block(Block::from(speed).id("speed").half())
        .block(single("Gradient", "norm before clipping", Format::auto(), NORM).half())
        .block(single("Learning rate", "learning rate", Format::auto(), RATE).half())
        .block(domains(view).half())
}

fn domains(view: &View) -> Block {
    let columns = [
        Column::text("domain"),
        Column::number("bits per byte", Format::fixed(4)),
        Column::number("nats per token", Format::fixed(4)),
        Column::number("tokens", Format::integer()),
    ];
    let rows = view.last_eval.iter().flat_map(|eval| {
        eval.domains.iter().map(|(name, domain)| {
            [
                Cell::from(name.as_str()),
                domain.bits_per_byte.into(),
                domain.loss.into(),
                (domain.tokens as f64).into(),
            ]
        })
    });
    let note = match &view.last_eval {
        Some(eval) => format!("At step {}.", eval.step),
        None => "There was no evaluation yet.".to_owned(),
    };
    Block::from(Table::new("Held-out text", columns).note(note).rows(rows)).id("domains")
}

fn load(view: &View) -> Section {
    let mut cv = lines("Load CV", Axis::new("coefficient of variation").format(Format::fixed(2)));
    let mut entropy =
        lines("Entropy of the load", Axis::new("share of the greatest").format(Format::fixed(2)));
    for place in spread(view.run.layers.len(), CURVES) {
        let name = format!("layer {}", view.run.layers[place].0);
        let (of_cv, of_entropy) = View::of_layer(place);
        cv = cv.line(line(&name, &view.curve, of_cv));
        entropy = entropy.line(line(&name, &view.curve, of_entropy));
    }
    Section::new("load", "Load")
        .intro("How much each expert does. An even router gives each the same; a dead expert is memory that does nothing.")
        .block(Block::from(heat(view)).id("heat"))
        .block(Block::from(cv).id("cv").half())
        .block(Block::from(entropy).id("entropy").half())
        .block(Block::from(moves(view)).id("moves"))
}

/// Colours around an even share.
fn scale(values: &[f64], even: f64) -> Scale {
    let greatest = values.iter().copied().filter(|value| value.is_finite()).fold(0.0, f64::max);
    Scale::Diverging { low: 0.0, centre: Reference::new("even", even), high: greatest.max(2.0 * even) }
}

/// Layers by experts, of late. Layers may differ in how many they have, so shares are told by an even one.
fn heat(view: &View) -> Heat {
    let loads = view.recent.loads();
    let most = view.run.layers.iter().map(|(_, experts)| *experts).max().unwrap_or(0);
    let values: Vec<f64> = view
        .run
        .layers
        .iter()
        .enumerate()
        .flat_map(|(place, (_, experts))| {
            let load = loads.get(place).map_or(&[][..], |(_, load)| load);
            load.iter().map(|share| share * *experts as f64).chain(std::iter::repeat(f64::NAN)).take(most)
        })
        .collect();
    Heat::new(
        "Load of every expert",
        view.run.layers.iter().map(|(layer, _)| format!("layer {layer}")),
        (0..most).map(|expert| expert.to_string()),
    )
    .note(format!(
        "The choices that went to an expert over those that an even share has, over the last {STEPS} steps. The middle of the \
         colours is an even share."
    ))
    .axes("", "expert", "of an even share")
    .scale(scale(&values, 1.0))
    .values(values)
    .format(Format::fixed(2))
}

/// The experts of the least even layer over the run.
fn moves(view: &View) -> Heat {
    let place = view.least_even().unwrap_or(0);
    let (layer, experts) = view.run.layers.get(place).copied().unwrap_or((0, 0));
    let before: usize = view.run.layers[..place].iter().map(|(_, experts)| *experts).sum();
    let values: Vec<f64> = (before..before + experts).flat_map(|expert| view.loads.figure(expert)).collect();
    let even = 1.0 / experts.max(1) as f64;
    Heat::new(
        format!("Layer {layer}, the least even of late, over the run"),
        (0..experts).map(|expert| expert.to_string()),
        view.loads.steps().map(|step| format!("{step:.0}")),
    )
    .note("Each column is a stretch of steps, each row an expert: where its tokens came from and went.")
    .axes("expert", "around step", "share of choices")
    .scale(scale(&values, even))
    .values(values)
    .format(Format::percent(1))
}
