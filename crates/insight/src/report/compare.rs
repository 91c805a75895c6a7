//! Two models, or two moments of a run, side by side on the same text.

use super::{load, name, or_none};
use crate::statistics::{Figure, LayerStatistics, Saturation, Statistics, saturation};
use crate::trace::Trace;
use senmon_page::{Bars, Block, Cell, Column, Format, Page, Section, Table, Text};
use std::collections::BTreeSet;

/// One of the two.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// What it is called.
    pub name: &'a str,
    /// Its routing of the text.
    pub trace: &'a Trace,
    /// What that comes to.
    pub statistics: &'a Statistics,
}

/// The page.
pub fn compare(a: Side, b: Side) -> Page {
    let agreement = saturation(a.trace, b.trace).ok();
    Page::new(format!("{} and {}", a.name, b.name))
        .subtitle("What the routers of two models, or of two moments of a run, do with the same text.")
        .fact(a.name, facts(a.statistics))
        .fact(b.name, facts(b.statistics))
        .section(losses(a, b))
        .section(layers(a, b))
        .section(agree(agreement.as_deref()))
        .section(loads(a, b))
}

fn facts(s: &Statistics) -> String {
    format!("{}, {} layers, {} tokens", s.router, s.layers.len(), s.tokens)
}

/// The mean loss of each domain.
fn by_domain(trace: &Trace) -> Vec<Option<f64>> {
    let mut sums = vec![(0.0, 0u64); trace.about.domains.len()];
    for (loss, domain) in trace.loss.iter().zip(&trace.domains).filter(|(loss, _)| loss.is_finite()) {
        if let Some((sum, count)) = sums.get_mut(usize::from(*domain)) {
            *sum += f64::from(*loss);
            *count += 1;
        }
    }
    sums.iter().map(|(sum, count)| (*count > 0).then(|| sum / *count as f64)).collect()
}

fn losses(a: Side, b: Side) -> Section {
    let section = Section::new("loss", "Loss").intro("Nats per token on this text, by domain.");
    if a.trace.about.domains != b.trace.about.domains || a.trace.tokens != b.trace.tokens {
        return section.block(Text::new(
            "The two cut the text into different tokens, so their losses per token cannot be compared.",
        ));
    }
    let (of_a, of_b) = (by_domain(a.trace), by_domain(b.trace));
    let all: [(String, Option<f64>, Option<f64>); 1] = [("all".into(), a.statistics.loss, b.statistics.loss)];
    let each = a.trace.about.domains.iter().cloned().zip(of_a.iter().copied().zip(of_b.iter().copied()));
    let rows: Vec<(String, f64, f64)> = all
        .into_iter()
        .chain(each.map(|(name, (a, b))| (name, a, b)))
        .filter_map(|(name, a, b)| Some((name, a?, b?)))
        .collect();
    let columns = [
        Column::text("domain"),
        Column::number(a.name, Format::fixed(4)),
        Column::number(b.name, Format::fixed(4)),
        Column::number("difference", Format::fixed(4).signed()),
    ];
    let cells = rows.iter().map(|(name, x, y)| {
        vec![Cell::from(name.clone()), Cell::from(*x), Cell::from(*y), Cell::from(y - x)]
    });
    section
        .block(
            Bars::new(format!("{} less {}", b.name, a.name), rows.iter().map(|(name, ..)| name.clone()))
                .axes("domain", "nats per token")
                .series("difference", rows.iter().map(|(_, x, y)| y - x))
                .format(Format::fixed(3).signed()),
        )
        .block(Table::new("Loss by domain", columns).rows(cells))
}

