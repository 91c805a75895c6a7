//! Experts in words, and what the model loses without them.

use super::{Report, by_layer, numbers, or_none};
use crate::words::{Checked, LabelKind, Standing};
use senmon_page::{Bars, Block, Cell, Column, Details, Format, Heat, Reference, Scale, Section, Table};

pub(super) fn section(report: &Report) -> Section {
    let mut section = Section::new("experts", "Experts in words").intro(
        "What the tokens of each expert have in common, and whether that is what the expert is for: switched off, its weight given to the \
         token's other experts where it has some, the model must lose on just those tokens, more than elsewhere and more than without another \
         expert. Else the label is unclear.",
    );
    section = section.block(table(report));
    if let Some(selector) = by_layer(report.statistics.layers.iter(), |layer| ablations(report, layer.layer))
    {
        section = section.block(selector);
    }
    section.block(
        Details::new("The tokens that each expert has the greatest weight for").block(contexts(report)),
    )
}

fn table(report: &Report) -> Table {
    let mut columns = vec![
        Column::text("expert"),
        Column::text("in words"),
        Column::text("label"),
        Column::number("tokens", Format::integer()),
    ];
    if report.checked.is_some() {
        columns.extend([
            Column::text("checked"),
            Column::text("without it"),
            Column::number("loss, all", Format::fixed(4).signed()),
            Column::number("± error", Format::fixed(4)),
            Column::number("loss, labelled", Format::fixed(4).signed()),
            Column::number("loss, others", Format::fixed(4).signed()),
        ]);
    }
    let rows = report.experts().map(|(layer, words, checked)| {
        let label = match words.label.kind {
            LabelKind::None => "none",
            LabelKind::Domain => "domain",
            LabelKind::Token => "tokens",
            LabelKind::Next => "what follows",
            LabelKind::Position => "places",
        };
        let mut row = vec![
            Cell::from(format!("{}.{}", layer.layer, words.expert)),
            Cell::from(words.sentence.clone()),
            Cell::from(label),
            Cell::from(words.tokens as f64),
        ];
        if report.checked.is_some() {
            let mean = |delta: Option<crate::words::Delta>| or_none(delta.map(|delta| delta.mean));
            let ablation = checked.map(|checked| &checked.ablation);
            row.extend([
                Cell::from(match checked {
                    Some(_) if words.label.kind == LabelKind::None => "",
                    Some(checked) if checked.stands() => "confirmed",
                    _ => "unclear",
                }),
                Cell::from(match checked.map(Checked::standing) {
                    Some(Standing::Matters) => "loses",
                    Some(Standing::Redundant) => "about the same",
                    Some(Standing::Harms) => "gains",
                    _ => "not known",
                }),
                Cell::from(mean(ablation.and_then(|a| a.all))),
                Cell::from(or_none(ablation.and_then(|a| a.all?.standard_error))),
                Cell::from(mean(ablation.and_then(|a| a.labelled))),
                Cell::from(mean(ablation.and_then(|a| a.others))),
            ]);
        }
        row
    });
    Table::new("Every expert", columns)
        .note("Losses are changes in nats per token when the expert is switched off.")
        .rows(rows)
}

/// What a layer's experts are worth.
fn ablations(report: &Report, layer: usize) -> Vec<Block> {
    let Some(checked) = report.checked else { return Vec::new() };
    let Some(place) = report.words.iter().position(|words| words.layer == layer) else { return Vec::new() };
    let Some(experts) = checked.get(place) else { return Vec::new() };
    let all: Vec<(f64, f64)> = experts
        .iter()
        .map(|checked| {
            let all = checked.ablation.all;
            let mean = or_none(all.map(|all| all.mean));
            // An error that is not known is not drawn.
            (mean, 2.0 * or_none(all.and_then(|all| all.standard_error)))
        })
        .collect();
    let mut blocks: Vec<Block> = vec![
        Bars::new(format!("What the model loses without an expert of layer {layer}"), numbers(experts.len()))
            .note(
                "The change of the loss over all tokens, with two standard errors (over documents) to each side.",
            )
            .axes("expert", "nats per token")
            .series("loss", all.iter().map(|(mean, _)| *mean))
            .interval(
                all.iter().map(|(mean, error)| mean - error),
                all.iter().map(|(mean, error)| mean + error),
            )
            .format(Format::fixed(4).signed())
            .vertical()
            .into(),
    ];
    blocks.extend(by_domain(report, layer, experts));
    blocks
}

/// What each domain loses without each expert.
fn by_domain(report: &Report, layer: usize, experts: &[Checked]) -> Option<Block> {
    let tokens = report.statistics.layers.first()?.domains.tokens.iter();
    let largest = super::domains::largest(report.statistics.layers.first());
    if tokens.filter(|n| **n > 0).count() < 2 {
        return None;
    }
    let value =
        |expert: &Checked, d: usize| or_none(expert.ablation.domains.get(d).and_then(|x| x.map(|x| x.mean)));
    let values: Vec<f64> =
        largest.iter().flat_map(|d| experts.iter().map(move |expert| value(expert, *d))).collect();
    let most = values.iter().copied().filter(|v| v.is_finite()).fold(1e-6, |most: f64, v| most.max(v.abs()));
    let names = largest.iter().map(|d| report.statistics.domains.get(*d).cloned().unwrap_or_default());
    let heat = Heat::new(format!("What domains lose without an expert of layer {layer}"), names, numbers(experts.len()))
        .note("The change of a domain's loss when an expert is switched off, in nats per token. The middle of the colours is no change.")
        .axes("domain", "without expert", "change of the loss")
        .values(values)
        .scale(Scale::Diverging { low: -most, centre: Reference::new("no change", 0.0), high: most })
        .format(Format::fixed(3).signed());
    Some(heat.into())
}

fn contexts(report: &Report) -> Table {
    let columns = [
        Column::text("expert"),
        Column::text("before"),
        Column::text("token"),
        Column::text("after"),
        Column::number("weight", Format::fixed(3)),
    ];
    let rows = report.experts().flat_map(|(layer, words, _)| {
        words.contexts.iter().take(3).map(move |context| {
            vec![
                Cell::from(format!("{}.{}", layer.layer, words.expert)),
                Cell::from(context.before.clone()),
                Cell::from(context.token.clone()),
                Cell::from(context.after.clone()),
                Cell::from(f64::from(context.weight)),
            ]
        })
    });
    Table::new("Contexts", columns).rows(rows)
}
