//! What the targets that read models share.

// Each target uses a part.
#![allow(dead_code)]

use senmon_models::ModelError;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The folders of the golden models whose names begin so, by name.
pub fn golden(begin: &[&str]) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/models/tests/golden");
    let folders = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        path.is_dir() && begin.iter().any(|begin| name.starts_with(begin))
    };
    let mut folders: Vec<PathBuf> = folders.filter(named).collect();
    folders.sort();
    assert!(!folders.is_empty(), "no golden models {begin:?}");
    folders
}

/// Copies of folders below `place`, of these files alone.
pub fn copies(place: &Path, folders: &[PathBuf], names: &[&str]) -> Vec<PathBuf> {
    let copy = |folder: &PathBuf| {
        let copy = place.join(folder.file_name().unwrap());
        std::fs::create_dir(&copy).unwrap();
        for name in names {
            std::fs::copy(folder.join(name), copy.join(name)).unwrap();
        }
        copy
    };
    folders.iter().map(copy).collect()
}

/// A JSON file of each of the folders that has it.
pub fn documents(folders: &[PathBuf], name: &str) -> Vec<Value> {
    let read = |folder: &PathBuf| std::fs::read(folder.join(name)).ok();
    folders.iter().filter_map(read).map(|text| serde_json::from_slice(&text).unwrap()).collect()
}

/// An error without its numbers, paths and most of its names; it must be the user's, and one line.
pub fn word(error: &ModelError) -> String {
    let text = error.to_string();
    assert!(error.is_users_mistake(), "{text}");
    assert!(!text.is_empty() && text.lines().count() == 1 && text.len() < 20_000, "{text:?}");
    let what = [".json: ", ".safetensors: ", ".gguf: "].iter().find_map(|end| Some(text.rsplit_once(end)?.1));
    let what = what.unwrap_or(&text);
    what.chars().filter(|c| c.is_ascii_alphabetic() || " _".contains(*c)).take(28).collect()
}

/// The same of a result; what is good is `ok`.
pub fn outcome<T>(result: &senmon_models::Result<T>, ok: &str) -> String {
    result.as_ref().err().map_or_else(|| ok.to_owned(), word)
}
