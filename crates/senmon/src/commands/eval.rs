//! `eval`: loss, perplexity and bits per byte, in total and by domain.

use super::{print, print_json, texts};
use crate::cli::EvalArgs;
use crate::failure::{Failure, Result};
use crate::ui::INTERRUPTED;
use senmon_models::decoder::Decoder;
use senmon_train::eval::evaluate;
use senmon_train::observer::EvalRecord;
use std::fmt::Write;
use std::sync::atomic::Ordering;

pub(super) fn run(args: EvalArgs) -> Result<()> {
    if args.batch == 0 {
        return Err(Failure::mistake("--batch 0 must be at least 1"));
    }
    let loaded = args.from.open()?;
    let text = texts::windows(&args.text, &args.from.model, &loaded, "1M", args.common.quiet)?;
    let decoder = Decoder::run(&loaded.spec, loaded.weights)?;
    let cancelled = || INTERRUPTED.load(Ordering::Relaxed);
    let record = evaluate(&decoder, &text, args.batch, 0, 0, &cancelled)?;
    let record = record.ok_or_else(|| Failure::interrupted("interrupted"))?;
    if args.common.json {
        return print_json(&serde_json::json!({
            "loss": record.eval_loss,
            "perplexity": record.eval_loss.exp(),
            "bits_per_byte": record.bits_per_byte,
            "tokens": record.eval_tokens,
            "domains": record.domains,
        }));
    }
    print(&table(&record))
}

/// For people: the whole, then the domains.
pub(super) fn table(record: &EvalRecord) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<16} {:>8}  {:>10}  {:>9}  {:>9}",
        "domain", "loss", "perplexity", "bits/byte", "tokens"
    );
    let mut line = |name: &str, loss: f64, bits: f64, tokens: u64| {
        let _ = writeln!(out, "{name:<16} {loss:>8.4}  {:>10.2}  {bits:>9.4}  {tokens:>9}", loss.exp());
    };
    for (name, domain) in &record.domains {
        line(name, domain.loss, domain.bits_per_byte, domain.tokens);
    }
    line("all", record.eval_loss, record.bits_per_byte, record.eval_tokens);
    out
}
