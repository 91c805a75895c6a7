//! Exact replay: twenty steps of AdamW from given weights on given batches follow torch and transformers. The golden
//! folders say what they were made with.

#![allow(clippy::unwrap_used)]

mod common;

use common::{create, metrics, train};
use safetensors::SafeTensors;
use senmon_train::observer::Observer;
use senmon_train::{Layers, setup};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

struct Silent;
impl Observer for Silent {}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values =
        |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
    file.tensors().into_iter().map(|(name, view)| (name, values(view.data()))).collect()
}

/// How far a replay ends from the reference: losses (greatest relative), weights (greatest ‖W - W_ref‖ / ‖W_ref - W_init‖).
fn replay(case: &str, more: &[&str]) -> (f64, f64) {
    let (case, dir) = (golden().join(case), tempfile::tempdir().unwrap());
    let said: serde_json::Value =
        serde_json::from_slice(&fs::read(case.join("replay.json")).unwrap()).unwrap();
    let mut sets: Vec<String> = ["lr", "betas", "eps", "weight_decay", "clip"]
        .iter()
        .map(|key| format!("optimizer.{key}={}", said[*key]))
        .collect();
    sets.push(format!("balance.aux={}", said["aux"]));
    let fixed =
        ["schedule.kind=constant", "schedule.warmup=0", "balance.convention=huggingface", "balance.z=0"];
    sets.extend(fixed.iter().chain(more).map(|set| set.to_string()));
    let layers = Layers::new()
        .set_value("train.init", case.display().to_string())
        .and_then(|l| l.set_value("train.batches", case.join("batches.safetensors").display().to_string()));
    let config = setup::configure(sets.iter().fold(layers.unwrap(), |l, set| l.set(set).unwrap())).unwrap();
    let out = dir.path().join("run");
    let setup = create(config, &out, &dir.path().join("cache")).unwrap();
    train(setup, &mut Silent, &AtomicBool::new(false)).unwrap();

    let reference = tensors(&case.join("reference.safetensors"));
    let initial = tensors(&case.join("model.safetensors"));
    let ended = tensors(&out.join("model.safetensors"));
    let lines = metrics(&out);
    assert_eq!((lines.len(), reference["losses"].len()), (20, 20));
    let losses = lines.iter().map(|line| line["loss"].as_f64().unwrap());
    let loss = losses.zip(&reference["losses"]).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
    let norm = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    let weights = reference.iter().filter_map(|(name, wanted)| {
        let name = name.strip_prefix("final.")?;
        Some(norm(&ended[name], wanted) / norm(wanted, &initial[name]))
    });
    assert_eq!(ended.len(), reference.keys().filter(|name| name.starts_with("final.")).count());
    (loss, weights.fold(0.0, f64::max))
}

#[test]
fn training_follows_torch_step_by_step() {
    for case in ["replay-mixtral-top1", "replay-mixtral-top2", "replay-olmoe-tied", "replay-qwen3_moe-top4"] {
        let (loss, weights) = replay(case, &[]);
        assert!(loss <= 1e-4 && weights <= 1e-3, "{case}: loss {loss:.1e}, weights {weights:.1e}");
    }
}

#[test]
fn a_small_mistake_would_show() {
    for mistake in [
        "optimizer.clip=0",
        "balance.aux=0",
        "optimizer.weight_decay=0",
        "optimizer.eps=1e-6",
        "balance.convention=senmon",
    ] {
        let (_, weights) = replay("replay-mixtral-top2", &[mistake]);
        assert!(weights > 1e-3, "{mistake}: weights {weights:.1e}");
    }
}
