//! A run that is killed at random moments and gone on with ends in the same bits as one that was left alone.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// Text of eight packages, always the same.
fn write_corpus(folder: &Path) {
    const WORDS: &[&str] =
        &["token", "expert", "router", "gate", "load", "fn", "let", "match", "of", "the", "sum", "loss"];
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for package in 0..8 {
        let folder = folder.join(format!("package{package}-1.0.0"));
        fs::create_dir_all(&folder).unwrap();
        let mut text = String::new();
        while text.len() < 20_000 {
            text += WORDS[(next(WORDS.len()) + package) % WORDS.len()];
            text.push(if next(9) == 0 { '\n' } else { ' ' });
        }
        fs::write(folder.join("lib.rs"), text).unwrap();
    }
}

/// `senmon train` into `out`, begun or gone on with.
fn command(dir: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_senmon"));
    command.args(["train", "--quiet", "--threads", "1", "--out"]).arg(out);
    if out.join("senmon.toml").exists() {
        command.arg("--resume");
    } else {
        command.arg("--data").arg(dir.join("data")).args(["--steps", "60"]);
        for set in [
            "model.layers=2",
            "model.hidden=32",
            "model.heads=2",
            "experts.count=4",
            "experts.intermediate=16",
            "router.kind=sigmoid_bias",
            "data.vocab=300",
            "data.holdout=0.1",
            "train.batch=2",
            "train.sequence=64",
            "train.accumulate=2",
            "train.save_every=7",
            "train.eval_every=20",
            "train.eval_tokens=512",
        ] {
            command.args(["--set", set]);
        }
    }
    command.env("SENMON_CACHE", dir.join("cache")).stdout(Stdio::null());
    command
}

/// The files of the newest checkpoint, but what tells of time.
fn newest(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut steps: Vec<_> =
        fs::read_dir(out.join("checkpoints")).unwrap().map(|e| e.unwrap().path()).collect();
    steps.sort();
    let newest = steps.pop().unwrap();
    let mut files =
        BTreeMap::from([("step".to_owned(), newest.file_name().unwrap().as_encoded_bytes().to_vec())]);
    for folder in [newest.clone(), newest.join("state")] {
        for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|path| path.is_file()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name != "progress.json" {
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

#[test]
fn killed_at_random_moments_a_run_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    write_corpus(&dir.path().join("data"));
    let whole = dir.path().join("whole");
    let started = Instant::now();
    assert!(command(dir.path(), &whole).status().unwrap().success());
    let length = started.elapsed().as_millis() as u64;
    let expected = newest(&whole);
    assert!(expected["step"].ends_with(b"00000060"));

    // The moments are random, so that over many runs of this test every one is met.
    let mut random = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    let killed = dir.path().join("killed");
    let (mut kills, mut ended) = (0, false);
    for _ in 0..60 {
        let mut child = command(dir.path(), &killed).spawn().unwrap();
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Six kills are enough; then it may end.
        if kills < 6 {
            std::thread::sleep(Duration::from_millis(random % (length / 3 + 20)));
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        if status.success() {
            ended = true;
            break;
        }
        assert_eq!(status.code(), None, "killed, and not an error after a kill");
        kills += 1;
    }
    assert!(ended && kills > 0, "{kills} kills in {length} ms");
    let found = newest(&killed);
    let differs: Vec<_> =
        expected.iter().filter(|(name, file)| found.get(*name) != Some(file)).map(|(n, _)| n).collect();
    assert!(differs.is_empty() && found.len() == expected.len(), "{differs:?} differ after {kills} kills");
    let shown = fs::read(killed.join("model.safetensors")).unwrap();
    assert!(shown == expected["model.safetensors"]);
}
