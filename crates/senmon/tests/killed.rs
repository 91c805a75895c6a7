//! A run that is killed at random moments and gone on with ends in the same bits as one that was left alone.

#![allow(clippy::unwrap_used)]

mod common;

use common::{CALM, MODEL, Place, done};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// What the run is, beside the model.
const RUN: &str = "--steps 60 --set model.layers=2 --set router.kind=sigmoid_bias --set data.holdout=0.1 \
    --set train.batch=2 --set train.sequence=64 --set train.accumulate=2 --set train.save_every=7 \
    --set train.eval_every=20 --set train.eval_tokens=512";

/// `senmon train` into `out`, begun or gone on with.
fn command(place: &Place, out: &str) -> Command {
    let mut command = match place.path(out).join("senmon.toml").exists() {
        true => place.senmon(&format!("train --resume --out {out} {CALM}")),
        false => place.senmon(&format!("train --data text --out {out} {MODEL} {RUN} {CALM}")),
    };
    command.stdout(Stdio::null());
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
    let place = Place::new();
    let started = Instant::now();
    done(command(&place, "whole"));
    let length = started.elapsed().as_millis() as u64;
    let expected = newest(&place.path("whole"));
    assert!(expected["step"].ends_with(b"00000060"));

    // The moments are random, so that over many runs of this test every one is met.
    let mut random = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    let (mut kills, mut ended) = (0, false);
    for _ in 0..60 {
        let mut child = command(&place, "killed").spawn().unwrap();
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
        // The kill before this one came between the last checkpoint and the end: there was nothing left to go on with.
        if status.code() == Some(2) && newest(&place.path("killed"))["step"].ends_with(b"00000060") {
            ended = true;
            break;
        }
        assert_eq!(status.code(), None, "killed, and not an error after a kill");
        kills += 1;
    }
    assert!(ended && kills > 0, "{kills} kills in {length} ms");
    let found = newest(&place.path("killed"));
    let differs: Vec<_> =
        expected.iter().filter(|(name, file)| found.get(*name) != Some(file)).map(|(n, _)| n).collect();
    assert!(differs.is_empty() && found.len() == expected.len(), "{differs:?} differ after {kills} kills");
    let shown = fs::read(place.path("killed/model.safetensors")).unwrap();
    assert!(shown == expected["model.safetensors"]);
}
