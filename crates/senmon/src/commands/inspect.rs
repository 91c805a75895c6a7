//! `inspect`: what is in a model, after its audit.

use super::{print, print_json};
use crate::cli::InspectArgs;
use crate::failure::Result;
use senmon_models::checkpoint;
use senmon_models::inspect::describe;
use senmon_models::names::parts;
use std::fmt::Write;

pub(super) fn run(args: InspectArgs) -> Result<()> {
    let loaded = checkpoint::load(&args.model)?;
    let description = describe(&loaded.spec, loaded.family.name);
    let tensors = parts(&loaded.spec, &loaded.family.names).len();
    if args.common.json {
        let mut json = serde_json::to_value(&description).unwrap_or_default();
        json["audit"] = serde_json::json!({ "tensors": tensors, "unused": loaded.unused });
        return print_json(&json);
    }
    let mut text = description.table();
    let _ = writeln!(
        text,
        "\naudit: {tensors} tensors, each there once, of the right shape and finite; no expert twice"
    );
    for (name, why) in &loaded.unused {
        let _ = writeln!(text, "unused: {name} ({why})");
    }
    print(&text)
}
