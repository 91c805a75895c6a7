//! Experts that are alike: in what they give, in their weights.

use super::{MATRICES, Report, numbers, or_none};
use crate::statistics::Alike;
use senmon_page::{Block, Cell, Column, Format, Heat, Reference, Scale, Section, Selector, Table, spread};

/// The section, where likeness was looked at.
pub(super) fn section(report: &Report) -> Option<Section> {
    let all = report.alike;
    all.first()?;
    let mut selector = Selector::new("Layer");
    for alike in spread(all.len(), MATRICES).map(|place| &all[place]) {
        selector = selector.blocks(alike.layer.to_string(), heats(alike));
    }
    Some(
        Section::new("alike", "Experts alike")
            .intro(
                "Whether experts do different things. Two that give the same for every token, but for its size, are one expert held twice; all \
                 that are at the chance level have nothing in common but what they give whatever the token is.",
            )
            .block(table(all))
            .block(selector),
    )
}

fn table(all: &[Alike]) -> Table {
    let columns = [
        Column::text("layer"),
        Column::number("tokens", Format::integer()),
        Column::number("outputs", Format::fixed(3)),
        Column::number("by chance", Format::fixed(3)),
        Column::text("most alike"),
        Column::number("their outputs", Format::fixed(3)),
        Column::number("weights", Format::fixed(3)),
        Column::number("weights by chance", Format::fixed(3)),
    ];
    let rows = all.iter().map(|alike| {
        let most = most_alike(alike);
        vec![
            Cell::from(alike.layer.to_string()),
            Cell::from(alike.tokens as f64),
            Cell::from(or_none(alike.of_outputs.value)),
            Cell::from(or_none(alike.of_outputs.chance)),
            most.map(|(i, j, _)| format!("{i} and {j}")).as_deref().into(),
            Cell::from(or_none(most.map(|(.., cosine)| cosine))),
            Cell::from(or_none(alike.of_weights.value)),
            Cell::from(or_none(alike.of_weights.chance)),
        ]
    });
    Table::new("Likeness of experts, means over pairs", columns)
        .note(
            "Outputs: the cosine of what two experts give for the same token, over some tokens; by chance: for different tokens. Weights: the \
             cosine of neurons matched one to one; by chance: matched with shuffled ones. Missing where a layer is too large for it.",
        )
        .rows(rows)
}

fn most_alike(alike: &Alike) -> Option<(usize, usize, f64)> {
    let pairs = alike.outputs.iter().enumerate().flat_map(|(i, row)| {
        row.iter().enumerate().skip(i + 1).filter_map(move |(j, cosine)| Some((i, j, (*cosine)?)))
    });
    pairs.max_by(|a, b| a.2.total_cmp(&b.2))
}

fn heats(alike: &Alike) -> Vec<Block> {
    let heat = |title: String, note: &str, rows: &[Vec<Option<f64>>], chance: Option<f64>| {
        let values: Vec<f64> = rows
            .iter()
            .enumerate()
            .flat_map(|(i, row)| {
                row.iter().enumerate().map(move |(j, value)| if i == j { f64::NAN } else { or_none(*value) })
            })
            .collect();
        // Where chance is not known, colours are around vectors that have nothing to do with each other.
        let centre = chance.map_or_else(|| Reference::new("unlike", 0.0), Reference::chance);
        let middle = chance.unwrap_or(0.0);
        let least = values.iter().copied().filter(|v| v.is_finite()).fold(middle - 0.1, f64::min);
        let greatest = values.iter().copied().filter(|v| v.is_finite()).fold(middle + 0.1, f64::max);
        Heat::new(title, numbers(alike.experts), numbers(alike.experts))
            .note(note)
            .axes("expert", "expert", "cosine")
            .values(values)
            .scale(Scale::Diverging { low: least, centre, high: greatest })
            .format(Format::fixed(2))
    };
    let layer = alike.layer;
    let outputs = heat(
        format!("Outputs of the experts of layer {layer}"),
        "The mean cosine of what two experts give for the same tokens. The middle of the colours is chance.",
        &alike.outputs,
        alike.of_outputs.chance,
    );
    let mut blocks = vec![Block::from(outputs)];
    if let Some(weights) = &alike.weights {
        let note =
            "The mean cosine of their neurons, matched one to one. The middle of the colours is chance.";
        let title = format!("Weights of the experts of layer {layer}");
        blocks.push(heat(title, note, weights, alike.of_weights.chance).into());
    }
    match blocks.len() {
        1 => blocks,
        _ => blocks.into_iter().map(Block::half).collect(),
    }
}
