//! What the tests of golden checkpoints share: the folders, and the tensors of their files.

// Each test file uses a part.
#![allow(dead_code)]

use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// All golden folders.
pub fn folders() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.join("config.json").is_file()).collect();
    folders.sort();
    folders
}

/// The tensors of a safetensors file: shapes and bytes by name.
pub fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// The families of the golden folders that are decoders.
pub fn decoders() -> Vec<PathBuf> {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    folders()
        .into_iter()
        .filter(|path| !["t5-", "switch_"].iter().any(|two| name(path).starts_with(two)))
        .collect()
}

/// Calls `check` for each folder; fails with all that it says.
pub fn for_each(check: impl Fn(&Path) -> Result<(), String>) {
    let failed: Vec<String> = decoders()
        .iter()
        .filter_map(|folder| {
            let name = folder.file_name().unwrap().to_str().unwrap();
            check(folder).err().map(|what| format!("{name}: {what}"))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// What the golden file of a folder holds.
pub struct Golden {
    /// Shapes and bytes by name.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Golden {
    /// That of a folder.
    pub fn of(folder: &Path) -> Self {
        Self { tensors: tensors(&folder.join("golden.safetensors")) }
    }

    fn words(&self, name: &str) -> impl Iterator<Item = [u8; 4]> {
        self.tensors[name].1.as_chunks::<4>().0.to_vec().into_iter()
    }

    /// A tensor of ids.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.words(name).map(u32::from_le_bytes).collect()
    }

    /// A tensor of numbers.
    pub fn numbers(&self, name: &str) -> Vec<f32> {
        self.words(name).map(f32::from_le_bytes).collect()
    }
}
