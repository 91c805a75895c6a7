//! What the tests of the binary share: a folder of their own with a little text, and a model so small that training it
//! takes a fraction of a second.

// Each test file uses a part.
#![allow(dead_code)]

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

/// What makes the model tiny.
pub const MODEL: &str = "--set model.layers=1 --set model.hidden=32 --set model.heads=2 --set experts.count=4 \
    --set experts.intermediate=16 --set data.vocab=300";
/// What makes a step tiny.
pub const BATCH: &str = "--set train.batch=2 --set train.sequence=32";
/// What a test wants of every command.
pub const CALM: &str = "--threads 1 --quiet";

/// A folder in which commands run, with text in `text` and a cache of its own; it goes with the value.
pub struct Place {
    dir: TempDir,
}

impl Place {
    /// A fresh folder with text.
    pub fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        place.write_corpus();
        place
    }

    /// A path in the folder; commands know it by `name` alone.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The binary with these arguments, separated by spaces.
    pub fn senmon(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_senmon"));
        command.args(arguments.split_whitespace()).current_dir(self.dir.path());
        command.env("SENMON_CACHE", self.path("cache")).env_remove("SENMON_SIMD");
        // No test asks a server that it has not started.
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("hf"));
        command
    }

    /// `train` of a tiny model for three steps, with these arguments before those that make it so.
    pub fn train(&self, arguments: &str) -> Command {
        self.senmon(&format!("train {arguments} {MODEL} {BATCH} --steps 3 {CALM}"))
    }

    /// About 230 kB in ten packages of two files, so that a package can be held out. Always the same.
    fn write_corpus(&self) {
        const WORDS: [&str; 40] = [
            "fn", "let", "mut", "struct", "impl", "pub", "return", "match", "else", "while", "for", "string",
            "result", "some", "none", "the", "of", "and", "router", "expert", "token", "gate", "value",
            "path", "error", "file", "every", "which", "between", "layer", "window", "number", "weight",
            "balance", "load", "reader", "place", "folder", "line", "answer",
        ];
        let mut state = 1u64;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for package in 0..10 {
            let folder = self.path(format!("text/package{package}-1.0.{package}"));
            fs::create_dir_all(folder.join("src")).unwrap();
            for name in ["README.md", "src/lib.rs"] {
                let mut text = String::new();
                for _ in 0..200 {
                    for _ in 0..9 {
                        text.push_str(WORDS[draw(WORDS.len())]);
                        text.push_str(["", "_", "s", "(", ");"][draw(5)]);
                        text.push(' ');
                    }
                    text.push('\n');
                }
                fs::write(folder.join(name), text).unwrap();
            }
        }
    }
}

/// Runs what must succeed.
pub fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}: {error}", output.status);
    output
}

/// What a command prints, which must be one JSON document and nothing else.
pub fn json(command: Command) -> Value {
    let output = done(command).stdout;
    serde_json::from_slice(&output).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output)))
}

/// A process that does not outlive the test, however that ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a command; with it the lines that it says on standard error, as they come.
pub fn running(mut command: Command) -> (Running, impl Iterator<Item = String>) {
    let mut run = Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let said = BufReader::new(run.0.stderr.take().unwrap());
    (run, said.lines().map(Result::unwrap))
}

/// What a command prints, and that it says nothing besides.
pub fn printed(command: Command) -> String {
    let output = done(command);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout).unwrap()
}

/// A number of a JSON document, by its path.
pub fn number(json: &Value, path: &str) -> f64 {
    let value = json.pointer(path).and_then(Value::as_f64);
    value.unwrap_or_else(|| panic!("no number {path} in {json:#}"))
}

/// A checkpoint that transformers wrote.
pub fn golden(place: &Place, name: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden").join(name);
    let to = place.path(name);
    fs::create_dir(&to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    to
}

/// Runs what must be refused: with 2, in one line that has these words, and nothing on standard output.
pub fn refused(mut command: Command, words: &[&str]) -> String {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, error) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{command:?} said: {error}{said}");
    let one_line = error.starts_with("error: ") && error.ends_with('\n') && error.lines().count() == 1;
    assert!(one_line, "{command:?} did not say one line: {error}");
    assert!(said.is_empty(), "{command:?} printed: {said}");
    for word in words {
        assert!(error.contains(word), "{command:?} does not say {word:?}: {error}");
    }
    error
}
