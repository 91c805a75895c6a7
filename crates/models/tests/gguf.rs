//! GGUF: every golden checkpoint whose family has an architecture is converted and comes back, computes what it computed, and is
//! told apart from what it is not.

#![allow(clippy::unwrap_used)]

use safetensors::SafeTensors;
use senmon_models::audit::Audit;
use senmon_models::checkpoint::{self, Layout};
use senmon_models::convert::{Types, convert};
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::gguf::arch::ARCHS;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The golden folders of decoders.
fn folders() -> Vec<PathBuf> {
    let entries = fs::read_dir(golden("")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries
        .filter(|path| path.join("config.json").is_file() && checkpoint::load_spec(path).is_ok())
        .collect();
    folders.sort();
    folders
}

/// The tensors of a folder: type, shape and bytes by name.
fn tensors(folder: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let one = |view: &safetensors::tensor::TensorView| {
        (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec())
    };
    file.iter().map(|(name, view)| (name.to_owned(), one(&view))).collect()
}

fn keep(from: &Path, to: &Path) -> senmon_models::Result<senmon_models::convert::Report> {
    convert(from, to, Types::Keep, "auto", Audit::Full, &|_, _| true)
}

/// The logits of a model's golden tokens, `most` of them.
fn logits(model: &Path, folder: &Path, most: usize) -> Vec<f32> {
    let bytes = fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = file.tensor("tokens").unwrap().data().as_chunks::<4>().0.to_vec();
    let tokens: Vec<u32> = words.into_iter().take(most).map(u32::from_le_bytes).collect();
    let opened = checkpoint::open(model, Audit::Full).unwrap();
    let decoder = Decoder::run(&opened.spec, opened.weights).unwrap();
    let mut cache = decoder.cache(tokens.len()).unwrap();
    decoder.logits(&tokens, &mut cache, false, &mut Pass::default()).unwrap()
}

/// The largest difference, as a part of the largest value.
fn off(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let greatest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |a, b| a.max(b.abs()));
    greatest(&mut a.iter().zip(b).map(|(a, b)| a - b)) / greatest(&mut a.iter().copied())
}

#[test]
fn every_family_that_gguf_has_comes_back_as_it_was() {
    let (mut archs, mut refused) = (BTreeSet::new(), BTreeMap::new());
    for folder in folders() {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let dir = tempfile::tempdir().unwrap();
        let (file, again) = (dir.path().join("m.gguf"), dir.path().join("again"));
        if let Err(e) = keep(&folder, &file) {
            assert!(e.is_users_mistake() && !file.exists(), "{name}: {e}");
            refused.insert(name, e.to_string());
            continue;
        }
        let opened = checkpoint::open(&file, Audit::Full).unwrap_or_else(|e| panic!("{name}: {e}"));
        let Layout::Gguf(arch) = opened.layout else { panic!("{name}: {:?}", opened.layout) };
        archs.insert(arch.name);
        // Where the architecture has no window, the context is no longer than the window was.
        let most = opened.spec.max_positions;
        let (ours, theirs) = (logits(&file, &folder, most), logits(&folder, &folder, most));
        let off = off(&ours, &theirs);
        assert!(off < 2e-6, "{name}: {off}");
        // And back: the same tensors in the same family, where the architecture keeps what the family says.
        keep(&file, &again).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (spec, family) = checkpoint::load_spec(&folder).unwrap();
        let (back, back_family) = checkpoint::load_spec(&again).unwrap();
        let (mut expected, mut found) = (tensors(&folder), tensors(&again));
        if spec.tie_embeddings && !back.tie_embeddings {
            assert!(arch.own_head, "{name}");
            assert_eq!(found.remove("lm_head.weight"), expected.get("model.embed_tokens.weight").cloned());
        }
        if family.name == back_family.name {
            expected.retain(|name, _| !name.ends_with("_scales"));
            for (name, tensor) in &mut expected {
                // Packed floats come back as floats.
                if name.ends_with("_blocks") {
                    *tensor = found[name.trim_end_matches("_blocks")].clone();
                }
            }
            let expected: BTreeMap<_, _> =
                expected.into_iter().map(|(n, t)| (n.trim_end_matches("_blocks").to_owned(), t)).collect();
            let names = |all: &BTreeMap<String, _>| all.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(&found), names(&expected), "{name}");
            for (tensor, value) in &expected {
                assert!(found[tensor] == *value, "{name}: {tensor}");
            }
        }
    }
    let all: BTreeSet<&str> = ARCHS.iter().map(|arch| arch.name).collect();
    assert_eq!(archs, all, "{refused:#?}");
    eprintln!("{refused:#?}");
}