fn layers(a: Side, b: Side) -> Section {
    let of = |s: &LayerStatistics| {
        let value = |f: &Figure| or_none(f.value);
        [
            value(&s.load.cv),
            value(&s.load.entropy),
            s.load.dead.len() as f64,
            value(&s.confidence.mean_probability),
            value(&s.repeats.all.first_rate),
            or_none(s.domains.information.normalized),
            value(&s.vocabulary.input.favourite),
        ]
    };
    let names = [
        ("load CV", Format::fixed(2)),
        ("entropy of the load", Format::fixed(3)),
        ("dead experts", Format::integer()),
        ("greatest probability", Format::fixed(3)),
        ("same expert as the token before", Format::percent(1)),
        ("what an expert tells of the domain", Format::fixed(3)),
        ("favourite expert of a token's id", Format::percent(1)),
    ];
    let mut section = Section::new("layers", "Layers")
        .intro("Layer by layer; the chance levels are in the reports of the two.");
    for (i, (title, format)) in names.into_iter().enumerate() {
        let columns = [
            Column::text("layer"),
            Column::number(a.name, format.clone()),
            Column::number(b.name, format.clone()),
        ];
        let all: BTreeSet<usize> =
            a.statistics.layers.iter().chain(&b.statistics.layers).map(|layer| layer.layer).collect();
        let rows = all.into_iter().map(|number| {
            let of_number = |layer: &&LayerStatistics| layer.layer == number;
            let x = a.statistics.layers.iter().find(of_number);
            let y = b.statistics.layers.iter().find(of_number);
            let value = |side: Option<&LayerStatistics>| side.map_or(f64::NAN, |side| of(side)[i]);
            vec![
                Cell::from(x.or(y).map_or_else(String::new, name)),
                Cell::from(value(x)),
                Cell::from(value(y)),
            ]
        });
        section = section.block(Block::from(Table::new(title, columns).rows(rows)).half());
    }
    section
}

/// How often the two choose the same experts.
fn agree(agreement: Option<&[Saturation]>) -> Section {
    let section = Section::new("agreement", "Agreement")
        .intro("How often the two send a token to the same experts: of the second's experts the share that the first has too.");
    let Some(layers) = agreement.filter(|layers| !layers.is_empty()) else {
        return section.block(Text::new(
            "Expert by expert the two cannot be compared: their tokens, layers or numbers of experts differ.",
        ));
    };
    section
        .block(
            Bars::new("Experts in common", layers.iter().map(|layer| layer.layer.to_string()))
                .note("Models that were not trained from one another have experts in other orders: about chance is what to expect of them.")
                .axes("layer", "share of experts")
                .series("measured", layers.iter().map(|layer| or_none(layer.experts.value)))
                .series("by chance", layers.iter().map(|layer| or_none(layer.experts.chance)))
                .format(Format::percent(1))
                .vertical(),
        )
        .block(
            Table::new(
                "First choices",
                [
                    Column::text("layer"),
                    Column::number("the same", Format::percent(1)),
                    Column::number("by chance", Format::percent(1)),
                    Column::number("by load", Format::percent(1)),
                ],
            )
            .rows(layers.iter().map(|layer| {
                vec![
                    Cell::from(layer.layer.to_string()),
                    Cell::from(or_none(layer.first.value)),
                    Cell::from(or_none(layer.first.chance)),
                    Cell::from(or_none(layer.first.by_load)),
                ]
            })),
        )
}

fn loads(a: Side, b: Side) -> Section {
    let heat = |side: Side| {
        let mut heat = load::heat(&side.statistics.layers);
        heat.title = format!("Load, {}", side.name);
        Block::from(heat).half()
    };
    Section::new("loads", "Loads").block(heat(a)).block(heat(b))
}

#[cfg(test)]
mod tests {
    use super::super::tests::trace;
    use super::*;
    use crate::statistics::{self, Options};

    #[test]
    fn two_sides_make_a_page() {
        let (a, mut b) = (trace(), trace());
        b.loss.iter_mut().for_each(|loss| *loss += 0.5);
        let options = Options { ranks: vec![], ..Options::default() };
        let (of_a, of_b) = (statistics::of(&a, &options).unwrap(), statistics::of(&b, &options).unwrap());
        let side = |name, trace, statistics| Side { name, trace, statistics };
        let html = compare(side("<one>", &a, &of_a), side("two", &b, &of_b)).to_html().unwrap();
        assert!(html.contains("&lt;one&gt;") && html.contains("Experts in common") && html.contains("+0.5"));
        assert_eq!(by_domain(&b), [Some(2.5), Some(2.5)]);
        // Other tokens: no losses, no agreement, and that is said.
        let mut other = b.clone();
        other.tokens[0] += 1;
        let html = compare(side("one", &a, &of_a), side("two", &other, &of_b)).to_html().unwrap();
        assert!(html.contains("cannot be compared") && !html.contains("Experts in common"));
    }
}
