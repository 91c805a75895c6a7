//! `--show-routing`: the experts of every token, as a table, in a JSON document, or as a trace in a file.

use super::options::plain;
use crate::cli::RoutingArgs;
use crate::failure::{Failure, Result};
use senmon_insight::{About, EMPTY, LayerTrace, NONE, Recorder, Trace};
use senmon_models::identity::model_hash;
use senmon_models::seq2seq::Seq2SeqSpec;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_models::text::Tokenizer;
use senmon_moe::RoutingObserver;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::Range;
use std::path::Path;

/// Columns of a line of the table.
const WIDTH: usize = 100;
/// Characters of a token's text in the table.
const WORD: usize = 14;

/// The routers of a model.
pub(super) struct Routers {
    /// Their kinds.
    kind: String,
    /// Layers of the encoder, where there is one.
    encoder: Option<usize>,
}

impl Routers {
    /// Those of a decoder.
    pub fn of_decoder(spec: &ModelSpec) -> Self {
        let kinds: BTreeSet<&str> = spec
            .layers
            .iter()
            .filter_map(|layer| match layer {
                FfnSpec::Moe(moe) => Some(moe.router.kind.as_str()),
                FfnSpec::Dense(_) => None,
            })
            .collect();
        Self { kind: kinds.into_iter().collect::<Vec<_>>().join(","), encoder: None }
    }

    /// Those of an encoder-decoder.
    pub fn of_encoder_decoder(spec: &Seq2SeqSpec) -> Self {
        let sparse = spec.encoder.sparse.iter().chain(&spec.decoder.sparse).any(|sparse| *sparse);
        let kind = if sparse { "switch" } else { "" };
        Self { kind: kind.into(), encoder: Some(spec.encoder.len()) }
    }

    /// Their kinds, joined by commas; nothing where there are none.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What a layer is called where that is not its number.
    fn name(&self, layer: usize) -> Option<String> {
        let encoder = self.encoder?;
        Some(match layer.checked_sub(encoder) {
            Some(layer) => format!("decoder.{layer}"),
            None => format!("encoder.{layer}"),
        })
    }
}

/// A recorder where routing is to be shown; refused where there is none, or no place for it.
pub(super) fn recorder(args: &RoutingArgs, routers: &Routers) -> Result<Option<Recorder>> {
    let Some(file) = &args.show_routing else { return Ok(None) };
    if routers.kind.is_empty() {
        return Err(Failure::mistake("--show-routing: the model has no experts"));
    }
    if let Some(file) = file {
        super::check_out(file)?;
    }
    Ok(Some(Recorder::new(args.routing_logits)))
}

/// The recorder as an observer of a pass of these tokens.
pub(super) fn watch<'a>(
    recorder: &'a mut Option<Recorder>,
    sequence: u32,
    tokens: &[u32],
) -> Option<&'a mut dyn RoutingObserver> {
    let recorder = recorder.as_mut()?;
    recorder.pass(&[(sequence, tokens)]);
    Some(recorder)
}

/// The routing of a command's texts.
pub(super) struct Shown {
    pub trace: Trace,
    /// For people, where it went to no file.
    pub table: Option<String>,
}

/// What was recorded: written to a file, or made into a table unless it goes `in_json`.
pub(super) fn finish(
    args: &RoutingArgs,
    recorder: Option<Recorder>,
    routers: &Routers,
    folder: &Path,
    tokenizer: Option<&Tokenizer>,
    in_json: bool,
) -> Result<Option<Shown>> {
    let (Some(recorder), Some(file)) = (recorder, &args.show_routing) else { return Ok(None) };
    let about =
        About { model: model_hash(folder)?, router: routers.kind.clone(), domains: vec!["text".into()] };
    let trace = recorder.finish(about, |layer| routers.name(layer))?;
    if let Some(file) = file {
        trace.write(file)?;
    }
    let table = (file.is_none() && !in_json).then(|| table(&trace, tokenizer));
    Ok(Some(Shown { trace, table }))
}

