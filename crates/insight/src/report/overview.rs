//! The first section: the answer in a sentence, and the figures that a hurried reader wants.

use super::Report;
use crate::words::{LEVEL, MARGIN, Standing, Tally};
use senmon_page::{Block, Figure, Figures, Format, Rich, Section, Text, Tone, Verdict};

/// How likely as many confirmed labels may be, if none were true, for it to be said that experts are for something.
const BY_CHANCE: f64 = 0.01;

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
    let by_domain = match () {
        () if is_beyond_chance(tally.domains_confirmed, tally.domains) => Verdict::new(
            Tone::Good,
            "Experts of domains",
            Rich::new()
                .strong(format!("{} of {} experts", tally.domains_confirmed, tally.experts))
                .text(format!(
                    " are for a domain: they have more of its tokens than chance gives, and without them its loss rises more than \
                     that of other text, and more than without another expert. {} were labelled with a domain, of which chance alone \
                     would confirm {:.1}.",
                    tally.domains,
                    tally.domains as f64 * LEVEL
                )),
        ),
        () if tally.domains == 0 => Verdict::new(
            Tone::Neutral,
            "No specialisation by domain",
            format!(
                "Of {} experts none is labelled with a domain: tokens, what follows or places say more of what they have, or nothing does.",
                tally.experts
            ),
        ),
        () => Verdict::new(
            Tone::Neutral,
            "No specialisation by domain",
            format!(
                "{} of {} experts were labelled with a domain, and {} of these labels stand when the expert is switched off: not beyond \
                 the {:.1} that chance alone would confirm.",
                tally.domains,
                tally.experts,
                tally.domains_confirmed,
                tally.domains as f64 * LEVEL
            ),
        ),
    };
    let others = tally.labelled - tally.domains;
    let others_confirmed = tally.confirmed - tally.domains_confirmed;
    let tone = if is_beyond_chance(others_confirmed, others) { Tone::Good } else { Tone::Neutral };
    let by_token = Verdict::new(
        tone,
        "Experts of tokens and places",
        format!(
            "{others} of {} experts were labelled with tokens, with what follows, or with places in a text; {others_confirmed} of these labels \
             stand, where chance alone would confirm {:.1}.",
            tally.experts,
            others as f64 * LEVEL
        ),
    );
    vec![by_domain, by_token]
}

/// Whether `confirmed` of `labels` are more than false ones would be, each being confirmed with probability [`LEVEL`] at most: by the
/// binomial tail.
fn is_beyond_chance(confirmed: usize, labels: usize) -> bool {
    if confirmed == 0 {
        return false;
    }
    let (mut ln, mut below) = (labels as f64 * (-LEVEL).ln_1p(), 0.0);
    for count in 0..confirmed {
        below += ln.exp();
        ln += ((labels - count) as f64 / (count + 1) as f64).ln() + (LEVEL / (1.0 - LEVEL)).ln();
    }
    1.0 - below < BY_CHANCE
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
        .format(Format::integer())
        .chance(s.layers.iter().filter_map(|layer| layer.load.dead_count.chance).sum()),
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
            mean(&|layer| layer.repeats.all.first_rate.by_load),
            Format::percent(1),
        ),
        (
            "of a token's occurrences go to the favourite expert of its id, mean of the layers",
            mean(&|layer| layer.vocabulary.input.favourite.value),
            mean(&|layer| layer.vocabulary.input.favourite.chance),
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
    let unknown = report
        .experts()
        .filter(|(.., checked)| checked.is_none_or(|c| c.standing() == Standing::Unknown))
        .count();
    let by_chance = report.experts().count() as f64 * LEVEL;
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
            .text(format!(
                ": without one of them the loss on this text rises, as it would by chance for {by_chance:.1} at most (1 % for each). "
            ))
            .text(if matter.is_empty() {
                String::new()
            } else {
                format!("The most: {} (layer.expert).", first(&matter, 8))
            }),
    )
    .paragraph(Rich::new().strong(format!("{} are redundant", redundant.len())).text(format!(
        ": switched off one at a time, the loss rises by less than {MARGIN} nats per token, and that is certain. {}",
        if redundant.is_empty() { String::new() } else { format!("{}.", first(&redundant, 16)) }
    )));
    if !harm.is_empty() {
        text = text.paragraph(
            Rich::new()
                .strong(format!("{} do harm here", harm.len()))
                .text(format!(": the loss falls without them. {}.", first(&harm, 16))),
        );
    }
    if unknown > 0 {
        text = text.paragraph(
            Rich::new()
                .strong(format!("Of {unknown} it is not known"))
                .text(": the text is too short, or of too few documents, to tell what they are worth."),
        );
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confirmed_labels_must_be_more_than_false_ones_would_be() {
        assert!(!is_beyond_chance(0, 0) && !is_beyond_chance(0, 100) && !is_beyond_chance(1, 10));
        // One in a hundred of 400 are four.
        assert!(!is_beyond_chance(8, 400) && is_beyond_chance(12, 400) && is_beyond_chance(400, 400));
        assert!(is_beyond_chance(2, 10));
    }
}
