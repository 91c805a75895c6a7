//! `convert`: a model from one layout and type to another.

use super::print_json;
use crate::cli::ConvertArgs;
use crate::failure::{Failure, Result};
use crate::ui::{ByteProgress, INTERRUPTED};
use senmon_models::audit::Audit;
use senmon_models::convert::{Types, convert};
use senmon_models::inspect::short;
use std::sync::atomic::Ordering;

pub(super) fn run(args: ConvertArgs) -> Result<()> {
    let types = Types::named(&args.types).ok_or_else(|| {
        Failure::mistake(format!("--type {} is not known: keep, f32, f16, bf16, q8_0 or q4_k", args.types))
    })?;
    crate::ui::catch_interrupts_of_work();
    let progress = ByteProgress::new(args.common.quiet || args.common.json, "converting");
    let audit = args.from.audit_or(Audit::Once);
    let report = convert(&args.from.model, &args.out, types, &args.family, audit, &|done, total| {
        progress.at(done, total);
        !INTERRUPTED.load(Ordering::Relaxed)
    });
    progress.done();
    if INTERRUPTED.load(Ordering::Relaxed) && report.is_err() {
        return Err(Failure::interrupted(format!("interrupted: {} was not written", args.out.display())));
    }
    let report = report?;
    if args.common.json {
        return print_json(&serde_json::json!({
            "layout": report.layout,
            "tensors": report.tensors,
            "bytes": report.bytes,
            "types": report.types.iter().map(|(ty, n)| (*ty, *n)).collect::<std::collections::BTreeMap<_, _>>(),
            "notes": report.notes,
        }));
    }
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    let types: Vec<_> = report.types.iter().map(|(ty, n)| format!("{n} {ty}")).collect();
    super::print(&format!(
        "{}: {}, {} tensors ({}), {}B\n",
        args.out.display(),
        report.layout,
        report.tensors,
        types.join(", "),
        short(report.bytes)
    ))
}
