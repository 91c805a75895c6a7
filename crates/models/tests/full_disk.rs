//! A disk that is full: one clear line, and nothing half-written.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use senmon_models::checkpoint;
use senmon_models::families::{Json, family};
use senmon_models::params::initial_values;
use serde_json::json;
use std::path::Path;
use std::process::Command;

/// The folder that the test below, started again with a limit on the size of files, writes into.
const FOLDER: &str = "SENMON_TEST_FULL_DISK";

#[test]
fn nothing_is_left_of_a_model_that_did_not_fit() {
    let config = json!({
        "vocab_size": 3000, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    });
    let json = Json::new(Path::new("config.json"), config).unwrap();
    let spec = (family("llama").unwrap().read)(&json).unwrap();
    let save = |folder: &Path, seed| {
        let values = initial_values(&spec, seed);
        let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        checkpoint::save(folder, &spec, &slices, "auto")
    };
    if let Some(folder) = std::env::var_os(FOLDER) {
        let error = save(Path::new(&folder), 2).unwrap_err();
        assert!(error.is_users_mistake());
        println!("said: {error}");
        return;
    }
    for before in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        if before {
            save(folder.path(), 1).unwrap();
        }
        let files = || {
            let entries = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
            let mut files: Vec<_> =
                entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
            files.sort();
            files
        };
        let there = files();
        // A limit of 64 KiB (in blocks of 512 or 1024 bytes: dash and bash differ) stands for the full disk: beyond it
        // writes fail as they do there, once the signal that comes first is ignored.
        let output = Command::new("sh")
            .args(["-c", "trap '' XFSZ && ulimit -f 64 && exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "nothing_is_left_of_a_model_that_did_not_fit", "--nocapture"])
            .env(FOLDER, folder.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let said = text.lines().find(|line| line.contains("said: ")).unwrap();
        assert!(said.contains("cannot write") && said.contains("model.safetensors"), "{said}");
        assert!(files() == there, "{before}: {:?}", files().iter().map(|(path, _)| path).collect::<Vec<_>>());
        if before {
            checkpoint::load(folder.path()).unwrap();
        }
    }
}
