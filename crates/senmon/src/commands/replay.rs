//! `replay`: a trace routed again under another K, a capacity, a placement of experts, a cache; with the model, what that costs.

use super::{check_out, print, print_json};
use crate::cli::ReplayArgs;
use crate::failure::{Failure, Result};
use crate::ui::{INTERRUPTED, catch_interrupts};
use senmon_insight::Trace;
use senmon_insight::replay::{Capacity, Ranks, Replayed, Scenario, choices_of, replay};
use senmon_insight::statistics::{self, Figure, Options, Placement};
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::Decoder;
use senmon_models::files;
use senmon_models::identity::model_hash;
use senmon_models::spec::FfnSpec;
use senmon_train::tracing;
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
        if let Some((before, after)) = losses {
            document["loss"] = serde_json::json!({ "recorded": before, "replayed": after });
        }
        return print_json(&document);
    }
    print(&table(&trace, &layers, losses))
}

/// Where experts are, if that is asked.
fn ranks(args: &ReplayArgs, trace: &Trace) -> Result<Option<Ranks>> {
    let Some(ranks) = args.ranks else {
        return match (&args.placement, &args.placement_out) {
            (None, None) => Ok(None),
            _ => Err(Failure::mistake("--placement needs --ranks R, the number of ranks")),
        };
    };
    let placements: BTreeMap<usize, Placement> = match args.placement.as_deref() {
        None | Some("contiguous") => BTreeMap::new(),
        Some("suggested") => {
            let found = statistics::of(trace, &Options { ranks: vec![ranks], ..Options::default() })?;
            let of = |layer: &statistics::LayerStatistics| {
                let suggestion = layer.placement.first()?;
                Some(Placement::new(ranks, suggestion.placement.clone()).map(|p| (layer.layer, p)))
            };
            found.layers.iter().filter_map(of).collect::<senmon_insight::Result<_>>()?
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

/// The mean loss of the trace's tokens as recorded, and as replayed with the model.
fn losses(model: &Path, trace: &Trace, scenario: &Scenario) -> Result<(f64, f64)> {
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
    // What was lost when the trace was recorded is not in it: the model routes for itself where nothing is changed.
    let choices = choices_of(trace, scenario)?;
    let again = tracing::replayed(&decoder, trace, &choices, &cancelled)?;
    let again = again.ok_or_else(|| Failure::interrupted("interrupted"))?;
    Ok((mean(&trace.loss), mean(&again.loss)))
}

fn mean(losses: &[f32]) -> f64 {
    let known = losses.iter().filter(|loss| loss.is_finite());
    known.clone().map(|loss| f64::from(*loss)).sum::<f64>() / known.count().max(1) as f64
}

fn table(trace: &Trace, layers: &[Replayed], losses: Option<(f64, f64)>) -> String {
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
    if let Some((before, after)) = losses {
        let _ = writeln!(
            out,
            "\nloss {before:.4} as recorded, {after:.4} as replayed: {:+.4} nats per token",
            after - before
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_pass_over_what_is_not_known() {
        assert_eq!(mean(&[1.0, f32::NAN, 3.0]), 2.0);
        assert_eq!(mean(&[]), 0.0);
    }
}
