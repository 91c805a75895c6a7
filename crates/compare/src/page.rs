//! The page of a comparison, and that of a sweep: what was found first, then what it rests on.

use senmon_page::{
    Axis, Bars, Best, Block, Cell, Column, Details, Format, Line, Lines, Page, Rich, Section, Selector,
    Table, Text, Tone, Verdict as Shown,
};

use crate::analysis::{ALPHA, Analysis};
use crate::error::Result;
use crate::plan::{Equality, Model, Plan};
use crate::record::Record;
use crate::run::Outcomes;
use crate::statistics::{band, mean, paired};
use crate::sweep::Sweep;
use crate::verdict::{Finding, Verdict};

/// What the page says of where it comes from: names and values.
pub type Facts = Vec<(String, String)>;

fn tone(finding: Finding) -> Tone {
    match finding {
        Finding::Better => Tone::Good,
        Finding::Worse => Tone::Bad,
        Finding::NoGain | Finding::Unknown => Tone::Unclear,
    }
}

/// The page of a comparison.
pub fn comparison(
    plan: &Plan,
    outcomes: &Outcomes,
    analysis: &Analysis,
    verdicts: &[Verdict],
    facts: &Facts,
) -> Result<Page> {
    let mut first = Section::new("verdicts", "What was found");
    for verdict in verdicts {
        let shown = Shown::new(tone(verdict.finding), verdict.label.clone(), sentence(&verdict.sentence));
        let notes: Vec<String> = verdict.notes.iter().map(|note| sentence(note)).collect();
        first = first.block(shown.note(notes.join(" ")));
    }
    let mut page = Page::new("Does the mixture of experts pay?").subtitle(
        "Models on the same text, compared at equal cost on text that none of them was trained on.",
    );
    for (name, value) in facts {
        page = page.fact(name, value);
    }
    page = page
        .section(first)
        .section(Section::new("arms", "The models").block(arms(plan, outcomes)))
        .section(differences(analysis))
        .section(curves(plan, outcomes));
    let domains = domains(analysis);
    if !domains.blocks.is_empty() {
        page = page.section(domains);
    }
    let mut settings = Section::new("settings", "Configuration of every model");
    for model in &plan.models {
        settings = settings.block(Details::new(model.name.clone()).block(configuration(model)?));
    }
    Ok(page.section(settings).footer(
        Rich::new()
            .text("Written by ")
            .code("senmon compare")
            .text("; docs/compare.md has every formula, and what a comparison cannot say."),
    ))
}

/// A sentence: with a capital and a full stop.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars.next().map_or_else(String::new, |c| c.to_uppercase().collect());
    format!("{first}{}.", chars.as_str())
}

/// What a model is equal in, and how nearly.
fn serves(plan: &Plan, model: usize) -> String {
    let of = |e: Equality| {
        let place = plan.places.iter().find(|p| p.model == model && p.equality == e)?;
        Some(match e {
            Equality::Time => e.name().to_owned(),
            _ => format!("{} ({:.3})", e.name(), place.ratio),
        })
    };
    Equality::ALL.into_iter().filter_map(of).collect::<Vec<_>>().join(", ")
}

