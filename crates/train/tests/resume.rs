//! A run that was interrupted, or killed, and gone on with ends in the same bits as one that was not; so does a run on
//! another number of threads.

#![allow(clippy::unwrap_used)]

mod common;

use common::{config, create, first_difference, metrics, newest_bytes, resume, train, write_corpus};
use senmon_train::observer::{Observer, StepRecord};
use senmon_train::{Result, TrainError};
use std::sync::atomic::{AtomicBool, Ordering};

/// Does something in the observer at one step.
struct At<'a> {
    step: u64,
    what: &'a dyn Fn() -> Result<()>,
}

impl Observer for At<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if record.step == self.step { (self.what)() } else { Ok(()) }
    }
}

fn nothing() -> impl Observer {
    At { step: 0, what: &|| Ok(()) }
}

#[test]
fn interrupted_or_broken_off_a_run_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache) = (dir.path().join("data"), dir.path().join("cache"));
    write_corpus(&data);
    let go = AtomicBool::new(false);
    let whole = dir.path().join("whole");
    train(create(config(&data, &[]), &whole, &cache).unwrap(), &mut nothing(), &go).unwrap();
    let (bytes, lines) = (newest_bytes(&whole), metrics(&whole));
    assert_eq!(lines.iter().filter(|line| line.get("loss").is_some()).count(), 9);
    assert_eq!(lines.iter().filter(|line| line.get("eval_loss").is_some()).count(), 3);

    for step in [1, 4, 5, 8] {
        let out = dir.path().join(format!("interrupted{step}"));
        let stop = AtomicBool::new(false);
        let at = &|| {
            stop.store(true, Ordering::Relaxed);
            Ok(())
        };
        train(create(config(&data, &[]), &out, &cache).unwrap(), &mut At { step, what: at }, &stop).unwrap();
        assert_eq!(resume(&out, &cache).unwrap().trainer.progress.step, step);
        train(resume(&out, &cache).unwrap(), &mut nothing(), &go).unwrap();
        let (found, differs) =
            (newest_bytes(&out), |(name, file): &(&String, &Vec<u8>)| bytes.get(*name) != Some(file));
        let other: Vec<_> = found.iter().filter(differs).map(|(name, _)| name).collect();
        assert!(other.is_empty() && found.len() == bytes.len(), "interrupted after step {step}: {other:?}");
        assert_eq!(first_difference(&metrics(&out), &lines), None);
    }
    for step in [1, 5] {
        // As after a kill: the steps since the last checkpoint are lost, and their lines stand in the log.
        let out = dir.path().join(format!("broken{step}"));
        let at = &|| Err(TrainError::Conflict("killed".into()));
        let error = train(create(config(&data, &[]), &out, &cache).unwrap(), &mut At { step, what: at }, &go)
            .unwrap_err();
        assert_eq!(error.to_string(), "killed");
        let setup = resume(&out, &cache).unwrap();
        assert_eq!(setup.trainer.progress.step, step - step % 2);
        train(setup, &mut nothing(), &go).unwrap();
        assert!(newest_bytes(&out) == bytes, "broken off in step {step}");
        assert_eq!(first_difference(&metrics(&out), &lines), None);
        // The newest three are kept, and the model is shown where its readers look for it.
        assert_eq!(senmon_train::folder::checkpoints(&out).unwrap().len(), 3);
        assert_eq!(std::fs::read(out.join("model.safetensors")).unwrap(), bytes["model.safetensors"]);
        let over = resume(&out, &cache).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(over.contains("is done (9 steps"), "{over}");
    }
}

#[test]
fn one_two_and_three_threads_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write_corpus(&data);
    for more in [
        &[][..],
        &["router.kind=topk_pre", "train.accumulate=1", "balance.aux=0.01", "experts.count=6"],
        &["train.precision=bf16"],
    ] {
        let runs: Vec<_> = [1, 2, 3]
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let tag = format!("{threads}-{}", more.len());
                // Each has its own cache: tokens too must not depend on threads.
                let (out, cache) =
                    (dir.path().join(format!("run{tag}")), dir.path().join(format!("cache{tag}")));
                pool.install(|| {
                    let setup = create(config(&data, more), &out, &cache).unwrap();
                    train(setup, &mut nothing(), &AtomicBool::new(false)).unwrap();
                });
                (newest_bytes(&out), metrics(&out))
            })
            .into();
        assert!(runs[0] == runs[1] && runs[0] == runs[2]);
    }
}

