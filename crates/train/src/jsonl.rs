//! `metrics.jsonl`: one JSON object a line.
//!
//! A step's line is a [`StepRecord`], an evaluation's an [`EvalRecord`], an alarm's `{"step": …, "alarm": {…}}`. A
//! resumed run first cuts off what came after its checkpoint, so that the file ends as that of a run that was never
//! interrupted, speeds aside.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::alarms::Alarm;
use crate::error::{Result, TrainError};
use crate::observer::{EvalRecord, Observer, StepRecord};

/// Writes `metrics.jsonl`.
#[derive(Debug)]
pub struct Jsonl {
    path: PathBuf,
    file: BufWriter<File>,
}

/// One line, whatever it tells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A training step.
    Step(StepRecord),
    /// An evaluation.
    Eval(EvalRecord),
    /// An alarm.
    Alarm {
        /// The step in which it was raised.
        step: u64,
        /// The alarm.
        alarm: Alarm,
    },
}

impl Jsonl {
    /// Starts a new file, in place of any that is there.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(TrainError::io("create", path))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    /// Goes on with a file after `step`: lines of later steps, and a line cut short, are removed. A missing file is
    /// begun.
    pub fn resume(path: &Path, step: u64) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(TrainError::io("open", path))?;
        let keep = kept_bytes(&file, step).map_err(TrainError::io("read", path))?;
        file.set_len(keep).map_err(TrainError::io("shorten", path))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    fn line(&mut self, line: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.file, line)
            .map_err(std::io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"))
            .and_then(|()| self.file.flush())
            .map_err(TrainError::io("write", &self.path))
    }
}

/// Bytes of whole lines up to `step`, from the beginning.
fn kept_bytes(file: &File, step: u64) -> std::io::Result<u64> {
    #[derive(Deserialize)]
    struct Head {
        step: u64,
    }
    let mut reader = BufReader::new(file);
    let (mut kept, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        let whole = line.last() == Some(&b'\n');
        if !whole || !serde_json::from_slice::<Head>(&line).is_ok_and(|head| head.step <= step) {
            return Ok(kept);
        }
        kept += read as u64;
    }
}

/// Hands the lines of `metrics.jsonl` to `see`, one after the other, until it breaks off; a last line cut short is left out.
pub fn each(path: &Path, mut see: impl FnMut(Line) -> ControlFlow<()>) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(TrainError::io("open", path))?);
    let (mut number, mut line) = (0, Vec::new());
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).map_err(TrainError::io("read", path))?;
        if line.last() != Some(&b'\n') {
            return Ok(());
        }
        number += 1;
        let line = serde_json::from_slice(&line).map_err(|e| TrainError::Syntax {
            origin: path.display().to_string(),
            reason: format!("line {number} is not of a metrics file: {e}"),
        })?;
        if see(line).is_break() {
            return Ok(());
        }
    }
}

/// Reads a whole `metrics.jsonl`; a last line cut short is left out.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    each(path, |line| {
        lines.push(line);
        ControlFlow::Continue(())
    })?;
    Ok(lines)
}

