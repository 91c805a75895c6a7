//! `replay`: a trace routed again under another K, a capacity, a placement of experts, a cache; with the model, what that costs.

use super::{check_out, print, print_json};
use crate::cli::ReplayArgs;
use crate::failure::{Failure, Result};
use crate::ui::{INTERRUPTED, catch_interrupts};
use senmon_insight::replay::{Capacity, Choice, Ranks, Replayed, Scenario, choices_of, replay};
use senmon_insight::statistics::{self, Figure, Options, Placement, Suggestion};
use senmon_insight::{LayerTrace, Trace};
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::Decoder;
use senmon_models::files;
use senmon_models::identity::model_hash;
use senmon_models::spec::FfnSpec;
use senmon_train::tracing;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

pub(super) fn run(args: ReplayArgs) -> Result<()> {
    if let Some(file) = &args.placement_out {
        check_out(file)?;
    }
    let trace = Trace::read(&args.trace)?;
    let scenario = Scenario {
        top_k: args.top_k,
        capacity: args.capacity.map(|factor| Capacity {
            factor,
            batch: args.together,
            drop: args.drop.into(),
        }),
        ranks: ranks(&args, &trace)?,
        cache: args.cache,
    };
    let layers = replay(&trace, &scenario).map_err(|e| Failure::mistake(e.to_string()))?;
    let losses = args.model.as_ref().map(|model| losses(model, &trace, &scenario)).transpose()?;
    if let (Some(file), Some(ranks)) = (&args.placement_out, &scenario.ranks) {
        let text = serde_json::to_string_pretty(ranks).unwrap_or_default();
        files::write_whole(file, |w| w.write_all(text.as_bytes()))?;
    }
    if args.common.json {
        let mut document =
            serde_json::json!({ "tokens": trace.len(), "scenario": scenario, "layers": layers });
        if let Some(losses) = &losses {
            document["loss"] = serde_json::json!(losses);
        }
        return print_json(&document);
    }
    print(&table(&trace, &layers, losses.as_ref()))
}

/// Where experts are, if that is asked.
fn ranks(args: &ReplayArgs, trace: &Trace) -> Result<Option<Ranks>> {
    let Some(ranks) = args.ranks else {
        return match (&args.placement, &args.placement_out) {
            (None, None) => Ok(None),
            _ => Err(Failure::mistake("--placement needs --ranks R, the number of ranks")),
        };
    };
    let fewest = trace.layers.values().filter_map(|layer| layer.count).min().unwrap_or(usize::MAX);
    if ranks == 0 || ranks > fewest {
        return Err(Failure::mistake(format!(
            "--ranks {ranks}: expected from 1 to the {fewest} experts of a layer"
        )));
    }
    let placements: BTreeMap<usize, Placement> = match args.placement.as_deref() {
        None | Some("contiguous") => BTreeMap::new(),
        Some("suggested") => {
            let found = statistics::placements(trace, &Options { ranks: vec![ranks], ..Options::default() })?;
            let of = |(layer, suggestions): (usize, Vec<Suggestion>)| {
                let suggestion = suggestions.into_iter().next()?;
                Some(Placement::new(ranks, suggestion.placement).map(|placement| (layer, placement)))
            };
            found.into_iter().filter_map(of).collect::<senmon_insight::Result<_>>()?
        }
        Some(file) => {
            let wrong = |e: &dyn std::fmt::Display| {
                Failure::mistake(format!(
                    "--placement {file}: {e} (say contiguous, suggested, or a file of --placement-out)"
                ))
            };
            let text = std::fs::read_to_string(file).map_err(|e| wrong(&e))?;
            let read: Ranks = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
            read.placements
        }
    };
    Ok(Some(Ranks { ranks, placements }))
}

/// The mean loss of the trace's tokens, in nats, over those that have one in each.
#[derive(Debug, PartialEq, Serialize)]
struct Losses {
    /// As the trace has it.
    recorded: Option<f64>,
    /// With the model now, every router as it chooses.
    unchanged: Option<f64>,
    /// With the model now and the scenario's experts.
    replayed: Option<f64>,
    /// Tokens with a loss in all of them.
    tokens: usize,
}

impl Losses {
    fn of(recorded: &[f32], unchanged: &[f32], replayed: &[f32]) -> Self {
        let all: [&[f32]; 3] = [recorded, unchanged, replayed];
        let rows: Vec<usize> = (0..recorded.len())
            .filter(|row| all.iter().all(|losses| losses.get(*row).is_some_and(|loss| loss.is_finite())))
            .collect();
        let mean = |losses: &[f32]| {
            let sum: f64 = rows.iter().map(|row| f64::from(losses[*row])).sum();
            (!rows.is_empty()).then(|| sum / rows.len() as f64)
        };
        Self {
            recorded: mean(recorded),
            unchanged: mean(unchanged),
            replayed: mean(replayed),
            tokens: rows.len(),
        }
    }
}

