//! Domains and experts; experts and experts.

use super::{Report, around, by_layer, name, numbers, or_none, spread};
use crate::statistics::LayerStatistics;
use senmon_page::{Bars, Block, Cell, Column, Format, Heat, Section, Table};

/// Domains that are shown, at most: the largest.
const DOMAINS: usize = 24;

pub(super) fn section(report: &Report) -> Section {
    let s = report.statistics;
    let mut section = Section::new("domains", "Domains").intro(
        "Whether experts prefer kinds of text. Chance levels are those of a router that knows nothing of the text.",
    );
    if s.domains.len() < 2 {
        return section.block(senmon_page::Text::new("All of the text is of one domain."));
    }
    let layers: Vec<&LayerStatistics> = s.layers.iter().collect();
    section = section.block(
        Bars::new("What an expert tells of the domain", layers.iter().map(|layer| name(layer)))
            .note(
                "Mutual information of expert and domain, normalised: 0 nothing, 1 each fixes the other. By chance: after whole documents \
                 were shuffled among the routings.",
            )
            .axes("layer", "normalised mutual information")
            .series("measured", layers.iter().map(|layer| or_none(layer.domains.information.normalized)))
            .series("by chance", layers.iter().map(|layer| or_none(layer.domains.information.shuffled_normalized)))
            .format(Format::fixed(3))
            .vertical(),
    );
    let order = largest(s.layers.first());
    match by_layer(s.layers.iter(), |layer| vec![heat(&s.domains, layer, &order).into()]) {
        Some(selector) => section.block(selector),
        None => section,
    }
}

/// The largest domains, in their order.
pub(super) fn largest(layer: Option<&LayerStatistics>) -> Vec<usize> {
    let tokens = layer.map_or(&[][..], |layer| &layer.domains.tokens);
    let mut order: Vec<usize> = (0..tokens.len()).filter(|d| tokens[*d] > 0).collect();
    order.sort_by_key(|d| std::cmp::Reverse(tokens[*d]));
    order.truncate(DOMAINS);
    order.sort_unstable();
    order
}

fn heat(domains: &[String], layer: &LayerStatistics, order: &[usize]) -> Heat {
    let of_class = &layer.domains.of_class;
    let value = |d: usize, e: usize| or_none(of_class.get(e).and_then(|row| row.get(d).copied().flatten()));
    let values: Vec<f64> = order
        .iter()
        .flat_map(|d| (0..layer.experts).map(move |e| (*d, e)))
        .map(|(d, e)| value(d, e))
        .collect();
    let names = order.iter().map(|d| domains.get(*d).cloned().unwrap_or_else(|| d.to_string()));
    Heat::new(format!("Domains at the experts of layer {}", name(layer)), names, numbers(layer.experts))
        .note("The share of a domain's tokens that have an expert. The middle of the colours is k/E, chance.")
        .axes("domain", "expert", "share of the domain's tokens")
        .scale(around(layer.domains.even, &values))
        .values(values)
        .format(Format::percent(1))
}

/// Experts that are used together, within a layer and from layer to layer.
pub(super) fn together(report: &Report) -> Section {
    let s = report.statistics;
    let mut section = Section::new("together", "Experts together")
        .intro("Which experts share tokens, and where the tokens of an expert go in the next layer.");
    let pairs = by_layer(spread(&s.layers), |layer| coactivation(layer).into_iter().collect());
    if let Some(selector) = pairs {
        section = section.block(selector);
    }
    if let Some(selector) = by_layer(spread(&s.layers), |layer| frequent_pairs(layer).into_iter().collect()) {
        section = section.block(selector);
    }
    if !s.transitions.is_empty() {
        let columns = [
            Column::text("layers"),
            Column::number("guessed, on other texts", Format::percent(1)),
            Column::number("by load", Format::percent(1)),
            Column::number("information, nats", Format::fixed(3)),
            Column::number("by chance", Format::fixed(3)),
        ];
        let rows = s.transitions.iter().map(|t| {
            vec![
                Cell::from(format!("{} to {}", t.layers.0, t.layers.1)),
                Cell::from(or_none(t.guess_elsewhere.value)),
                Cell::from(or_none(t.guess_elsewhere.by_load)),
                Cell::from(t.information.nats),
                Cell::from(t.information.expected),
            ]
        });
        section = section.block(
            Table::new("From layer to layer", columns)
                .note("How well the first expert of a token tells its first expert in the next layer: what reading experts ahead could reach. The likeliest \
                       followers are counted on one half of the documents, and tried on the other.")
                .rows(rows),
        );
    }
    let paths = s.paths.iter().flat_map(|paths| {
        paths.frequent.iter().take(10).map(move |path| {
            let joined = |numbers: &mut dyn Iterator<Item = String>| numbers.collect::<Vec<_>>().join(" → ");
            vec![
                Cell::from(joined(&mut paths.layers.iter().map(ToString::to_string))),
                Cell::from(joined(&mut path.experts.iter().map(ToString::to_string))),
                Cell::from(path.tokens as f64),
                Cell::from(or_none(path.share.value)),
                Cell::from(or_none(path.share.by_load)),
            ]
        })
    });
    let paths: Vec<Vec<Cell>> = paths.collect();
    if paths.is_empty() {
        return section;
    }
    let columns = [
        Column::text("layers"),
        Column::text("experts"),
        Column::number("tokens", Format::integer()),
        Column::number("share", Format::percent(2)),
        Column::number("by load", Format::percent(2)),
    ];
    section.block(Table::new("The most frequent paths of first experts", columns).rows(paths))
}