impl Observer for Jsonl {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.line(record)
    }

    fn evaluated(&mut self, record: &EvalRecord) -> Result<()> {
        self.line(record)
    }

    fn alarm(&mut self, alarm: &Alarm) -> Result<()> {
        self.line(&Line::Alarm { step: alarm.step, alarm: alarm.clone() })
    }

    fn saving(&mut self, _step: u64) -> Result<()> {
        self.file.get_ref().sync_data().map_err(TrainError::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alarms::AlarmKind;
    use crate::observer::LayerStats;
    use proptest::prelude::*;

    fn step(step: u64) -> StepRecord {
        StepRecord {
            step,
            tokens: step * 4096,
            loss: 8.0 / step as f64,
            total: 8.5 / step as f64,
            losses: [("aux".to_owned(), 1.25), ("z".to_owned(), 3.0)].into(),
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_second: 10_000.0,
            layers: vec![LayerStats::from_counts(0, &[3, 1, 0, 4], 0)],
        }
    }

    fn write_run(log: &mut Jsonl, steps: impl Iterator<Item = u64>) {
        for s in steps {
            log.step(&step(s)).unwrap();
            if s % 3 == 0 {
                log.evaluated(&EvalRecord { step: s, eval_loss: 1.0, ..EvalRecord::default() }).unwrap();
            }
            if s % 4 == 0 {
                let alarm = Alarm {
                    step: s,
                    kind: AlarmKind::LoadCv,
                    layer: Some(0),
                    experts: vec![3],
                    message: "m".into(),
                    remedy: "r".into(),
                };
                log.alarm(&alarm).unwrap();
            }
            log.saving(s).unwrap();
        }
    }

    #[test]
    fn the_lines_are_those_of_the_design() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = Jsonl::create(&path).unwrap();
        write_run(&mut log, 1..5);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 6);
        let first = &lines[0];
        for key in
            ["step", "tokens", "loss", "total", "losses", "lr", "grad_norm", "tokens_per_second", "layers"]
        {
            assert!(first.get(key).is_some(), "{key}");
        }
        assert_eq!(first["losses"]["aux"], 1.25);
        for key in ["layer", "load_cv", "entropy", "dead", "drops", "load"] {
            assert!(first["layers"][0].get(key).is_some(), "{key}");
        }
        assert_eq!(first["layers"][0]["load"][3], 0.5);
        let eval = &lines[3];
        assert!(eval.get("eval_loss").is_some() && eval.get("loss").is_none());
        assert_eq!(lines[5]["alarm"]["kind"], "load_cv");
        let read = read(&path).unwrap();
        assert!(matches!(&read[0], Line::Step(s) if *s == step(1)));
        assert!(matches!(&read[3], Line::Eval(e) if e.step == 3));
        assert!(matches!(&read[5], Line::Alarm { step: 4, .. }));
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        std::fs::write(&path, "{\"step\": 1}\nnonsense").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
        assert!(read(&dir.path().join("none")).is_err());
        assert!(Jsonl::create(dir.path()).is_err());
        // To be resumed it need not be there.
        assert!(Jsonl::resume(&dir.path().join("new"), 5).is_ok());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_told_with_the_file() {
        let mut log = Jsonl::create(Path::new("/dev/full")).unwrap();
        let error = log.step(&step(1)).unwrap_err();
        assert!(error.is_users_mistake());
        assert!(error.to_string().starts_with("cannot write /dev/full: No space left"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Killed anywhere after a checkpoint, resumed from it: the same file as without.
        #[test]
        fn a_resumed_file_is_an_uninterrupted_one(saved in 0u64..12, beyond in 0u64..6, cut in 0usize..900) {
            let dir = tempfile::tempdir().unwrap();
            let (whole, cut_short) = (dir.path().join("whole"), dir.path().join("cut"));
            write_run(&mut Jsonl::create(&whole).unwrap(), 1..16);
            let mut log = Jsonl::create(&cut_short).unwrap();
            write_run(&mut log, 1..=saved);
            let safe = std::fs::metadata(&cut_short).unwrap().len();
            write_run(&mut log, saved + 1..=saved + beyond);
            drop(log);
            let file = OpenOptions::new().write(true).open(&cut_short).unwrap();
            let all = file.metadata().unwrap().len();
            file.set_len(all.saturating_sub(cut as u64).max(safe)).unwrap();
            let mut log = Jsonl::resume(&cut_short, saved).unwrap();
            write_run(&mut log, saved + 1..16);
            prop_assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&cut_short).unwrap());
        }

        #[test]
        fn any_bytes_can_be_resumed(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("m");
            std::fs::write(&path, bytes).unwrap();
            write_run(&mut Jsonl::resume(&path, 3).unwrap(), 4..6);
            prop_assert_eq!(read(&path).unwrap().len(), 3);
        }
    }
}