/// The routing of some sequences, for a document.
pub(super) fn document(trace: &Trace, sequences: Range<u32>) -> Value {
    let rows: Vec<usize> = (0..trace.len()).filter(|row| sequences.contains(&trace.sequence[*row])).collect();
    let of = |values: &[u32]| -> Vec<Value> {
        let one = |row: &usize| if values[*row] == NONE { Value::Null } else { values[*row].into() };
        rows.iter().map(one).collect()
    };
    let layers = trace.layers.iter().map(|(number, layer)| {
        let each = |one: &dyn Fn(usize) -> Value| -> Vec<Vec<Value>> {
            let slots = |row: &usize| (row * layer.top_k..(row + 1) * layer.top_k).map(one).collect();
            rows.iter().map(slots).collect()
        };
        let logits = layer.logits.as_ref().zip(layer.count).map(|(logits, count)| -> Vec<Vec<_>> {
            let row = |row: &usize| logits[row * count..][..count].iter().map(|x| plain(*x)).collect();
            rows.iter().map(row).collect()
        });
        json!({
            "layer": number,
            "name": layer.name,
            "experts": each(&|slot| match layer.experts[slot] {
                EMPTY => Value::Null,
                expert => expert.into(),
            }),
            "weights": each(&|slot| plain(layer.weights[slot]).into()),
            "dropped": each(&|slot| (layer.dropped[slot] != 0).into()),
            "logits": logits,
        })
    });
    json!({
        "sequence": of(&trace.sequence),
        "position": of(&trace.position),
        "tokens": of(&trace.tokens),
        "targets": of(&trace.targets),
        "predicted": of(&trace.predicted),
        "loss": rows.iter().map(|row| plain(trace.loss[*row])).collect::<Vec<_>>(),
        "layers": layers.collect::<Vec<_>>(),
    })
}

/// For people: a line a token, a column a layer; what does not fit on a line comes below, again from the first token on.
fn table(trace: &Trace, tokenizer: Option<&Tokenizer>) -> String {
    let mut out = String::new();
    let word = |token: u32| {
        let text = tokenizer.and_then(|tokenizer| tokenizer.decode(&[token], false).ok());
        let text = text.map_or_else(|| token.to_string(), |text| format!("{text:?}"));
        text.chars().take(WORD).collect::<String>()
    };
    let sequences: BTreeSet<u32> = trace.sequence.iter().copied().collect();
    for sequence in &sequences {
        let rows: Vec<usize> = (0..trace.len()).filter(|row| trace.sequence[*row] == *sequence).collect();
        if sequences.len() > 1 {
            let _ = writeln!(out, "sequence {sequence}");
        }
        // Layers that the tokens of this sequence pass.
        let passes = |layer: &LayerTrace| {
            let slots = |row: &usize| row * layer.top_k..(row + 1) * layer.top_k;
            rows.iter().flat_map(slots).any(|slot| layer.experts[slot] != EMPTY || layer.dropped[slot] != 0)
        };
        let columns: Vec<(String, &LayerTrace, usize)> = trace
            .layers
            .iter()
            .filter(|(_, layer)| passes(layer))
            .map(|(number, layer)| {
                let name = layer.name.clone().unwrap_or_else(|| format!("layer {number}"));
                let widest = rows.iter().map(|row| cell(layer, *row).len()).max().unwrap_or(0);
                (name.clone(), layer, widest.max(name.len()))
            })
            .collect();
        for band in bands(&columns.iter().map(|(_, _, width)| *width).collect::<Vec<_>>()) {
            let columns = &columns[band];
            let mut line = format!("{:>5}  {:<WORD$}", "place", "token");
            for (name, _, width) in columns {
                let _ = write!(line, "  {name:<width$}");
            }
            let _ = writeln!(out, "{}", line.trim_end());
            for row in &rows {
                let mut line = format!("{:>5}  {:<WORD$}", trace.position[*row], word(trace.tokens[*row]));
                for (_, layer, width) in columns {
                    let _ = write!(line, "  {:<width$}", cell(layer, *row));
                }
                let _ = writeln!(out, "{}", line.trim_end());
            }
        }
    }
    out
}

/// The experts of a token in a layer with their weights, the greatest first.
fn cell(layer: &LayerTrace, row: usize) -> String {
    let mut slots: Vec<usize> = (row * layer.top_k..(row + 1) * layer.top_k).collect();
    slots.sort_by(|a, b| layer.weights[*b].total_cmp(&layer.weights[*a]));
    let one = |slot: usize| match (layer.experts[slot], layer.dropped[slot]) {
        (EMPTY, 0) => "-".to_owned(),
        (EMPTY, _) => "dropped".to_owned(),
        (expert, _) => format!("{expert}:{:.2}", layer.weights[slot]),
    };
    slots.into_iter().map(one).collect::<Vec<_>>().join(" ")
}

/// Columns of these widths, in groups that fit on a line.
fn bands(widths: &[usize]) -> Vec<Range<usize>> {
    let (mut bands, mut start, mut used) = (Vec::new(), 0, 7 + WORD);
    for (n, width) in widths.iter().enumerate() {
        if n > start && used + 2 + width > WIDTH {
            bands.push(start..n);
            (start, used) = (n, 7 + WORD);
        }
        used += 2 + width;
    }
    if start < widths.len() {
        bands.push(start..widths.len());
    }
    bands
}
