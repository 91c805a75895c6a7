//! `compare` from outside: planned, done, killed and gone on with, and refused.

#![allow(clippy::unwrap_used)]

mod common;

use common::{BATCH, CALM, MODEL, Place, done, json, number, printed, refused};
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A comparison of models that train in a fraction of a second.
fn compare_on(place: &Place, arguments: &str, calm: &str) -> Command {
    let text = "--data text --set data.holdout=0.2 --set train.eval_tokens=512";
    place.senmon(&format!("compare {arguments} {text} {MODEL} {BATCH} {calm}"))
}

/// With two seeds.
fn compare(place: &Place, arguments: &str) -> Command {
    compare_on(place, &format!("{arguments} --seeds 2"), CALM)
}

const ARMS: &str = "--arms moe,dense --equal flops --tokens 1k";

#[test]
fn a_comparison_is_planned_done_and_not_done_again() {
    let place = Place::new();
    let plan = printed(compare(&place, &format!("--out cmp --plan {ARMS}")));
    assert!(plan.starts_with("4 runs of 2 models, 2 seeds") && plan.contains("dense"), "{plan}");
    assert!(!place.path("cmp").exists(), "a plan makes nothing");

    let first = json(compare(&place, &format!("--out cmp --json {ARMS}")));
    assert_eq!(first["seeds"], serde_json::json!([0, 1]));
    assert!(number(&first, "/models/1/runs/1/bits_per_byte") > 0.0);
    for file in ["compare.html", "compare.csv", "compare.json", "results.jsonl"] {
        assert!(place.path("cmp").join(file).is_file(), "{file}");
    }
    let results = fs::read(place.path("cmp/results.jsonl")).unwrap();
    assert_eq!(json(compare(&place, &format!("--out cmp --json {ARMS}"))), first);
    assert_eq!(fs::read(place.path("cmp/results.jsonl")).unwrap(), results, "nothing was trained again");

    // What is done is read wherever it is; times of other threads would not compare with what is to come.
    let three = format!("--out cmp {ARMS} --seeds 3");
    refused(compare_on(&place, &three, "--threads 2 --quiet"), &["1 thread", "2 threads", "another --out"]);
    // Nor would losses on other text.
    fs::write(place.path("text/package0-1.0.0/more.md"), "something else entirely\n".repeat(400)).unwrap();
    refused(compare_on(&place, &three, CALM), &["the text is not what it was", "another --out"]);
}

#[test]
fn killed_it_goes_on_and_ends_in_the_same_losses() {
    let place = Place::new();
    let arms = "--arms moe,dense --equal flops --tokens 8k";
    let losses = |json: &serde_json::Value| -> Vec<f64> {
        let models = json["models"].as_array().unwrap();
        let runs = models.iter().flat_map(|model| model["runs"].as_array().unwrap());
        runs.map(|run| number(run, "/bits_per_byte")).collect()
    };
    let started = Instant::now();
    let whole = losses(&json(compare(&place, &format!("--out whole --json {arms}"))));
    let length = started.elapsed();
    assert_eq!(whole.len(), 4);
    for part in [3, 5, 7, 8] {
        let mut child = compare(&place, &format!("--out cut {arms}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(length.max(Duration::from_millis(80)) * part / 10);
        let _ = child.kill();
        child.wait().unwrap();
    }
    assert_eq!(losses(&json(compare(&place, &format!("--out cut --json {arms}")))), whole);
}

#[test]
fn what_cannot_be_compared() {
    let place = Place::new();
    let no = |arguments: &str, words: &[&str]| {
        refused(compare(&place, &format!("--out cmp {arguments}")), words);
        assert!(!place.path("cmp").exists(), "{arguments}");
    };
    no("--arms moe --tokens 1k", &["two or more"]);
    no("--arms moe,sparse --tokens 1k", &["--arms sparse", "dense"]);
    no("--arms moe,ensemble --members 1 --tokens 1k", &["--members"]);
    no("--arms moe,dense --equal size --tokens 1k", &["--equal size", "flops"]);
    no("--arms moe,dense --plan --json --tokens 1k", &["--plan", "--json"]);
    no("--arms moe,dense --plan --minutes 1", &["--minutes", "--tokens"]);
    no("--sweep train.seed=1,2 --tokens 1k --plan", &["--sweep train.seed", "--seeds"]);
    no("--sweep experts=4,4 --tokens 1k --plan", &["different values"]);
    // Into the folder of a run.
    done(place.train("--data text --out run"));
    refused(compare(&place, &format!("--out run {ARMS}")), &["holds a run"]);
    // Into one with a file of another program, which stays as it is.
    fs::create_dir(place.path("other")).unwrap();
    fs::write(place.path("other/results.jsonl"), "no end of line").unwrap();
    refused(compare(&place, &format!("--out other {ARMS}")), &["results.jsonl", "another --out"]);
    assert_eq!(fs::read_to_string(place.path("other/results.jsonl")).unwrap(), "no end of line");
}
