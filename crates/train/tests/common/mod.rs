//! What several test files need: text to train on, a small run, and its bytes.

#![allow(dead_code, clippy::unwrap_used)]

use senmon_data::Silent;
use senmon_train::observer::Observer;
use senmon_train::setup::{self, Setup};
use senmon_train::{Layers, Result, RunConfig};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Writes text of eight packages, about 100 kB, always the same.
pub fn write_corpus(folder: &Path) {
    const WORDS: &[&str] = &[
        "token", "expert", "router", "gate", "load", "even", "fn", "let", "match", "batch", "of", "the", "a",
        "sum", "layer", "width", "loss", "grad", "step", "seed",
    ];
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for package in 0..8 {
        let folder = folder.join(format!("package{package}-1.0.{package}"));
        fs::create_dir_all(&folder).unwrap();
        for (file, extension) in [(0, "rs"), (1, "md"), (2, "rs")] {
            let mut text = String::new();
            while text.len() < 4500 {
                for _ in 0..4 + next(8) {
                    text += WORDS[(next(WORDS.len()) + package) % WORDS.len()];
                    text.push(' ');
                }
                text.push('\n');
            }
            fs::write(folder.join(format!("part{file}.{extension}")), text).unwrap();
        }
    }
}

/// A run that exercises all state: selection bias, jitter, shared and dense parts, accumulation.
pub const SETTINGS: &[&str] = &[
    "model.layers=3",
    "model.hidden=32",
    "model.heads=2",
    "model.kv_heads=1",
    "experts.count=4",
    "experts.intermediate=16",
    "experts.shared=1",
    "experts.first_dense=1",
    "router.kind=sigmoid_bias",
    "router.jitter=0.01",
    "balance.aux=0.001",
    "data.vocab=300",
    "data.holdout=0.1",
    "train.batch=2",
    "train.sequence=32",
    "train.accumulate=3",
    "train.steps=9",
    "train.save_every=2",
    "train.eval_every=4",
    "train.eval_tokens=512",
];

/// [`SETTINGS`] on the text in `data`, with `more` over them.
pub fn config(data: &Path, more: &[&str]) -> RunConfig {
    let layers = Layers::new().set_value("data.paths", vec![data.display().to_string()]).unwrap();
    let all = SETTINGS.iter().chain(more);
    setup::configure(all.fold(layers, |layers, set| layers.set(set).unwrap())).unwrap()
}

/// Begins a run.
pub fn create(config: RunConfig, out: &Path, cache: &Path) -> Result<Setup> {
    setup::create(config, out, cache, &Silent)
}

/// Goes on with a run.
pub fn resume(out: &Path, cache: &Path) -> Result<Setup> {
    let folder = senmon_train::folder::RunFolder::resume(out)?;
    let config = folder.read_config()?;
    setup::resume(config, folder, cache, &Silent)
}

/// Trains to the end, with `observer` and the metrics file.
pub fn train(mut setup: Setup, observer: &mut dyn Observer, interrupted: &AtomicBool) -> Result<()> {
    let path = setup.trainer.folder.metrics();
    let log = match setup.trainer.progress.step {
        0 => senmon_train::jsonl::Jsonl::create(&path)?,
        step => senmon_train::jsonl::Jsonl::resume(&path, step)?,
    };
    let mut all = senmon_train::observer::Observers::new().with(log);
    all.push(observer);
    setup.trainer.run(&mut all, interrupted)?;
    Ok(())
}

/// Every file of the newest checkpoint by name, but what tells of time.
pub fn newest_bytes(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let newest = senmon_train::folder::checkpoints(out).unwrap().pop().unwrap();
    let mut files = BTreeMap::new();
    for folder in [newest.path.clone(), newest.path.join("state")] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_file() && name != "progress.json" {
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    assert!(files.contains_key("model.safetensors") && files.contains_key("optimizer.safetensors"));
    files
}

/// The first line in which two logs differ.
pub fn first_difference(a: &[serde_json::Value], b: &[serde_json::Value]) -> Option<String> {
    let differs = a.iter().zip(b).find(|(a, b)| a != b).map(|(a, b)| format!("{a}\n{b}"));
    differs.or_else(|| (a.len() != b.len()).then(|| format!("{} and {} lines", a.len(), b.len())))
}

/// The lines of `metrics.jsonl` without speeds.
pub fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().remove("tokens_per_second");
            line
        })
        .collect()
}
