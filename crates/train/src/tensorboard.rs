//! TensorBoard event files, scalars only. By hand, since the crates that write them are no longer kept and bring a
//! protobuf compiler for the two messages needed here.
//!
//! A file is a sequence of TFRecords: length (u64), masked CRC-32C of the length, an `Event` in protobuf, masked CRC-32C
//! of it; all little-endian. An `Event` is `wall_time` (1, double), `step` (2, int64) and one of `file_version` (3, string),
//! `summary` (5) and `session_log` (7); a `Summary` repeats `value` (1) with `tag` (1, string) and `simple_value` (2, float);
//! a `SessionLog` has `status` (1), START being 1.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Result, TrainError};
use crate::observer::{EvalRecord, Observer, RunInfo, StepRecord};

/// Writes `events.out.tfevents.*` into a run folder.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: BufWriter<File>,
    now: fn() -> f64,
}

const NAME: &str = "events.out.tfevents.";

impl TensorBoard {
    /// Starts an event file in `folder`; it is read after those that are there.
    pub fn create(folder: &Path) -> Result<Self> {
        // Readers go through the files by name, which begins with the second.
        let last = fs::read_dir(folder)
            .map_err(TrainError::io("read", folder))?
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_prefix(NAME)?.split('.').next()?.parse::<u64>().ok()
            })
            .max();
        let second = last.map_or(0, |s| s.saturating_add(1)).max(unix_time() as u64);
        let path = folder.join(format!("{NAME}{second:010}.senmon.{}.0", std::process::id()));
        let file = File::create_new(&path).map_err(TrainError::io("create", &path))?;
        let mut board = Self { path, file: BufWriter::new(file), now: unix_time };
        board.event(None, |event| string(event, 3, "brain.Event:2"))?;
        Ok(board)
    }

    /// One point of each series.
    fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        self.event(Some(step), |event| {
            let mut summary = Vec::new();
            for (tag, value) in values {
                let mut one = Vec::new();
                string(&mut one, 1, tag);
                key(&mut one, 2, Wire::Fixed32);
                one.extend((*value as f32).to_le_bytes());
                bytes(&mut summary, 1, &one);
            }
            bytes(event, 5, &summary);
        })
    }

    fn event(&mut self, step: Option<u64>, what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = Vec::new();
        key(&mut event, 1, Wire::Fixed64);
        event.extend((self.now)().to_le_bytes());
        if let Some(step) = step {
            key(&mut event, 2, Wire::Varint);
            varint(&mut event, step);
        }
        what(&mut event);
        self.file
            .write_all(&record(&event))
            .and_then(|()| self.file.flush())
            .map_err(TrainError::io("write", &self.path))
    }
}

impl Observer for TensorBoard {
    fn started(&mut self, info: &RunInfo) -> Result<()> {
        // What the interrupted run wrote after its checkpoint is told again: readers drop it at this mark.
        let Some(done) = info.resumed_from else { return Ok(()) };
        self.event(Some(done + 1), |event| {
            let mut log = Vec::new();
            key(&mut log, 1, Wire::Varint);
            varint(&mut log, 1);
            bytes(event, 7, &log);
        })
    }

    fn step(&mut self, record: &StepRecord) -> Result<()> {
        let mut values: Vec<(String, f64)> = vec![
            ("train/loss".into(), record.loss),
            ("train/total".into(), record.total),
            ("train/lr".into(), record.lr),
            ("train/grad_norm".into(), record.grad_norm),
            ("train/tokens_per_second".into(), record.tokens_per_second),
            ("train/tokens".into(), record.tokens as f64),
        ];
        values.extend(record.losses.iter().map(|(name, value)| (format!("losses/{name}"), *value)));
        for layer in &record.layers {
            let l = layer.layer;
            values.push((format!("load_cv/layer_{l}"), layer.load_cv));
            values.push((format!("entropy/layer_{l}"), layer.entropy));
            values.push((format!("dead_experts/layer_{l}"), layer.dead as f64));
            values.push((format!("drops/layer_{l}"), layer.drops as f64));
        }
        self.scalars(record.step, &values)
    }

