//! GGUF: every golden checkpoint whose family has an architecture is converted and comes back, computes what it computed, and is
//! told apart from what it is not.

#![allow(clippy::unwrap_used)]

mod common;

use common::golden::{Golden, follows, off, tensors as plain};
use safetensors::SafeTensors;
use senmon_models::audit::Audit;
use senmon_models::checkpoint::{self, Layout};
use senmon_models::convert::{Types, convert};
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::gguf::arch::{ARCHS, RopeOrder, Special};
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

/// The golden GGUF files, each with what transformers computes with its values: written by the package `gguf` for Python.
fn files() -> Vec<(PathBuf, Golden)> {
    let entries = fs::read_dir(golden("gguf")).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    names.sort();
    let file = |name: &Path| {
        let whole = name.with_extension("gguf");
        let stem = name.file_stem().unwrap().to_str().unwrap();
        if whole.is_file() { whole } else { name.with_file_name(format!("{stem}-00001-of-00002.gguf")) }
    };
    names.iter().map(|name| (file(name), Golden { tensors: plain(name) })).collect()
}

#[test]
fn what_the_gguf_package_wrote_computes_what_transformers_computes() {
    let (mut archs, mut failed) = (BTreeSet::new(), Vec::new());
    for (file, golden) in files() {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        let opened = checkpoint::open(&file, Audit::Full).unwrap_or_else(|e| panic!("{e}"));
        let Layout::Gguf(arch) = opened.layout else { panic!("{name}: {:?}", opened.layout) };
        archs.insert(arch.name);
        // The rows of queries and keys are turned where values are loaded, and stay where they are run from the file.
        let turned = arch.rope != RopeOrder::Turned;
        if let Err(what) = follows(&file, &golden, turned) {
            failed.push(format!("{name}: {what}"));
        }
        // Matrices stay in the file, but what is wanted in another order.
        let memory = opened.memory;
        assert!(memory.mapped > memory.held || arch.special == Special::Latent, "{name}: {memory:?}");
        // Into a folder and back: the same bits of what stays in its type.
        let dir = tempfile::tempdir().unwrap();
        let (folder, again) = (dir.path().join("folder"), dir.path().join("again.gguf"));
        keep(&file, &folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        if let Err(what) = follows(&folder, &golden, true) {
            failed.push(format!("{name}, as a folder: {what}"));
        }
        keep(&file, &again).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (one, two) = (checkpoint::load(&file).unwrap(), checkpoint::load(&again).unwrap());
        assert!(one.params == two.params && one.spec == two.spec, "{name}");
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let all: BTreeSet<&str> = ARCHS.iter().map(|arch| arch.name).collect();
    assert_eq!(archs, all);
}

#[test]
fn every_family_that_gguf_has_comes_back_as_it_was() {
    let mut refused = BTreeMap::new();
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
    // What is refused is refused by the field that no word is there for.
    for (name, field) in [
        ("granitemoe-multipliers-dynamic", "type dynamic"),
        ("gpt_oss-sinks-window-yarn", "clamped.limit"),
        ("dots1-groups", "kv_heads = 2"),
        ("qwen3_moe-raw-dense-first", "normalize"),
        ("flex_olmo-normalised-tied-head-dim-yarn", "qk_norm"),
    ] {
        assert!(
            refused.get(name).is_some_and(|what| what.contains(field)),
            "{name}: {:?}",
            refused.get(name)
        );
    }
    assert!(refused.len() < folders().len() * 3 / 4, "{refused:#?}");
}
