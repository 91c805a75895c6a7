//! What is left in the folder of a comparison or a sweep: a page, a table and a document, each written whole. Both may be in one
//! folder, where they share runs.

use std::path::Path;

use serde_json::{Value, json};

use crate::analysis::Analysis;
use crate::error::{CompareError, Result};
use crate::page::{self, Facts};
use crate::plan::Plan;
use crate::record::Record;
use crate::run::Outcomes;
use crate::sweep::Sweep;
use crate::verdict::Verdict;

/// The page of a comparison. Beside it are `compare.csv`, a line for each model and seed, and `compare.json`, everything.
pub const COMPARISON: &str = "compare.html";
/// The page of a sweep. Beside it are `sweep.csv`, a line for each candidate, and `sweep.json`, everything.
pub const SWEEP: &str = "sweep.html";

/// A comparison as one document: the plan, what was measured, what follows.
pub fn document(
    plan: &Plan,
    outcomes: &Outcomes,
    analysis: &Analysis,
    verdicts: &[Verdict],
) -> Result<Value> {
    let mut models = Vec::new();
    for (m, (model, records)) in plan.models.iter().zip(outcomes).enumerate() {
        let own = plan.places.iter().filter(|p| p.model == m);
        models.push(json!({
            "name": model.name,
            "arm": model.arm,
            "members": model.members,
            "parameters": model.footprint.total,
            "active_parameters": model.footprint.active,
            "flops_per_token": model.footprint.flops_per_token,
            "tokens": model.tokens,
            "training_flops": model.training_flops(),
            "equal": own.map(|p| json!({ "arm": p.arm, "equality": p.equality, "ratio": p.ratio })).collect::<Vec<_>>(),
            "runs": records.iter().map(run).collect::<Vec<_>>(),
            "config": model.config.to_toml()?,
        }));
    }
    let compared = analysis.comparisons.iter().zip(verdicts);
    Ok(json!({
        "tokens": plan.tokens,
        "seeds": plan.seeds,
        "intervals": analysis.intervals,
        "alpha": analysis.alpha,
        "verdicts": compared.map(|(c, v)| json!({ "comparison": c, "verdict": v })).collect::<Vec<_>>(),
        "missing": plan.missing,
        "models": models,
    }))
}

/// A run without its windows.
fn run(record: &Record) -> Value {
    let domains: serde_json::Map<String, Value> =
        by_domain(record).into_iter().map(|(name, bits)| (name, json!(bits))).collect();
    json!({
        "name": record.name,
        "seed": record.seed,
        "bits_per_byte": record.bits_per_byte,
        "lowest_bits_per_byte": record.best(),
        "domains": domains,
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "curve": record.curve.iter().map(|p| json!({
            "step": p.step, "tokens": p.tokens, "bits_per_byte": p.bits_per_byte,
        })).collect::<Vec<_>>(),
    })
}

fn by_domain(record: &Record) -> Vec<(String, f64)> {
    let of = |(d, name): (usize, &String)| {
        let own: Vec<_> = record.windows.iter().filter(|w| w.domain as usize == d).collect();
        (!own.is_empty()).then(|| (name.clone(), crate::heldout::bits_per_byte(own)))
    };
    record.domains.iter().enumerate().filter_map(of).collect()
}

