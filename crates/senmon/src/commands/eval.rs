//! `eval`: loss, perplexity and bits per byte, in total and by domain.

use super::{print, print_json, size};
use crate::cli::EvalArgs;
use crate::failure::{Failure, Result};
use crate::ui::{DataProgress, INTERRUPTED};
use senmon_data::{DomainRule, EvalSet, TextTokenizer};
use senmon_models::decoder::Decoder;
use senmon_train::RunConfig;
use senmon_train::eval::{EvalText, evaluate};
use senmon_train::observer::EvalRecord;
use senmon_train::setup::held_out_of;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Where token shards are kept between runs: `$SENMON_CACHE`, else the user's cache folder.
pub(super) fn cache_folder() -> PathBuf {
    senmon_files::cache_folder().unwrap_or_else(|| std::env::temp_dir().join("senmon-cache"))
}

pub(super) fn run(args: EvalArgs) -> Result<()> {
    let max_tokens = match size("--max-tokens", &args.max_tokens)? {
        0 => None,
        n => Some(n as usize),
    };
    if args.batch == 0 {
        return Err(Failure::mistake("--batch 0 must be at least 1"));
    }
    let loaded = args.from.open()?;
    let config_path = args.from.model.join(senmon_train::folder::CONFIG);
    let config = match std::fs::read_to_string(&config_path) {
        _ if args.from.model.is_file() => None,
        Ok(text) => Some(RunConfig::from_toml(&config_path.display().to_string(), &text)?),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(Failure::mistake(format!("cannot read {}: {e}", config_path.display()))),
    };
    let sequence = args.sequence.or(config.as_ref().map(|c| c.train.sequence)).unwrap_or(256);
    if sequence == 0 || sequence > loaded.spec.max_positions {
        let most = loaded.spec.max_positions;
        return Err(Failure::mistake(format!(
            "--sequence {sequence} must be from 1 to the model's {most} positions"
        )));
    }
    let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
        Failure::mistake(format!(
            "{} has no tokenizer: text cannot be made into its tokens",
            args.from.model.display()
        ))
    })?;
    let tokenizer = tokenizer.file()?;
    crate::ui::catch_interrupts();
    let progress = DataProgress::new(args.common.quiet);
    let text = if args.data.is_empty() {
        let Some(config) = config else {
            return Err(Failure::mistake(format!(
                "{} is no run folder: say --data PATH",
                args.from.model.display()
            )));
        };
        held_out_of(&config.data, tokenizer, sequence, max_tokens, &cache_folder(), &progress)?
    } else {
        let tokenizer = TextTokenizer::from_file(&tokenizer)?;
        let rule: DomainRule = args.domains.parse()?;
        let set = EvalSet::from_paths(
            &args.data,
            &rule,
            &args.column,
            &tokenizer,
            sequence,
            max_tokens,
            &progress,
        )?;
        EvalText {
            windows: set.sequences.into_iter().map(|w| (w.tokens, w.domain)).collect(),
            domains: set.domains,
            bytes_of_token: tokenizer.bytes_of_tokens().to_vec(),
        }
    };
    progress.done();
    if let Some(token) = text.windows.iter().flat_map(|(w, _)| w).find(|t| **t as usize >= loaded.spec.vocab)
    {
        let vocab = loaded.spec.vocab;
        return Err(Failure::mistake(format!(
            "the tokenizer gives token {token}, the model's vocabulary is {vocab}"
        )));
    }
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
