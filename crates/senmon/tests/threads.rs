//! `--threads` is how many threads compute: no library adds its own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{MODEL, Place, Running};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

#[test]
fn one_thread_is_one_thread() {
    let place = Place::new();
    // Activations large enough that candle would cut sums of them.
    let mut command = place.senmon(&format!(
        "train --data text --out run {MODEL} --set train.batch=32 --set train.sequence=64 --steps 100000 --threads 1"
    ));
    let mut run = Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let mut said = BufReader::new(run.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    said.find(|line| line.contains("step 1 ")).unwrap();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", run.0.id())).unwrap();
    let names: Vec<String> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_owned())
        .collect();
    assert!(!names.is_empty() && !names.iter().any(|name| name.starts_with("candle")), "{names:?}");
}
