//! Checkpoints that transformers wrote (`tests/golden`, made by `tools/parity`): each loads with every tensor used, computes
//! the logits that transformers computes, and is saved again as the same tensors.

#![allow(clippy::unwrap_used)]

use safetensors::SafeTensors;
use senmon_models::checkpoint;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::params::param_defs;
use senmon_models::spec::{FfnSpec, ModelSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn folders() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.join("config.json").is_file()).collect();
    folders.sort();
    folders
}

/// The tensors of a safetensors file: shapes and bytes by name.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

#[test]
fn what_transformers_wrote_loads_whole_and_is_written_the_same() {
    let mut families = BTreeSet::new();
    for folder in folders() {
        let loaded = checkpoint::load(&folder).unwrap();
        assert!(loaded.unused.is_empty(), "{}: {:?}", folder.display(), loaded.unused);
        families.insert(loaded.family.name);
        let again = tempfile::tempdir().unwrap();
        let slices: Vec<&[f32]> = loaded.params.iter().map(Vec::as_slice).collect();
        let family = checkpoint::save(again.path(), &loaded.spec, &slices, loaded.family.name).unwrap();
        assert_eq!(family.name, loaded.family.name);
        let file = "model.safetensors";
        assert!(tensors(&again.path().join(file)) == tensors(&folder.join(file)), "{}", folder.display());
        assert_eq!(checkpoint::load(again.path()).unwrap().spec, loaded.spec, "{}", folder.display());
    }
    assert_eq!(families, BTreeSet::from(["dots1", "llama", "mixtral", "olmoe", "qwen3", "qwen3_moe"]));
}

/// How far the logits of a model are from those of the folder's golden file, as a part of the largest.
fn distance(folder: &Path, spec: &ModelSpec, params: Vec<Vec<f32>>) -> f32 {
    let golden = tensors(&folder.join("golden.safetensors"));
    let words = |name: &str| golden[name].1.as_chunks::<4>().0.to_vec();
    let tokens: Vec<u32> = words("tokens").into_iter().map(u32::from_le_bytes).collect();
    let expected: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
    let decoder = Decoder::new(spec, params, false).unwrap();
    let mut cache = decoder.cache(tokens.len()).unwrap();
    let logits = decoder.logits(&tokens, &mut cache, false, &mut Pass::default()).unwrap();
    assert_eq!(logits.len(), expected.len());
    assert!(logits.iter().all(|x| x.is_finite()));
    let greatest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |a, b| a.max(b.abs()));
    let off = greatest(&mut logits.iter().zip(&expected).map(|(a, b)| a - b));
    off / greatest(&mut expected.iter().copied())
}

const BOUND: f32 = 1e-4;

#[test]
fn logits_are_those_of_transformers() {
    for folder in folders() {
        let loaded = checkpoint::load(&folder).unwrap();
        let off = distance(&folder, &loaded.spec, loaded.params);
        println!("{}: {off:.1e} of the largest", folder.file_name().unwrap().display());
        assert!(off <= BOUND, "{}: {off}", folder.display());
    }
}

#[test]
fn a_mutated_model_does_not_pass() {
    let mut models = 0;
    for folder in folders() {
        let loaded = checkpoint::load(&folder).unwrap();
        let (spec, defs) = (&loaded.spec, param_defs(&loaded.spec));
        let Some(moe) = spec.first_moe() else { continue };
        models += 1;
        // Two experts exchanged.
        let mut swapped = loaded.params.clone();
        let param = defs.iter().position(|def| def.name.ends_with("experts.gate_up")).unwrap();
        let (first, second) = swapped[param].split_at_mut(defs[param].len() / moe.experts);
        let size = first.len();
        first.swap_with_slice(&mut second[..size]);
        let off = distance(&folder, spec, swapped);
        assert!(off > BOUND, "{}: experts exchanged, {off}", folder.display());
        // Gate and up exchanged, the expert's rows being gate rows, then up rows.
        let mut turned = loaded.params.clone();
        for expert in turned[param].chunks_mut(size) {
            let (gate, up) = expert.split_at_mut(size / 2);
            gate.swap_with_slice(up);
        }
        let off = distance(&folder, spec, turned);
        assert!(off > BOUND, "{}: gate and up exchanged, {off}", folder.display());
        // Normalised weights where they are not, and the other way.
        let mut other = spec.clone();
        for layer in &mut other.layers {
            if let FfnSpec::Moe(moe) = layer {
                let router = &mut moe.router;
                router.normalize = router.kind != "topk_post" && !router.normalize;
                if router.kind == "topk_post" {
                    router.kind = "topk_pre".into();
                }
            }
        }
        let off = distance(&folder, &other, loaded.params.clone());
        assert!(off > BOUND, "{}: normalisation, {off}", folder.display());
    }
    assert!(models > 5, "{models}");
}