/// The pairs that are together most beyond what their loads give.
fn frequent_pairs(layer: &LayerStatistics) -> Option<Block> {
    let pairs = &layer.coactivation.pairs;
    if pairs.is_empty() {
        return None;
    }
    let columns = [
        Column::text("experts"),
        Column::number("tokens with both", Format::integer()),
        Column::number("by load", Format::fixed(1)),
        Column::number("lift", Format::times(2)),
    ];
    let rows = pairs.iter().map(|pair| {
        let (a, b) = pair.experts;
        vec![
            Cell::from(format!("{a} and {b}")),
            Cell::from(or_none(pair.tokens.value)),
            Cell::from(or_none(pair.tokens.by_load)),
            Cell::from(or_none(pair.lift)),
        ]
    });
    let title = format!("Pairs of layer {} that go together most", name(layer));
    Some(Table::new(title, columns).rows(rows).into())
}

/// Ids, places and neighbours: what else routing goes by, layer by layer.
pub(super) fn tokens(report: &Report) -> Section {
    let s = report.statistics;
    let percent = |name: &str| Column::number(name, Format::percent(1));
    let columns = [
        Column::text("layer"),
        percent("favourite of the token"),
        percent("by chance"),
        percent("of the next token"),
        percent("by chance"),
        percent("of the predicted one"),
        percent("by chance"),
        Column::number("place tells, nats", Format::fixed(3)),
        Column::number("by chance", Format::fixed(3)),
        percent("first expert as before"),
        percent("by load"),
        percent("an expert as before"),
        percent("by load"),
    ];
    let rows = s.layers.iter().map(|layer| {
        let v = &layer.vocabulary;
        let mut row = vec![Cell::from(name(layer))];
        for ids in [&v.input, &v.target, &v.predicted] {
            row.push(Cell::from(or_none(ids.favourite.value)));
            row.push(Cell::from(or_none(ids.favourite.chance)));
        }
        let place = &layer.positions.experts.information;
        row.push(Cell::from(place.nats));
        row.push(Cell::from(place.expected));
        for rate in [&layer.repeats.all.first_rate, &layer.repeats.all.common_rate] {
            row.push(Cell::from(or_none(rate.value)));
            row.push(Cell::from(or_none(rate.by_load)));
        }
        row
    });
    Section::new("tokens", "Tokens and places")
        .intro("Whether routing goes by the id of a token, by its place, or by what the token before had.")
        .block(
            Table::new("What routing goes by", columns)
                .note(
                    "Favourite: the share of an id's occurrences that have its favourite expert, the mean over ids; by chance after ids were shuffled. \
                     Place: what an expert tells of the place in the text. As before: the same expert as the token before.",
                )
                .rows(rows),
        )
}

fn coactivation(layer: &LayerStatistics) -> Option<Block> {
    let shares = layer.coactivation.shares.as_ref()?;
    if layer.top_k < 2 {
        return None;
    }
    let values = shares.iter().enumerate().flat_map(|(i, row)| {
        row.iter().enumerate().map(move |(j, s)| if i == j { f64::NAN } else { or_none(*s) })
    });
    let values: Vec<f64> = values.collect();
    let heat = Heat::new(
        format!("Experts of layer {} that share tokens", name(layer)),
        numbers(layer.experts),
        numbers(layer.experts),
    )
    .note("Of the tokens of the expert in the row, the share that has the one in the column too. The middle of the colours is (K - 1)/(E - 1), chance.")
    .axes("expert", "with expert", "share of its tokens")
    .scale(around(layer.coactivation.even, &values))
    .values(values)
    .format(Format::percent(1));
    Some(heat.into())
}