/// What the scenario costs with the model.
fn losses(model: &Path, trace: &Trace, scenario: &Scenario) -> Result<Losses> {
    let hash = model_hash(model)?;
    if hash != trace.about.model {
        eprintln!(
            "note: the trace is not of this model as it is now: what the change costs may be another's"
        );
    }
    let mut loaded = checkpoint::open(model, Audit::Once)?;
    if let Some(top_k) = scenario.top_k {
        for ffn in &mut loaded.spec.layers {
            if let FfnSpec::Moe(moe) = ffn {
                moe.top_k = top_k;
            }
        }
        loaded.spec.validate()?;
    }
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    if decoder.moe_layers().map(|(l, _)| l).ne(trace.layers.keys().copied()) {
        return Err(Failure::mistake(format!(
            "{}: its MoE layers are not those of the trace",
            model.display()
        )));
    }
    if let Some(token) = trace.tokens.iter().find(|token| **token as usize >= loaded.spec.vocab) {
        let vocab = loaded.spec.vocab;
        return Err(Failure::mistake(format!("the trace has token {token}, the model {vocab} tokens")));
    }
    catch_interrupts();
    let cancelled = || INTERRUPTED.load(Ordering::Relaxed);
    let run = |choices: &BTreeMap<usize, Choice>| {
        let again = tracing::replayed(&decoder, trace, choices, &cancelled)?;
        Ok::<_, Failure>(again.ok_or_else(|| Failure::interrupted("interrupted"))?.loss)
    };
    // A trace may have been recorded with other arithmetic (packed weights); what a scenario costs is told by one and the same. Where
    // routing is not changed the model routes for itself: drops of old are not in the trace.
    let unchanged = run(&BTreeMap::new())?;
    let recorded_k = |(_, layer): (&usize, &LayerTrace)| scenario.top_k.is_none_or(|k| k == layer.top_k);
    if scenario.capacity.is_none() && trace.layers.iter().all(recorded_k) {
        return Ok(Losses::of(&trace.loss, &unchanged, &unchanged));
    }
    if let Some((l, _)) = decoder.moe_layers().find(|(_, moe)| moe.config().extras.members > 1) {
        return Err(Failure::mistake(format!(
            "layer {l} is an ensemble: what other experts would cost cannot be replayed with the model (leave out --model)"
        )));
    }
    let replayed = run(&choices_of(trace, scenario)?)?;
    Ok(Losses::of(&trace.loss, &unchanged, &replayed))
}

fn table(trace: &Trace, layers: &[Replayed], losses: Option<&Losses>) -> String {
    let (ranks, cache) =
        (layers.iter().any(|layer| layer.ranks.is_some()), layers.iter().any(|layer| layer.cache.is_some()));
    let mut out = format!("{} tokens; (by chance)\n\n", trace.len());
    let _ = write!(
        out,
        "{:<10} {:>4} {:>4}  {:>15}  {:>7}  {:>13}",
        "layer", "E", "K", "dropped %", "without", "max/mean"
    );
    if ranks {
        let _ = write!(out, "  {:>14}  {:>13}", "sent per token", "imbalance");
    }
    if cache {
        let _ = write!(out, "  {:>15}", "cache hits %");
    }
    out.push('\n');
    let figure = |f: &Figure, times: f64| match (f.value, f.chance.or(f.by_load)) {
        (Some(value), Some(chance)) => format!("{:.2} ({:.2})", times * value, times * chance),
        (Some(value), None) => format!("{:.2}", times * value),
        (None, _) => "-".into(),
    };
    for layer in layers {
        let name = layer.name.clone().unwrap_or_else(|| layer.layer.to_string());
        let _ = write!(
            out,
            "{name:<10} {:>4} {:>4}  {:>15}  {:>7}  {:>13}",
            layer.experts,
            layer.top_k,
            figure(&layer.dropped_rate, 100.0),
            layer.without,
            figure(&layer.max_over_mean, 1.0)
        );
        if let Some(cost) = &layer.ranks {
            let _ = write!(
                out,
                "  {:>14}  {:>13}",
                figure(&cost.sent_per_token, 1.0),
                figure(&cost.imbalance, 1.0)
            );
        }
        if let Some(hits) = &layer.cache {
            let _ = write!(out, "  {:>15}", figure(&hits.rate, 100.0));
        }
        out.push('\n');
    }
    if let Some(Losses { recorded, unchanged, replayed, tokens }) = losses {
        let _ = match (recorded, unchanged, replayed) {
            (Some(recorded), Some(before), Some(after)) => writeln!(
                out,
                "\nloss {before:.4} with nothing changed ({recorded:.4} as recorded), {after:.4} as replayed: {:+.4} nats per token, over \
                 {tokens} tokens",
                after - before
            ),
            _ => writeln!(out, "\nno token of the trace has a loss: what follows it is not known"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_over_tokens_with_a_loss_in_each() {
        let found = Losses::of(&[1.0, f32::NAN, 3.0], &[2.0, 2.0, 2.0], &[1.0, 1.0, f32::INFINITY]);
        let expected = (Some(1.0), Some(2.0), Some(1.0), 1);
        assert_eq!((found.recorded, found.unchanged, found.replayed, found.tokens), expected);
        let none = Losses::of(&[f32::NAN], &[1.0], &[1.0]);
        assert_eq!((none.recorded, none.replayed, none.tokens), (None, None, 0));
    }
}
