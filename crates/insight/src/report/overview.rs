//! The first section: the answer in a sentence, and the figures that a hurried reader wants.

use super::Report;
use crate::words::{Standing, Tally};
use senmon_page::{Block, Figure, Figures, Format, Rich, Section, Text, Tone, Verdict};

/// Labels that survive by chance, at most, as a part of those given.
const BY_CHANCE: f64 = 0.05;

pub(super) fn section(report: &Report) -> Section {
    let mut section = Section::new("overview", "Overview");
    for verdict in verdicts(report) {
        section = section.block(verdict);
    }
    section.block(figures(report)).block(standings(report))
}

/// Whether experts are for something.
fn verdicts(report: &Report) -> Vec<Verdict> {
    let tally = Tally::of(report.experts().map(|(_, words, checked)| (words, checked)));
    if report.checked.is_none() {
        let sentence = format!(
            "{} of {} experts have a label. No expert was switched off to see whether the labels are true: they say what an expert's \
             tokens have in common, not what the expert does.",
            tally.labelled, tally.experts
        );
        return vec![Verdict::new(Tone::Unclear, "Not checked", sentence)];
    }
    let part = |some: usize, all: usize| some as f64 / all.max(1) as f64;
    let by_domain = match () {
        () if tally.domains_confirmed > 0 && part(tally.domains_confirmed, tally.experts) > BY_CHANCE => Verdict::new(
            Tone::Good,
            "Experts of domains",
            Rich::new()
                .strong(format!("{} of {} experts", tally.domains_confirmed, tally.experts))
                .text(format!(
                    " are for a domain: they have more of its tokens than chance gives, and without them its loss rises more than \
                     that of other text, and more than without another expert. {} were labelled with a domain.",
                    tally.domains
                )),
        ),
        () => Verdict::new(
            Tone::Neutral,
            "No specialisation by domain",
            format!(
                "{} of {} experts were labelled with a domain, and {} of these labels stand when the expert is switched off, which is \
                 no more than chance would leave.",
                tally.domains, tally.experts, tally.domains_confirmed
            ),
        ),
    };
    let others = tally.labelled - tally.domains;
    let others_confirmed = tally.confirmed - tally.domains_confirmed;
    let tone = if part(others_confirmed, tally.experts) > BY_CHANCE { Tone::Good } else { Tone::Neutral };
    let by_token = Verdict::new(
        tone,
        "Experts of tokens and places",
        format!(
            "{others} of {} experts were labelled with tokens, with what follows, or with places in a text; {others_confirmed} of these labels \
             stand.",
            tally.experts
        ),
    );
    vec![by_domain, by_token]
}

fn figures(report: &Report) -> Figures {
    let s = report.statistics;
    let experts: usize = s.layers.iter().map(|layer| layer.experts).sum();
    let dead: usize = s.layers.iter().map(|layer| layer.load.dead.len()).sum();
    let worst = s
        .layers
        .iter()
        .filter_map(|layer| Some((layer.load.cv.value?, layer)))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let mut figures = vec![
        Figure::new(
            format!("of {experts} experts are dead: less than a thousandth of an even load"),
            dead as f64,
        )
        .format(Format::integer()),
    ];
    if let Some((cv, layer)) = worst {
        let figure = Figure::new(format!("load CV of layer {}, the most uneven", super::name(layer)), cv);
        figures.push(with_chance(figure.format(Format::fixed(2)), layer.load.cv.chance));
    }
    let mean = |of: &dyn Fn(&crate::statistics::LayerStatistics) -> Option<f64>| {
        let values: Vec<f64> = s.layers.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let pairs: [(&str, Option<f64>, Option<f64>, Format); 2] = [
        (
            "of neighbouring tokens have the same first expert, mean of the layers",
            mean(&|layer| layer.repeats.all.first_rate.value),
            mean(&|layer| layer.repeats.all.first_rate.chance),
            Format::percent(1),
        ),
        (
            "of a token's occurrences go to the favourite expert of its id, mean of the layers",
            mean(&|layer| layer.vocabulary.input.favourite.value),
            mean(&|layer| layer.vocabulary.input.favourite.by_load),
            Format::percent(1),
        ),
    ];
    for (caption, value, chance, format) in pairs {
        if let Some(value) = value {
            figures.push(with_chance(Figure::new(caption, value).format(format), chance));
        }
    }
    if let Some(loss) = s.loss {
        figures.push(Figure::new("nats per token, the loss on this text", loss).format(Format::fixed(3)));
    }
    Figures::new(figures)
}

fn with_chance(figure: Figure, chance: Option<f64>) -> Figure {
    match chance {
        Some(chance) => figure.chance(chance),
        None => figure,
    }
}

/// Which experts matter, and which the model would not miss.
fn standings(report: &Report) -> Block {
    if report.checked.is_none() {
        return Text::new("").into();
    }
    let list = |standing: Standing| {
        let mut found: Vec<(f64, String)> = report
            .experts()
            .filter_map(|(layer, words, checked)| {
                let checked = checked.filter(|checked| checked.standing() == standing)?;
                let what = match checked.stands() {
                    true => format!(" ({})", super::label(report, &words.label)),
                    false => String::new(),
                };
                Some((checked.ablation.all?.mean, format!("{}.{}{what}", layer.layer, words.expert)))
            })
            .collect();
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        found
    };
    let (matter, redundant, harm) =
        (list(Standing::Matters), list(Standing::Redundant), list(Standing::Harms));
    let first = |list: &[(f64, String)], most: usize| -> String {
        let names: Vec<&str> = list.iter().take(most).map(|(_, name)| name.as_str()).collect();
        match list.len() > most {
            true => format!("{} and {} more", names.join(", "), list.len() - most),
            false => names.join(", "),
        }
    };
    let mut text = Text::new(
        Rich::new()
            .strong(format!("{} experts matter", matter.len()))
            .text(": without one of them the loss on this text rises, beyond two standard errors. ")
            .text(if matter.is_empty() {
                String::new()
            } else {
                format!("The most: {} (layer.expert).", first(&matter, 8))
            }),
    )
    .paragraph(Rich::new().strong(format!("{} are redundant", redundant.len())).text(format!(
        ": the loss does not rise when one of them is switched off and its weight given to the rest. {}",
        if redundant.is_empty() { String::new() } else { format!("{}.", first(&redundant, 16)) }
    )));
    if !harm.is_empty() {
        text = text.paragraph(
            Rich::new()
                .strong(format!("{} do harm here", harm.len()))
                .text(format!(": the loss falls without them. {}.", first(&harm, 16))),
        );
    }
    text.into()
}
