//! `--threads` is how many threads compute: no library adds its own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{MODEL, Place, running};

#[test]
fn one_thread_is_one_thread() {
    let place = Place::new();
    // Activations large enough that candle would cut sums of them.
    let command = place.senmon(&format!(
        "train --data text --out run {MODEL} --set train.batch=32 --set train.sequence=64 --steps 100000 --threads 1"
    ));
    let (run, mut said) = running(command);
    said.find(|line| line.contains("step 1 ")).unwrap();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", run.0.id())).unwrap();
    let names: Vec<String> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_owned())
        .collect();
    assert!(!names.is_empty() && !names.iter().any(|name| name.starts_with("candle")), "{names:?}");
}