    fn evaluated(&mut self, record: &EvalRecord) -> Result<()> {
        let mut values: Vec<(String, f64)> =
            vec![("eval/loss".into(), record.eval_loss), ("eval/bits_per_byte".into(), record.bits_per_byte)];
        values.extend(
            record
                .domains
                .iter()
                .map(|(name, domain)| (format!("bits_per_byte/{name}"), domain.bits_per_byte)),
        );
        self.scalars(record.step, &values)
    }
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

/// The checksum of TFRecords: a CRC of data that holds CRCs is weak, so that they are stored changed.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// How a protobuf field is laid out.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn key(out: &mut Vec<u8>, field: u64, wire: Wire) {
    varint(out, field << 3 | wire as u64);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes(out: &mut Vec<u8>, field: u64, data: &[u8]) {
    key(out, field, Wire::Bytes);
    varint(out, data.len() as u64);
    out.extend(data);
}

fn string(out: &mut Vec<u8>, field: u64, text: &str) {
    bytes(out, field, text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::{DomainEval, LayerStats};
    use crate::schedule::Limits;

    /// The records of a file, their checksums verified.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let word = |b: &[u8]| u32::from_le_bytes(b[..4].try_into().unwrap());
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            assert_eq!(word(&file[8..]), masked_crc(&file[..8]));
            assert_eq!(word(&file[12 + length..]), masked_crc(&file[12..12 + length]));
            all.push(file[12..12 + length].to_vec());
            file = &file[16 + length..];
        }
        all
    }

    fn event_files(folder: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn the_checksum_is_that_of_tfrecords() {
        // CRC-32C of "123456789" is E3069283.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xE306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    /// The bytes of one scalar, as TensorBoard's own writer makes them.
    #[test]
    fn one_scalar_to_the_byte() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path()).unwrap();
        board.now = || 1.5;
        board.scalars(300, &[("a/b".into(), 0.25)]).unwrap();
        let file = fs::read(&event_files(dir.path())[0]).unwrap();
        let found = records(&file);
        assert_eq!(&found[0][9..], b"\x1a\x0dbrain.Event:2");
        assert_eq!(
            found[1],
            [
                &[0x09, 0, 0, 0, 0, 0, 0, 0xf8, 0x3f][..], // wall_time = 1.5
                &[0x10, 0xac, 0x02],                       // step = 300
                &[0x2a, 12, 0x0a, 10],                     // summary { value {
                &[0x0a, 3, b'a', b'/', b'b'],              // tag
                &[0x15, 0, 0, 0x80, 0x3e],                 // simple_value = 0.25
            ]
            .concat()
        );
    }

    fn info(resumed_from: Option<u64>) -> RunInfo {
        RunInfo {
            parameters: 1,
            active_parameters: 1,
            training_tokens: None,
            tokens_per_step: 1,
            limits: Limits::default(),
            resumed_from,
            seconds_before: 0.0,
            threads: 1,
        }
    }

    /// With `SENMON_TENSORBOARD_SAMPLE=DIR` the files are left there, for TensorBoard itself to read.
    #[test]
    fn a_resumed_run_has_a_later_file_with_a_mark() {
        let dir = match std::env::var_os("SENMON_TENSORBOARD_SAMPLE") {
            Some(path) => PathBuf::from(path),
            None => tempfile::tempdir().unwrap().keep(),
        };
        let step = |step: u64| StepRecord {
            step,
            tokens: 10 * step,
            loss: 1.0 / step as f64,
            losses: [("aux".to_owned(), 1.0)].into(),
            layers: vec![LayerStats::from_counts(1, &[1, 3], 0)],
            ..StepRecord::default()
        };
        let mut board = TensorBoard::create(&dir).unwrap();
        board.started(&info(None)).unwrap();
        for s in 1..6 {
            board.step(&step(s)).unwrap();
        }
        let mut board = TensorBoard::create(&dir).unwrap();
        board.started(&info(Some(3))).unwrap();
        for s in 4..8 {
            board.step(&step(s)).unwrap();
        }
        let domains = [("rs".to_owned(), DomainEval { bits_per_byte: 2.5, ..DomainEval::default() })].into();
        board.evaluated(&EvalRecord { step: 7, eval_loss: 2.0, domains, ..EvalRecord::default() }).unwrap();
        let files = event_files(&dir);
        assert_eq!(files.len(), 2);
        let second = records(&fs::read(&files[1]).unwrap());
        assert_eq!(second.len(), 7);
        // step = 4, session_log { status: START }
        assert_eq!(second[1][9..], [0x10, 4, 0x3a, 2, 0x08, 1]);
        if std::env::var_os("SENMON_TENSORBOARD_SAMPLE").is_none() {
            fs::remove_dir_all(dir).unwrap();
        }
    }
}
