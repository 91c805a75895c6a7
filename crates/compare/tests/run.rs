//! A whole comparison, and a sweep, on a little text.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use senmon_compare::analysis::Analysis;
use senmon_compare::files;
use senmon_compare::plan::{Arm, Ask, Equality, Plan};
use senmon_compare::record::{Record, Results};
use senmon_compare::run::{self, Place, Silent, Watch};
use senmon_compare::sweep::{axis, grid, search};
use senmon_compare::verdict::verdicts;
use senmon_compare::{CompareError, Result};
use senmon_train::Layers;
use senmon_train::observer::StepRecord;
use senmon_train::setup::configure;

/// Text of eight packages in two domains, always the same.
fn write_corpus(folder: &Path) {
    const WORDS: &[&str] =
        &["token", "expert", "router", "gate", "load", "even", "fn", "let", "match", "of", "the", "sum"];
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for package in 0..8 {
        let folder = folder.join(format!("package{package}-1.0.{package}"));
        fs::create_dir_all(&folder).unwrap();
        for extension in ["rs", "md"] {
            let mut text = String::new();
            while text.len() < 5000 {
                for _ in 0..4 + next(8) {
                    text += WORDS[(next(WORDS.len()) + package) % WORDS.len()];
                    text.push(' ');
                }
                text.push('\n');
            }
            fs::write(folder.join(format!("part.{extension}")), text).unwrap();
        }
    }
}

fn layers(data: &Path) -> Layers {
    let layers = Layers::new().set_value("data.paths", vec![data.display().to_string()]).unwrap();
    let sets = [
        "model.layers=2",
        "model.hidden=32",
        "model.heads=2",
        "model.kv_heads=1",
        "experts.count=4",
        "experts.intermediate=32",
        "data.vocab=300",
        "data.holdout=0.15",
        "train.batch=2",
        "train.sequence=32",
        "train.eval_tokens=1024",
    ];
    sets.iter().fold(layers, |layers, set| layers.set(set).unwrap())
}

fn ask(data: &Path) -> Ask {
    Ask {
        base: configure(layers(data)).unwrap(),
        layers: layers(data),
        tokens: 64 * 40,
        seeds: 2,
        arms: vec![Arm::Moe, Arm::Ensemble, Arm::EfficientEnsemble],
        routers: vec!["hash".into()],
        equal: vec![Equality::Flops, Equality::Time],
        members: 2,
    }
}

/// Ends the comparison at a step of a run.
struct Ender<'a> {
    run: usize,
    at: u64,
    seen: usize,
    flag: &'a AtomicBool,
}

impl Watch for Ender<'_> {
    fn begins(&mut self, _: &str, number: usize, _: usize) {
        self.seen = number;
    }
    fn step(&mut self, record: &StepRecord, _: u64) {
        if self.seen == self.run && record.step == self.at {
            self.flag.store(true, Ordering::Relaxed);
        }
    }
}

fn compare(
    plan: &Plan,
    out: &Path,
    cache: &Path,
    watch: &mut dyn Watch,
    flag: &AtomicBool,
) -> Result<run::Outcomes> {
    let mut results = Results::open(out)?;
    let data = &senmon_data::Silent;
    run::run_all(&mut plan.clone(), &mut results, &mut Place { out, cache, data, watch, interrupted: flag })
}

/// What does not depend on the clock or on memory.
fn timeless(record: &Record) -> Record {
    Record { seconds: 0.0, peak_memory_bytes: None, ..record.clone() }
}

