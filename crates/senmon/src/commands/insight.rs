//! `inspect` with text: what the router and the experts do with it.

use super::routing::Routers;
use super::texts;
use crate::cli::InspectArgs;
use crate::failure::{Failure, Result};
use crate::ui::INTERRUPTED;
use senmon_insight::statistics::{self, Options, Statistics};
use senmon_insight::{About, Trace};
use senmon_models::checkpoint::Opened;
use senmon_models::decoder::Decoder;
use senmon_models::identity::model_hash;
use senmon_train::tracing;
use std::fmt::Write;
use std::sync::atomic::Ordering;

/// Tokens that are looked at unless the user says how many.
const TOKENS: &str = "32k";

/// The routing of the text, written where that is wanted, and what there is to say of it.
pub(super) fn of_text(args: &InspectArgs, loaded: Opened) -> Result<Statistics> {
    let routers = Routers::of_decoder(&loaded.spec);
    if routers.kind().is_empty() {
        return Err(Failure::mistake(format!("{} has no experts to look at", args.from.model.display())));
    }
    if let Some(file) = &args.trace {
        super::check_out(file)?;
    }
    let text = texts::windows(&args.text, &args.from.model, &loaded, TOKENS, args.common.quiet)?;
    let about =
        About { model: model_hash(&args.from.model)?, router: routers.kind().into(), domains: Vec::new() };
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    let cancelled = || INTERRUPTED.load(Ordering::Relaxed);
    let trace = tracing::record(&decoder, &text, about, true, &cancelled)?;
    let trace: Trace = trace.ok_or_else(|| Failure::interrupted("interrupted: nothing was written"))?;
    if let Some(file) = &args.trace {
        trace.write(file)?;
    }
    Ok(statistics::of(&trace, &Options::default())?)
}

/// For people: a line for each layer.
pub(super) fn table(statistics: &Statistics) -> String {
    let number = |x: Option<f64>, digits: usize| x.map_or_else(|| "-".into(), |x| format!("{x:.digits$}"));
    let mut out = String::new();
    let _ = writeln!(
        out,
        "\n{} tokens of {} texts in {} domains, loss {} nats per token; (by chance)\n\n\
         {:<10} {:>13}  {:>13}  {:>5}  {:>13}  {:>13}  {:>13}",
        statistics.tokens,
        statistics.texts,
        statistics.domains.len(),
        number(statistics.loss, 3),
        "layer",
        "load CV",
        "entropy",
        "dead",
        "greatest p",
        "same as last",
        "tells domain"
    );
    for layer in &statistics.layers {
        let name = layer.name.clone().unwrap_or_else(|| layer.layer.to_string());
        let pair = |value: Option<f64>, chance: Option<f64>| match value {
            None => "-".into(),
            Some(_) => format!("{} ({})", number(value, 2), number(chance, 2)),
        };
        let figure = |f: &statistics::Figure| pair(f.value, f.chance);
        let domain = &layer.domains.information;
        let _ = writeln!(
            out,
            "{name:<10} {:>13}  {:>13}  {:>5}  {:>13}  {:>13}  {:>13}",
            figure(&layer.load.cv),
            figure(&layer.load.entropy),
            layer.load.dead.len(),
            figure(&layer.confidence.mean_probability),
            figure(&layer.repeats.all.first_rate),
            pair(domain.normalized, domain.shuffled_normalized),
        );
    }
    out.push_str("\nWhat each figure is: docs/insight.md\n");
    out
}
