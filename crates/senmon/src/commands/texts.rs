//! Text that a command runs through a model: paths that were named, or what a run held out.

use super::size;
use crate::cli::WindowsArgs;
use crate::failure::{Failure, Result};
use crate::ui::DataProgress;
use senmon_data::{DomainRule, EvalSet, TextTokenizer};
use senmon_models::checkpoint::Opened;
use senmon_train::RunConfig;
use senmon_train::eval::EvalText;
use senmon_train::setup::held_out_of;
use std::path::{Path, PathBuf};

/// Where token shards are kept between runs: `$SENMON_CACHE`, else the user's cache folder.
pub(super) fn cache_folder() -> PathBuf {
    senmon_files::cache_folder().unwrap_or_else(|| std::env::temp_dir().join("senmon-cache"))
}

/// The configuration of a run folder; none of another model.
pub(super) fn run_of(model: &Path) -> Result<Option<RunConfig>> {
    let path = model.join(senmon_train::folder::CONFIG);
    match std::fs::read_to_string(&path) {
        _ if model.is_file() => Ok(None),
        Ok(text) => Ok(Some(RunConfig::from_toml(&path.display().to_string(), &text)?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::mistake(format!("cannot read {}: {e}", path.display()))),
    }
}

/// Windows of the text, at most `most` tokens unless the user says how many. From here on Ctrl-C is heard, not obeyed.
pub(super) fn windows(
    args: &WindowsArgs,
    model: &Path,
    loaded: &Opened,
    most: &str,
    quiet: bool,
) -> Result<EvalText> {
    let max_tokens = match size("--max-tokens", args.max_tokens.as_deref().unwrap_or(most))? {
        0 => None,
        n => Some(n as usize),
    };
    let config = run_of(model)?;
    let sequence = args.sequence.or(config.as_ref().map(|c| c.train.sequence));
    let sequence = sequence.unwrap_or(256.min(loaded.spec.max_positions));
    if sequence == 0 || sequence > loaded.spec.max_positions {
        let most = loaded.spec.max_positions;
        return Err(Failure::mistake(format!(
            "--sequence {sequence} must be from 1 to the model's {most} positions"
        )));
    }
    let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
        Failure::mistake(format!("{} has no tokenizer: text cannot be made into its tokens", model.display()))
    })?;
    let tokenizer = tokenizer.file()?;
    crate::ui::catch_interrupts();
    let progress = DataProgress::new(quiet);
    let text = if args.data.is_empty() {
        let Some(config) = config else {
            return Err(Failure::mistake(format!("{} is no run folder: say --data PATH", model.display())));
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
            documents: set.sequences.iter().map(|w| w.document).collect(),
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
    Ok(text)
}
