//! `inspect`: what is in a model, after its audit.

use super::{insight, print, print_json};
use crate::cli::InspectArgs;
use crate::failure::{Failure, Result};
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::inspect::{describe, short};
use std::fmt::Write;

pub(super) fn run(args: InspectArgs) -> Result<()> {
    let audit = args.from.audit_or(Audit::Full);
    let loaded = checkpoint::open(&args.from.model, audit)?;
    let (description, tensors) = (describe(&loaded.spec, &loaded.layout.name()), loaded.tensors);
    let (unused, memory) = (loaded.unused.clone(), loaded.memory);
    if let Some(other) = &args.compare {
        let two = insight::of_two(&args, loaded, other)?;
        return if args.common.json { print_json(&two.document()) } else { print(&two.table()) };
    }
    let looks = !args.text.data.is_empty() || args.trace.is_some() || args.report.is_some();
    let idle = [
        ("--max-tokens", args.text.max_tokens.is_some()),
        ("--sequence", args.text.sequence.is_some()),
        ("--no-ablation", args.no_ablation),
        ("--no-likeness", args.no_likeness),
    ];
    if let Some((flag, _)) = idle.iter().find(|(_, given)| *given && !looks) {
        return Err(Failure::mistake(format!(
            "{flag} says how text is looked at, and none is: add --data PATH, --trace FILE or --report FILE"
        )));
    }
    let looked = looks.then(|| insight::of_text(&args, loaded)).transpose()?;
    if args.common.json {
        let mut json = serde_json::to_value(&description).unwrap_or_default();
        json["audit"] =
            serde_json::json!({ "tensors": tensors, "unused": unused, "content": audit != Audit::Structure });
        json["memory"] = serde_json::json!({ "mapped": memory.mapped, "held": memory.held });
        if let Some(looked) = &looked {
            json["routing"] = looked.document();
        }
        return print_json(&json);
    }
    let mut text = description.table();
    let (mapped, held) = (short(memory.mapped), short(memory.held));
    let _ = writeln!(text, "\nto run: {mapped}B used where they lie in the files, {held}B in memory");
    let _ = match audit {
        Audit::Structure => {
            writeln!(text, "audit: {tensors} tensors, each there once and of the right shape")
        }
        _ => writeln!(
            text,
            "audit: {tensors} tensors, each there once, of the right shape and finite; no expert twice"
        ),
    };
    for (name, why) in &unused {
        let _ = writeln!(text, "unused: {name} ({why})");
    }
    if let Some(looked) = &looked {
        text.push_str(&insight::table(&looked.statistics));
    }
    print(&text)
}
