//! `metrics.jsonl`: one JSON object a line.
//!
//! A step's line is a [`StepRecord`], an evaluation's an [`EvalRecord`], an alarm's `{"step": …, "alarm": {…}}`. A
//! resumed run first cuts off what came after its checkpoint, so that the file ends as that of a run that was never
//! interrupted, speeds aside.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
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

/// Reads a whole `metrics.jsonl`; a last line cut short is left out.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).map_err(TrainError::io("read", path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line).map_err(|e| TrainError::Syntax {
                origin: path.display().to_string(),
                reason: format!("line {} is not of a metrics file: {e}", i + 1),
            })
        })
        .collect()
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