fn arms(plan: &Plan, outcomes: &Outcomes) -> Block {
    let columns = [
        Column::text("model"),
        Column::text("equal in"),
        Column::number("parameters", Format::compact()),
        Column::number("active", Format::compact()),
        Column::number("tokens", Format::compact()),
        Column::number("training FLOPs", Format::compact()),
        Column::number("minutes", Format::fixed(2)),
        Column::number("peak memory, GB", Format::fixed(2)),
        Column::text("bits per byte, by seed"),
        Column::number("mean", Format::fixed(4)).best(Best::Lowest),
        Column::number("lowest on the way", Format::fixed(4)),
        Column::text("95 % interval of the mean"),
    ];
    let mut table = Table::new("Every model that was trained", columns).note(
        "Held-out bits per byte at the end of the runs. What a model is equal in stands with what it has over what the first one has. The interval is of each model alone, over seeds; differences of models that are \
         paired by seed are surer than it. Of an ensemble, parameters, operations and time are those of all members, tokens those of each.",
    );
    for (m, (model, records)) in plan.models.iter().zip(outcomes).enumerate() {
        let bits: Vec<f64> = records.iter().map(|r| r.bits_per_byte).collect();
        let by_seed: Vec<String> = bits.iter().map(|b| format!("{b:.4}")).collect();
        let interval = paired(&bits, ALPHA).map(|i| format!("{:.4} to {:.4}", i.low, i.high));
        let of = |value: fn(&Record) -> f64| mean(&records.iter().map(value).collect::<Vec<_>>());
        let memory = records.iter().filter_map(|r| r.peak_memory_bytes).max();
        table = table.row([
            Cell::from(model.name.clone()),
            serves(plan, m).into(),
            (model.footprint.total as f64).into(),
            (model.footprint.active as f64).into(),
            (model.tokens as f64).into(),
            model.training_flops().into(),
            of(|r| r.seconds / 60.0).into(),
            memory.map(|bytes| bytes as f64 / 1e9).into(),
            by_seed.join(", ").into(),
            mean(&bits).into(),
            of(Record::best).into(),
            interval.into(),
        ]);
    }
    table.into()
}

fn differences(analysis: &Analysis) -> Section {
    let columns = [
        Column::text("equal"),
        Column::text("difference"),
        Column::number("bits per byte", Format::fixed(4).signed()),
        Column::text("interval, corrected"),
        Column::number("p (Holm)", Format::fixed(4)),
        Column::text("interval over seeds alone"),
        Column::number("time to its loss", Format::times(2)),
        Column::number("tokens to its loss", Format::times(2)),
        Column::number("FLOPs to its loss", Format::times(2)),
    ];
    let mut table = Table::new("Every comparison", columns).note(format!(
        "Negative is in favour of the first. {} intervals hold together with 95 %.",
        analysis.intervals
    ));
    let text = |i: Option<crate::statistics::Interval>| i.map(|i| format!("{:+.4} to {:+.4}", i.low, i.high));
    for c in &analysis.comparisons {
        let reach = c.reach.clone().unwrap_or_default();
        table = table.row([
            Cell::from(c.equality.name()),
            format!("{} minus {}", c.subject, c.other).into(),
            c.mean.into(),
            text(c.difference).into(),
            c.holm_p.into(),
            text(c.seeds_only).into(),
            reach.time.map(|i| i.estimate).into(),
            reach.tokens.map(|i| i.estimate).into(),
            reach.flops.map(|i| i.estimate).into(),
        ]);
    }
    Section::new("comparisons", "The comparisons").block(table)
}

fn curves(plan: &Plan, outcomes: &Outcomes) -> Section {
    type Curve = fn(&Record) -> Vec<(f64, f64)>;
    let against: [(&str, &str, Curve); 3] = [
        ("tokens", "tokens trained on", Record::by_tokens),
        ("training FLOPs", "training FLOPs", Record::by_flops),
        ("time", "seconds of training", Record::by_seconds),
    ];
    let mut selector = Selector::new("Against");
    for (label, axis, of) in against {
        let x = Axis::new(axis).format(Format::compact());
        let y = Axis::new("held-out bits per byte").format(Format::fixed(3));
        let mut lines = Lines::new(format!("Learning curves against {label}"), x, y)
            .note("Mean over seeds; the band is from the lowest to the highest.");
        for (model, records) in plan.models.iter().zip(outcomes) {
            let points = band(&records.iter().map(of).collect::<Vec<_>>());
            let part = |f: fn(&(f64, f64, f64, f64)) -> f64| points.iter().map(f).collect::<Vec<_>>();
            let line = Line::new(model.name.clone(), part(|p| p.0), part(|p| p.1));
            lines = lines.line(line.band(part(|p| p.2), part(|p| p.3)));
        }
        selector = selector.variant(label, lines);
    }
    Section::new("curves", "Learning curves").block(selector)
}

