//! Text by expert: some tokens of each domain, coloured by their first expert.

use super::{Report, name};
use crate::trace::EMPTY;
use senmon_page::{Rich, Section, TokenLayer, Tokens};

/// Tokens that are shown, at most, and of one text.
const SHOWN: usize = 1200;
const OF_A_TEXT: usize = 120;

pub(super) fn section(report: &Report) -> Section {
    let trace = report.trace;
    let rows = rows(report);
    let slots = trace.layers.values().map(|layer| layer.top_k).max().unwrap_or(1);
    let tokens = rows.iter().map(|row| {
        let text = (report.token)(trace.tokens[*row]);
        // Texts begin on lines of their own.
        if trace.position[*row] == 0 && *row != rows[0] { format!("\n\n{text}") } else { text }
    });
    let mut shown = Tokens::new("Which expert reads which token", "expert", tokens, slots).note(
        Rich::new()
            .text("The beginnings of some texts, each token in the colour of its first expert. ")
            .emphasis("Point at a token for all of its experts and their weights."),
    );
    for statistics in &report.statistics.layers {
        let Some(layer) = trace.layers.get(&statistics.layer) else { continue };
        let (mut picks, mut weights) = (Vec::new(), Vec::new());
        for row in &rows {
            for slot in 0..slots {
                let at = (slot < layer.top_k).then_some(row * layer.top_k + slot);
                let pick = at.map_or(EMPTY, |at| layer.experts[at]);
                picks.push(if pick == EMPTY { -1 } else { i64::from(pick) });
                weights.push(at.map_or(0.0, |at| f64::from(layer.weights[at])));
            }
        }
        shown = shown.layer(TokenLayer::new(name(statistics), picks, weights));
    }
    Section::new("text", "Text").block(shown)
}

/// The beginnings of texts, of every domain in turn.
fn rows(report: &Report) -> Vec<usize> {
    let trace = report.trace;
    let starts: Vec<usize> = (0..trace.len()).filter(|row| trace.position[*row] == 0).collect();
    let domains = trace.about.domains.len().max(1);
    let mut turns: Vec<Vec<usize>> = vec![Vec::new(); domains];
    for start in starts {
        turns[usize::from(trace.domains[start]).min(domains - 1)].push(start);
    }
    let mut rows = Vec::new();
    for turn in 0.. {
        let mut any = false;
        for starts in &turns {
            let Some(start) = starts.get(turn) else { continue };
            any = true;
            let text = (*start..trace.len()).take_while(|row| trace.sequence[*row] == trace.sequence[*start]);
            rows.extend(text.take(OF_A_TEXT.min(SHOWN - rows.len())));
            if rows.len() == SHOWN {
                return rows;
            }
        }
        if !any {
            break;
        }
    }
    rows
}