/// A field of a table in CSV. What a spreadsheet would take for a formula stays text.
fn field(text: &str) -> String {
    let text = if text.starts_with(['=', '+', '-', '@']) && text.parse::<f64>().is_err() {
        format!("'{text}")
    } else {
        text.to_owned()
    };
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn lines(rows: Vec<Vec<String>>) -> String {
    let line = |row: Vec<String>| row.iter().map(|f| field(f)).collect::<Vec<_>>().join(",") + "\n";
    rows.into_iter().map(line).collect()
}

/// The runs as CSV: a line for each model and seed.
pub fn csv(plan: &Plan, outcomes: &Outcomes) -> String {
    let names: Vec<String> = outcomes
        .iter()
        .flatten()
        .next()
        .map_or_else(Vec::new, |r| by_domain(r).into_iter().map(|(name, _)| name).collect());
    let fixed = [
        "model",
        "arm",
        "seed",
        "members",
        "parameters",
        "active_parameters",
        "flops_per_token",
        "tokens",
        "training_flops",
        "seconds",
        "peak_memory_bytes",
        "bits_per_byte",
        "lowest_bits_per_byte",
    ];
    let head = fixed.iter().map(|s| (*s).to_owned());
    let mut rows =
        vec![head.chain(names.iter().map(|n| format!("bits_per_byte of {n}"))).collect::<Vec<_>>()];
    for (model, records) in plan.models.iter().zip(outcomes) {
        for r in records {
            let mut row = vec![
                model.name.clone(),
                model.arm.to_string(),
                r.seed.to_string(),
                r.members.to_string(),
                r.parameters.to_string(),
                r.active_parameters.to_string(),
                r.flops_per_token.to_string(),
                r.tokens.to_string(),
                r.training_flops().to_string(),
                r.seconds.to_string(),
                r.peak_memory_bytes.map_or_else(String::new, |b| b.to_string()),
                r.bits_per_byte.to_string(),
                r.best().to_string(),
            ];
            let own = by_domain(r);
            let of = |name: &String| {
                own.iter().find(|(n, _)| n == name).map_or_else(String::new, |(_, b)| b.to_string())
            };
            row.extend(names.iter().map(of));
            rows.push(row);
        }
    }
    lines(rows)
}

/// The candidates of a sweep as CSV.
pub fn csv_of_sweep(sweep: &Sweep) -> String {
    let head = [
        "candidate",
        "parameters",
        "active_parameters",
        "flops_per_token",
        "rungs",
        "tokens",
        "bits_per_byte",
        "dropped",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for row in &sweep.rows {
        rows.push(vec![
            row.name.clone(),
            row.parameters.to_string(),
            row.active_parameters.to_string(),
            row.flops_per_token.to_string(),
            row.rungs.to_string(),
            row.tokens.to_string(),
            row.bits_per_byte.map_or_else(String::new, |b| b.to_string()),
            row.dropped.clone().unwrap_or_default(),
        ]);
    }
    lines(rows)
}

/// Writes the three files of a comparison.
pub fn write(
    out: &Path,
    plan: &Plan,
    outcomes: &Outcomes,
    analysis: &Analysis,
    verdicts: &[Verdict],
    facts: &Facts,
) -> Result<Value> {
    let document = document(plan, outcomes, analysis, verdicts)?;
    let page = page::comparison(plan, outcomes, analysis, verdicts, facts)?.to_html()?;
    put(&out.join(COMPARISON), &page, &csv(plan, outcomes), &document)?;
    Ok(document)
}

/// Writes the three files of a sweep.
pub fn write_sweep(out: &Path, sweep: &Sweep, facts: &Facts) -> Result<Value> {
    let path = out.join(SWEEP);
    let bad = |e: serde_json::Error| CompareError::File { path: path.clone(), reason: e.to_string() };
    let document = serde_json::to_value(sweep).map_err(bad)?;
    put(&path, &page::sweep(sweep, facts).to_html()?, &csv_of_sweep(sweep), &document)?;
    Ok(document)
}

/// Writes a page, and beside it its table and its document.
fn put(path: &Path, page: &str, table: &str, document: &Value) -> Result<()> {
    let document = format!("{document:#}\n");
    for (extension, text) in [("html", page), ("csv", table), ("json", document.as_str())] {
        let path = path.with_extension(extension);
        senmon_files::write_whole(&path, |to| to.write_all(text.as_bytes()))
            .map_err(CompareError::io("write", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_and_no_formulas() {
        assert_eq!(field("a,b"), "\"a,b\"");
        assert_eq!(field("say \"x\""), "\"say \"\"x\"\"\"");
        assert_eq!(field("=HYPERLINK(1)"), "'=HYPERLINK(1)");
        assert_eq!(field("-1.5"), "-1.5");
    }
}