#[test]
fn in_bf16_the_loss_stays_close_and_a_resumed_run_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache) = (dir.path().join("data"), dir.path().join("cache"));
    write_corpus(&data);
    let go = AtomicBool::new(false);
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        train(create(config(&data, more), &out, &cache).unwrap(), &mut nothing(), &go).unwrap();
        (newest_bytes(&out), metrics(&out))
    };
    let (exact, bf16) = (run("f32", &[]), run("bf16", &["train.precision=bf16"]));
    let losses = |lines: &[serde_json::Value]| -> Vec<f64> {
        lines.iter().filter_map(|line| line.get("loss").and_then(serde_json::Value::as_f64)).collect()
    };
    let (exact, rounded) = (losses(&exact.1), losses(&bf16.1));
    assert!(exact != rounded && exact.len() == rounded.len());
    for (x, y) in exact.iter().zip(&rounded) {
        assert!((x / y - 1.0).abs() < 0.01, "{x} and {y}");
    }
    // Interrupted in the middle, it keeps its precision.
    let out = dir.path().join("interrupted");
    let stop = AtomicBool::new(false);
    let at = &|| {
        stop.store(true, Ordering::Relaxed);
        Ok(())
    };
    let setup = create(config(&data, &["train.precision=bf16"]), &out, &cache).unwrap();
    train(setup, &mut At { step: 4, what: at }, &stop).unwrap();
    train(resume(&out, &cache).unwrap(), &mut nothing(), &go).unwrap();
    assert!(newest_bytes(&out) == bf16.0);
}

#[test]
fn a_seed_is_all_that_is_random() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache) = (dir.path().join("data"), dir.path().join("cache"));
    write_corpus(&data);
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let setup = create(config(&data, more), &out, &cache).unwrap();
        train(setup, &mut nothing(), &AtomicBool::new(false)).unwrap();
        newest_bytes(&out).remove("model.safetensors").unwrap()
    };
    let first = run("a", &[]);
    assert!(first == run("b", &[]));
    assert!(first != run("c", &["train.seed=1"]));
    // How a global batch is cut into micro-batches changes rounding only, and jitter, which is drawn by micro-batch.
    let one = run("d", &["router.jitter=0", "train.batch=6", "train.accumulate=1"]);
    let six = run("e", &["router.jitter=0", "train.batch=1", "train.accumulate=6"]);
    assert!(one != six);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache, out) = (dir.path().join("data"), dir.path().join("cache"), dir.path().join("run"));
    write_corpus(&data);
    // Without clipping, a rate of 1e30 throws the weights beyond f32 within steps.
    let wild = ["optimizer.lr=1e30", "optimizer.clip=0", "schedule.kind=constant", "schedule.warmup=0"];
    let go = AtomicBool::new(false);
    let error = train(create(config(&data, &wild), &out, &cache).unwrap(), &mut nothing(), &go).unwrap_err();
    let TrainError::NonFinite { step, what, advice } = &error else { panic!("{error}") };
    assert!(*step >= 2 && advice.contains("step 0") && advice.contains("optimizer.lr"), "{error}");
    assert!(what == "the loss" || what.starts_with("the gradient of "), "{error}");
    let setup = resume(&out, &cache).unwrap();
    assert_eq!(setup.trainer.progress.step, 0);
    assert!(setup.trainer.decoder.values().unwrap().iter().flatten().all(|x| x.is_finite()));
}

#[test]
fn a_model_is_tuned_further_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cache, first) = (dir.path().join("data"), dir.path().join("cache"), dir.path().join("first"));
    write_corpus(&data);
    let go = AtomicBool::new(false);
    train(create(config(&data, &[]), &first, &cache).unwrap(), &mut nothing(), &go).unwrap();
    let layers = |more: &[&str]| {
        let layers = senmon_train::Layers::new()
            .set_value("data.paths", vec![data.display().to_string()])
            .and_then(|l| l.set_value("train.init", first.display().to_string()));
        let settings = ["train.batch=2", "train.sequence=32", "train.steps=3", "data.holdout=0.1"];
        settings.iter().chain(more).fold(layers.unwrap(), |l, set| l.set(set).unwrap())
    };
    let config = senmon_train::setup::configure(layers(&[])).unwrap();
    assert_eq!((config.model.hidden, config.model.layers, config.experts.first_dense), (32, 3, 1));
    assert_eq!((config.router.kind.as_str(), config.model.family.as_str()), ("sigmoid_bias", "dots1"));
    assert!(config.balance.aux == 0.0 && config.balance.bias_rate > 0.0);
    let tuned = dir.path().join("tuned");
    let setup = create(config, &tuned, &cache).unwrap();
    let (start, end) =
        (setup.trainer.decoder.values().unwrap(), senmon_models::checkpoint::load(&first).unwrap());
    assert_eq!(start, end.params);
    assert_eq!(
        std::fs::read(first.join("tokenizer.json")).unwrap(),
        std::fs::read(tuned.join("tokenizer.json")).unwrap()
    );
    train(setup, &mut nothing(), &go).unwrap();
    assert!(newest_bytes(&tuned)["model.safetensors"] != newest_bytes(&first)["model.safetensors"]);
    assert!(matches!(resume(&tuned, &cache).err(), Some(TrainError::IsDone { step: 3, .. })));
    let error = senmon_train::setup::configure(layers(&["model.hidden=64"])).unwrap_err().to_string();
    assert!(error.contains("model.hidden") && error.contains("--init"), "{error}");
}
