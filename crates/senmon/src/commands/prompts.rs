//! The prompts of `generate`: from flags, from a file, from standard input.

use crate::failure::{Failure, Result};
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// The prompts of a file: one a line, or, in a .jsonl, the text `prompt` of each line; empty lines are none. `-` is standard
/// input.
pub(super) fn of_file(path: &Path) -> Result<Vec<String>> {
    let cannot = |e: std::io::Error| Failure::mistake(format!("cannot read {}: {e}", path.display()));
    let text = if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).map_err(cannot)?;
        text
    } else {
        std::fs::read_to_string(path).map_err(cannot)?
    };
    let rows = path.extension().is_some_and(|extension| extension == "jsonl");
    let prompts: Vec<String> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(n, line)| if rows { row(path, n + 1, line) } else { Ok(line.to_owned()) })
        .collect::<Result<_>>()?;
    match prompts.is_empty() {
        true => Err(Failure::mistake(format!("{} has no prompts", path.display()))),
        false => Ok(prompts),
    }
}

/// The prompt in a line of a .jsonl.
fn row(path: &Path, number: usize, line: &str) -> Result<String> {
    let wrong = |what: &str| Failure::mistake(format!("{}, line {number}: {what}", path.display()));
    let row: Value = serde_json::from_str(line).map_err(|_| wrong("is not JSON"))?;
    let prompt = row.get("prompt").and_then(Value::as_str);
    prompt.map(str::to_owned).ok_or_else(|| wrong("has no text \"prompt\""))
}