fn domains(analysis: &Analysis) -> Section {
    let mut section = Section::new("domains", "By domain").intro(
        "Where the first is better, bars go to the left. The intervals of one chart hold together with 95 %; those of several do not.",
    );
    let mut known: Vec<(&str, &str)> = Vec::new();
    for c in analysis.comparisons.iter().filter(|c| c.domains.len() > 1) {
        let models = (c.subject_model.as_str(), c.other_model.as_str());
        if known.contains(&models) {
            continue;
        }
        known.push(models);
        let ends = |of: fn(&crate::statistics::Interval) -> f64| {
            c.domains.iter().map(move |d| d.interval.as_ref().map_or(f64::NAN, of)).collect::<Vec<_>>()
        };
        let mut bars = Bars::new(
            format!("{} minus {}, at {}", c.subject, c.other, c.equality.words()),
            c.domains.iter().map(|d| d.name.clone()),
        )
        .axes("domain", "difference, bits per byte")
        .series("difference", c.domains.iter().map(|d| d.mean));
        if c.domains.iter().all(|d| d.interval.is_some()) {
            bars = bars.interval(ends(|i| i.low), ends(|i| i.high));
        }
        section = section.block(bars.format(Format::fixed(3).signed()));
    }
    section
}

/// The keys of a model's configuration and their values.
fn configuration(model: &Model) -> Result<Table> {
    let text = model.config.to_toml()?;
    let mut table = Table::new(
        format!("senmon.toml of {}", model.name),
        [Column::text("table"), Column::text("key"), Column::text("value")],
    );
    let parsed: toml::Table = text.parse().unwrap_or_default();
    for (name, entries) in parsed {
        for (key, value) in entries.as_table().into_iter().flatten() {
            table = table.row([Cell::from(name.clone()), key.clone().into(), value.to_string().into()]);
        }
    }
    Ok(table)
}

/// The page of a sweep.
pub fn sweep(found: &Sweep, facts: &Facts) -> Page {
    let mut words = found.words.iter();
    let mut first = Section::new("choice", "What was chosen");
    if let Some(choice) = words.next() {
        first = first.block(Shown::new(Tone::Good, "Chosen", sentence(choice)));
    }
    for more in words {
        first = first.block(Text::new(sentence(more)));
    }
    let columns = [
        Column::text("candidate"),
        Column::number("parameters", Format::compact()),
        Column::number("active", Format::compact()),
        Column::number("FLOPs per token", Format::compact()),
        Column::number("rungs", Format::integer()),
        Column::number("tokens of the last", Format::compact()),
        Column::number("bits per byte", Format::fixed(4)),
        Column::text("why it went no further"),
    ];
    let shares: Vec<String> = found.shares.iter().map(|s| format!("{:.3}", s)).collect();
    let mut table = Table::new("Every candidate", columns).note(format!(
        "Losses can be compared within a rung: the rungs have {} of the training operations of the last.",
        shares.join(", ")
    ));
    for row in &found.rows {
        table = table.row([
            Cell::from(row.name.clone()),
            (row.parameters as f64).into(),
            (row.active_parameters as f64).into(),
            (row.flops_per_token as f64).into(),
            row.rungs.into(),
            (row.tokens as f64).into(),
            row.bits_per_byte.into(),
            row.dropped.clone().into(),
        ]);
    }
    let mut page = Page::new("Which shape is the budget best spent on?")
        .subtitle("Successive halving: equal training operations for all that are left, twice as many for the better half.");
    for (name, value) in facts {
        page = page.fact(name, value);
    }
    page = page.section(first).section(Section::new("candidates", "The candidates").block(table));
    if !found.skipped.is_empty() {
        let mut section = Section::new("skipped", "What makes no model");
        for line in &found.skipped {
            section = section.block(Text::new(line.clone()));
        }
        page = page.section(section);
    }
    page.footer(Rich::new().text("Written by ").code("senmon compare --sweep").text("."))
}
