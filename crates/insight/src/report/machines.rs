//! Memory and machines: what a cache of experts would hit, how many experts a batch touches, where experts should be.

use super::{Report, by_layer, name, or_none, spread};
use crate::statistics::LayerStatistics;
use senmon_page::{Axis, Block, Cell, Column, Format, Line, Lines, Section, Table};

pub(super) fn section(report: &Report) -> Section {
    let s = report.statistics;
    let mut section = Section::new("machines", "Memory and machines").intro(
        "What this routing means for a machine that cannot hold all experts, for batches, and for several machines.",
    );
    if let Some(selector) = by_layer(spread(&s.layers), |layer| {
        vec![Block::from(cache(layer)).half(), Block::from(batches(layer)).half()]
    }) {
        section = section.block(selector);
    }
    let rows: Vec<Vec<Cell>> = s.layers.iter().flat_map(placements).collect();
    if rows.is_empty() {
        return section;
    }
    let columns = [
        Column::text("layer"),
        Column::number("ranks", Format::integer()),
        Column::number("sent per token, in order", Format::fixed(3)),
        Column::number("by chance", Format::fixed(3)),
        Column::number("suggested", Format::fixed(3)),
        Column::number("on new text", Format::fixed(3)),
        Column::number("imbalance, in order", Format::fixed(3)),
        Column::number("by chance", Format::fixed(3)),
        Column::number("suggested", Format::fixed(3)),
        Column::number("on new text", Format::fixed(3)),
    ];
    section.block(
        Table::new("Where experts should be", columns)
            .note(
                "Experts in their order over the ranks, and the placement that senmon replay --placement suggested gives: copies of a token sent \
                 to other ranks, and the greatest load of a rank over the mean. On new text: a placement from one half of the texts, over the other.",
            )
            .rows(rows),
    )
}

fn cache(layer: &LayerStatistics) -> Lines {
    let sizes: Vec<f64> = (1..=layer.cache.lru.len()).map(|size| size as f64).collect();
    let line = |label: &str, rates: &[Option<f64>]| {
        Line::new(label, sizes.iter().copied(), rates.iter().map(|rate| or_none(*rate)))
    };
    Lines::new(
        format!("A cache of experts, layer {}", name(layer)),
        Axis::new("experts that it holds").format(Format::integer()),
        Axis::new("hits").format(Format::percent(0)).range(0.0, 1.0),
    )
    .note("Texts decoded one after another, token by token.")
    .line(line("least recently used goes", &layer.cache.lru))
    .line(line("knowing the future", &layer.cache.best))
    .line(line("by chance", &layer.cache.chance))
}

fn batches(layer: &LayerStatistics) -> Lines {
    let sizes = || layer.batches.iter().map(|batch| batch.tokens as f64);
    let of = |value: fn(&crate::statistics::Figure) -> Option<f64>| {
        layer.batches.iter().map(move |batch| or_none(value(&batch.distinct)))
    };
    Lines::new(
        format!("Experts that a batch touches, layer {}", name(layer)),
        Axis::new("texts decoded at once").format(Format::integer()).log(),
        Axis::new("different experts").format(Format::fixed(1)),
    )
    .note("Texts that follow each other here are often of one kind, and share experts more than texts of a server would: its batches touch up to what loads give.")
    .line(Line::new("measured", sizes(), of(|f| f.value)).points())
    .line(Line::new("by load", sizes(), of(|f| f.by_load)).points())
    .line(Line::new("by chance", sizes(), of(|f| f.chance)).points())
}

fn placements(layer: &LayerStatistics) -> Vec<Vec<Cell>> {
    let row = |suggestion: &crate::statistics::Suggestion| {
        let held = suggestion.held_out.as_ref();
        vec![
            Cell::from(name(layer)),
            Cell::from(suggestion.ranks),
            Cell::from(or_none(suggestion.contiguous.sent_per_token.value)),
            Cell::from(or_none(suggestion.contiguous.sent_per_token.chance)),
            Cell::from(or_none(suggestion.suggested.sent_per_token.value)),
            Cell::from(or_none(held.and_then(|h| h.suggested.sent_per_token.value))),
            Cell::from(or_none(suggestion.contiguous.imbalance.value)),
            Cell::from(or_none(suggestion.contiguous.imbalance.by_load)),
            Cell::from(or_none(suggestion.suggested.imbalance.value)),
            Cell::from(or_none(held.and_then(|h| h.suggested.imbalance.value))),
        ]
    };
    layer.placement.iter().map(row).collect()
}
