//! Load: which experts have how much, how that came about, and how sure routers are.

use super::{Report, Training, around, name, numbers, or_none};
use crate::statistics::LayerStatistics;
use senmon_page::{Axis, Block, Cell, Column, Format, Heat, Line, Lines, Reference, Section, Table, spread};

/// Layers of which curves are drawn, at most.
const CURVES: usize = 8;

pub(super) fn section(report: &Report) -> Section {
    let mut section = Section::new("load", "Load")
        .intro("How much each expert does. An even router gives each the same; a dead expert is memory that does nothing.")
        .block(heat(&report.statistics.layers));
    if let Some(training) = report.training.filter(|training| training.steps.len() > 1) {
        section = section
            .block(
                Block::from(curve(training, "Load CV over training", "coefficient of variation", 0)).half(),
            )
            .block(
                Block::from(curve(training, "Entropy of the load over training", "share of the greatest", 1))
                    .half(),
            );
    }
    if let Some(lines) = report.training.and_then(saturation) {
        section = section.block(lines);
    }
    section.block(table(report))
}

/// Layers by experts.
pub(super) fn heat(layers: &[LayerStatistics]) -> Heat {
    let most = layers.iter().map(|layer| layer.experts).max().unwrap_or(0);
    let values = layers.iter().flat_map(|layer| {
        let shares = layer.load.shares.iter().map(|share| or_none(*share));
        shares.chain(std::iter::repeat(f64::NAN)).take(most)
    });
    let values: Vec<f64> = values.collect();
    let chance = layers.iter().map(|layer| 1.0 / layer.experts.max(1) as f64).fold(0.0, f64::max);
    Heat::new("Load of every expert", layers.iter().map(name), numbers(most))
        .note("The share of a layer's choices that went to an expert. The middle of the colours is an even share.")
        .axes("layer", "expert", "share of choices")
        .scale(around(Some(chance), &values))
        .values(values)
        .format(Format::percent(1))
}

fn curve(training: &Training, title: &str, axis: &str, which: usize) -> Lines {
    let x = Axis::new("optimiser step").format(Format::integer());
    let y = Axis::new(axis).format(Format::fixed(2));
    let mut lines = Lines::new(title, x, y);
    for place in spread(training.layers.len(), CURVES) {
        let (layer, cv, entropy) = &training.layers[place];
        let values = if which == 0 { cv } else { entropy };
        let steps = training.steps.iter().map(|step| *step as f64);
        lines = lines.line(Line::new(format!("layer {layer}"), steps, values.iter().copied()));
    }
    lines
}

/// When routing came to what it is.
fn saturation(training: &Training) -> Option<Lines> {
    let (_, last) = training.saturation.last()?;
    let mut lines = Lines::new(
        "When routing settled",
        Axis::new("optimiser step").format(Format::integer()),
        Axis::new("experts that stay to the end").format(Format::percent(0)).range(0.0, 1.0),
    )
    .note("Of the experts that a token has at the end, the share that it had at a step already.");
    for place in spread(last.len(), CURVES) {
        let steps = training.saturation.iter().map(|(step, _)| *step as f64);
        let values = training
            .saturation
            .iter()
            .map(|(_, layers)| or_none(layers.get(place).and_then(|layer| layer.experts.value)));
        lines = lines.line(Line::new(format!("layer {}", last[place].layer), steps, values).points());
    }
    let chance = last.iter().filter_map(|layer| layer.experts.chance).fold(0.0, f64::max);
    Some(lines.reference(Reference::chance(chance)))
}

fn table(report: &Report) -> Table {
    let two = || Format::fixed(2);
    let columns = [
        Column::text("layer"),
        Column::number("experts", Format::integer()),
        Column::number("per token", two()),
        Column::number("load CV", two()),
        Column::number("by chance", two()),
        Column::number("max / mean", two()),
        Column::number("by chance", two()),
        Column::number("entropy", Format::fixed(3)),
        Column::number("by chance", Format::fixed(3)),
        Column::number("dead", Format::integer()),
        Column::number("by chance", Format::fixed(1)),
        Column::number("dropped", Format::integer()),
        Column::number("greatest p", two()),
        Column::number("undecided", two()),
        Column::number("margin", two()),
        Column::number("undecided", two()),
    ];
    let rows = report.statistics.layers.iter().map(|layer| {
        vec![
            Cell::from(name(layer)),
            Cell::from(layer.experts),
            Cell::from(or_none(layer.load.experts_per_token)),
            Cell::from(or_none(layer.load.cv.value)),
            Cell::from(or_none(layer.load.cv.chance)),
            Cell::from(or_none(layer.load.max_over_mean.value)),
            Cell::from(or_none(layer.load.max_over_mean.chance)),
            Cell::from(or_none(layer.load.entropy.value)),
            Cell::from(or_none(layer.load.entropy.chance)),
            Cell::from(layer.load.dead.len()),
            Cell::from(or_none(layer.load.dead_count.chance)),
            Cell::from(layer.load.dropped as f64),
            Cell::from(or_none(layer.confidence.mean_probability.value)),
            Cell::from(or_none(layer.confidence.mean_probability.chance)),
            Cell::from(or_none(layer.confidence.mean_margin.value)),
            Cell::from(or_none(layer.confidence.mean_margin.chance)),
        ]
    });
    Table::new("Every layer", columns).rows(rows)
}