#[test]
fn a_comparison_from_text_to_page_interrupted_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache) = (dir.path().join("text"), dir.path().join("cache"));
    write_corpus(&data);
    let plan = Plan::new(&ask(&data)).unwrap();
    let never = AtomicBool::new(false);
    // Interrupted in the first run between evaluations, and once more in the fourth.
    let out = dir.path().join("b");
    for (run, at) in [(1, 20), (4, 13)] {
        let flag = AtomicBool::new(false);
        let mut ender = Ender { run, at, seen: 0, flag: &flag };
        let error = compare(&plan, &out, &cache, &mut ender, &flag).unwrap_err();
        assert!(
            error.is_interruption()
                && matches!(error, CompareError::Interrupted { done, .. } if done + 1 == run),
            "{error}"
        );
    }
    let lines = fs::read_to_string(out.join("results.jsonl")).unwrap().lines().count();
    assert_eq!(lines, 3);
    let whole = compare(&plan, &out, &cache, &mut Silent, &never).unwrap();
    assert_eq!((whole.len(), whole[0].len()), (4, 2));
    // The same runs without an interruption.
    let jobs = plan.jobs().unwrap();
    let uninterrupted = dir.path().join("a");
    let mut other = Results::open(&uninterrupted).unwrap();
    let results = Results::open(&out).unwrap();
    for job in [&jobs[0], &jobs[3]] {
        let mut place = Place {
            out: &uninterrupted,
            cache: &cache,
            data: &senmon_data::Silent,
            watch: &mut Silent,
            interrupted: &never,
        };
        let record = run::one(job, &mut other, &mut place, (0, 1)).unwrap();
        assert_eq!(timeless(&record), timeless(results.find(&job.hash).unwrap()));
    }
    drop(results);
    // A third time nothing is trained.
    let again =
        compare(&plan, &out, &cache, &mut Ender { run: 1, at: 0, seen: 0, flag: &never }, &never).unwrap();
    assert_eq!(again, whole);

    // Seeds that are added when the text has changed are refused.
    fs::write(data.join("package0-1.0.0/more.md"), "more of the text ".repeat(99)).unwrap();
    let longer = Plan::new(&Ask { seeds: 3, ..ask(&data) }).unwrap();
    let error = compare(&longer, &out, &cache, &mut Silent, &never).unwrap_err();
    assert!(error.is_users_mistake() && error.to_string().contains("the text is not what it was"), "{error}");

    // All arms are judged on the same text, and an ensemble is no worse than the mean of its members.
    let all: Vec<&Record> = whole.iter().flatten().collect();
    let text = |r: &Record| r.windows.iter().map(|w| (w.domain, w.bytes, w.tokens)).collect::<Vec<_>>();
    assert!(all.iter().all(|r| text(r) == text(all[0]) && r.block_bytes == all[0].block_bytes));
    let place = plan.models.iter().position(|m| m.arm == Arm::Ensemble).unwrap();
    let results = Results::open(&out).unwrap();
    let own = jobs.iter().filter(|j| j.model == place && j.seed == 0);
    let members: Vec<f64> = own.map(|j| results.find(&j.hash).unwrap().bits_per_byte).collect();
    let together = whole[place][0].bits_per_byte;
    assert!(members.len() == 2 && together < (members[0] + members[1]) / 2.0, "{members:?} {together}");
    // The held-out loss went down, and curves end where runs do.
    for record in &all {
        let (first, last) = (record.curve.first().unwrap(), record.curve.last().unwrap());
        assert!(last.bits_per_byte < first.bits_per_byte && last.tokens == record.tokens, "{}", record.name);
        assert!(record.seconds > 0.0 && record.best() <= record.bits_per_byte);
        // In whole steps, of which there are few.
        let all = 3.0 * plan.reference.flops_per_token as f64 * plan.tokens as f64;
        assert!((record.training_flops() / all - 1.0).abs() < 0.04, "{}", record.name);
    }

    let analysis = Analysis::new(&plan, &whole);
    assert_eq!((analysis.comparisons.len(), analysis.intervals), (6, 12));
    let words = verdicts(&analysis);
    let facts = vec![("Text".to_owned(), "made up".to_owned())];
    let document = files::write(&out, &plan, &whole, &analysis, &words, &facts).unwrap();
    assert_eq!(document["verdicts"].as_array().unwrap().len(), 6);
    let page = fs::read_to_string(out.join(files::COMPARISON)).unwrap();
    for section in ["verdicts", "arms", "comparisons", "curves", "domains", "settings"] {
        assert!(page.contains(&format!("id=\"{section}\"")), "{section}");
    }
    for text in ["ensemble", "router-hash", "Learning curves against training FLOPs", "experts", "made up"] {
        assert!(page.contains(text), "{text}");
    }
    let table = fs::read_to_string(out.join("compare.csv")).unwrap();
    assert_eq!(table.lines().count(), 1 + 8);
    assert!(
        table.lines().next().unwrap().ends_with("bits_per_byte of md")
            || table.contains("bits_per_byte of rs")
    );
    let read: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(out.join("compare.json")).unwrap()).unwrap();
    assert_eq!(read["models"].as_array().unwrap().len(), 4);
}

#[test]
fn a_sweep_finds_the_rate_that_learns() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache, out) = (dir.path().join("text"), dir.path().join("cache"), dir.path().join("out"));
    write_corpus(&data);
    let layers = layers(&data);
    let base = configure(layers.clone()).unwrap();
    let axes = [axis("lr=0.0000001,0.005").unwrap(), axis("experts=2,4").unwrap()];
    let (found, skipped) = grid(&layers, &base, &axes).unwrap();
    assert_eq!((found.len(), skipped.len()), (4, 0));
    let flops = 3.0 * found[0].footprint.flops_per_token as f64 * 64.0 * 90.0;
    let never = AtomicBool::new(false);
    let sweep = |out: &Path| {
        let mut results = Results::open(out).unwrap();
        let (data, watch) = (&senmon_data::Silent, &mut Silent);
        search(
            &found,
            flops,
            2,
            &mut results,
            &mut Place { out, cache: &cache, data, watch, interrupted: &never },
        )
        .unwrap()
    };
    let first = sweep(&out);
    assert!(first.chosen.contains(&"optimizer.lr=0.005".to_owned()), "{first:?}");
    assert_eq!(first.shares, [0.25, 0.5, 1.0]);
    assert!(first.rows.iter().any(|r| r.dropped.as_ref().is_some_and(|d| d.contains("rung 1 of 3"))));
    let trained = fs::read_to_string(out.join("results.jsonl")).unwrap().lines().count();
    // Read back, not trained again.
    assert_eq!(sweep(&out), first);
    assert_eq!(fs::read_to_string(out.join("results.jsonl")).unwrap().lines().count(), trained);
    files::write_sweep(&out, &first, &vec![]).unwrap();
    let page = fs::read_to_string(out.join(files::SWEEP)).unwrap();
    assert!(
        page.contains("id=\"choice\"") && page.contains("id=\"candidates\"") && page.contains("is chosen")
    );
}
