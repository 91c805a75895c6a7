//! Checkpoints that transformers wrote (`tests/golden`, made by `tools/parity`): each loads with every tensor used, computes
//! the logits that transformers computes, and is saved again as the same tensors.

#![allow(clippy::unwrap_used)]

mod common;

use common::golden::{BOUND, Golden, follows, off, tensors};
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::families::FAMILIES;
use senmon_models::params::param_defs;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_moe::RouterConfig;
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

/// The families of the golden folders that are decoders.
fn decoders() -> Vec<PathBuf> {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    folders()
        .into_iter()
        .filter(|path| !["t5-", "switch_"].iter().any(|two| name(path).starts_with(two)))
        .collect()
}

/// Calls `check` for each folder; fails with all that it says.
fn for_each(check: impl Fn(&Path) -> Result<(), String>) {
    let failed: Vec<String> = decoders()
        .iter()
        .filter_map(|folder| {
            let name = folder.file_name().unwrap().to_str().unwrap();
            check(folder).err().map(|what| format!("{name}: {what}"))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn what_transformers_wrote_loads_whole_and_is_written_the_same() {
    for_each(|folder| {
        let loaded = checkpoint::load(folder).map_err(|e| e.to_string())?;
        if !loaded.unused.is_empty() {
            return Err(format!("{:?}", loaded.unused));
        }
        let again = tempfile::tempdir().unwrap();
        let slices: Vec<&[f32]> = loaded.params.iter().map(Vec::as_slice).collect();
        let family = checkpoint::save(again.path(), &loaded.spec, &slices, loaded.family.name);
        if family.map_err(|e| e.to_string())?.name != loaded.family.name {
            return Err("another family".into());
        }
        let back = checkpoint::load(again.path()).map_err(|e| e.to_string())?;
        if back.params != loaded.params {
            return Err("other values came back".into());
        }
        if back.spec != loaded.spec {
            return Err(format!("{:?} came back as {:?}", loaded.spec, back.spec));
        }
        // Packed experts are written as plain ones.
        let (ours, theirs) = (again.path().join(FILE), folder.join(FILE));
        if !folder.ends_with("gpt_oss-mxfp4") && tensors(&ours) != tensors(&theirs) {
            return Err("other tensors were written".into());
        }
        Ok(())
    });
    let families: BTreeSet<&str> =
        decoders().iter().map(|folder| checkpoint::load_spec(folder).unwrap().1.name).collect();
    let all: BTreeSet<&str> =
        FAMILIES.iter().map(|family| family.name).filter(|name| *name != "senmon").collect();
    assert_eq!(families, all);
}

const FILE: &str = "model.safetensors";

/// How far the logits of a model are from those of the folder's golden file, as a part of the largest.
fn distance(folder: &Path, spec: &ModelSpec, params: Vec<Vec<f32>>) -> f32 {
    let golden = Golden::of(folder);
    let decoder = Decoder::new(spec, params, false).unwrap();
    let tokens = golden.ids("tokens");
    let mut cache = decoder.cache(tokens.len()).unwrap();
    let logits = decoder.logits(&tokens, &mut cache, false, &mut Pass::default()).unwrap();
    off(&logits, &golden.numbers("logits"))
}

#[test]
fn logits_routing_and_greedy_tokens_are_those_of_transformers() {
    for_each(|folder| follows(folder, &Golden::of(folder), true));
}

#[test]
fn a_mutated_model_does_not_pass() {
    let mut models = 0;
    for folder in decoders() {
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
        // Normalised weights where they are not, and the other way; another factor on them.
        let routed = |change: &dyn Fn(&mut RouterConfig)| {
            let mut other = spec.clone();
            for layer in &mut other.layers {
                if let FfnSpec::Moe(moe) = layer {
                    change(&mut moe.router);
                }
            }
            distance(&folder, &other, loaded.params.clone())
        };
        let off = routed(&|router| match router.kind.as_str() {
            "topk_post" | "sparsemixer" => {
                router.normalize = false;
                router.kind = "topk_pre".into();
            }
            _ => router.normalize = !router.normalize,
        });
        assert!(off > BOUND, "{}: normalisation, {off}", folder.display());
        if moe.router.scale != 1.0 {
            let off = routed(&|router| router.scale = 1.0);
            assert!(off > BOUND, "{}: scaling, {off}", folder.display());
        }
        // Each kind of bias ignored.
        let mut biases: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (param, def) in defs.iter().enumerate().filter(|(_, def)| def.name.ends_with("bias")) {
            biases.entry(def.name.rsplit('.').next().unwrap()).or_default().push(param);
        }
        for (name, params) in biases {
            let mut without = loaded.params.clone();
            params.iter().for_each(|param| without[*param].fill(0.0));
            let off = distance(&folder, spec, without);
            assert!(off > BOUND, "{}: {name} ignored, {off}", folder.display());
        }
    }
    assert!(models > 5, "{models}");
}

/// The rows of the table of families in README.md: name, and the difference that it tells.
fn readme() -> BTreeMap<String, f32> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
    let table = text.split("## Families").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = table.lines().filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let name = cells.first()?.strip_prefix('`')?.strip_suffix('`')?;
        Some((name.to_owned(), cells.last()?.parse().unwrap()))
    });
    rows.collect()
}

#[test]
fn the_table_of_families_is_true() {
    let told = readme();
    let mut found: BTreeMap<&str, f32> = BTreeMap::new();
    for folder in decoders() {
        let loaded = checkpoint::load(&folder).unwrap();
        let worst = found.entry(loaded.family.name).or_default();
        *worst = worst.max(distance(&folder, &loaded.spec, loaded.params));
    }
    for (family, worst) in &found {
        println!("| `{family}` | {worst:.1e} |");
        // Last bits differ between instruction sets.
        assert!(
            told.get(*family).is_some_and(|told| *worst < told * 4.0),
            "{family}: {worst:.1e}, README {told:?}"
        );
    }
    let all: BTreeSet<String> =
        found.keys().chain(senmon_models::seq2seq::FAMILIES).map(|name| (*name).to_owned()).collect();
    assert_eq!(all, told.into_keys().collect());
}

/// The tensors of a folder written anew in another folder: type, shape and bytes of each by `change`, which may add some.
fn rewritten(
    folder: &Path,
    change: impl Fn(&str, &[usize], &[f32]) -> Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(folder.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut all = Vec::new();
    for (name, (shape, bytes)) in tensors(&folder.join(FILE)) {
        let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        all.extend(change(&name, &shape, &values));
    }
    let views = all.iter().map(|(name, ty, shape, bytes)| {
        (name.clone(), safetensors::tensor::TensorView::new(*ty, shape.clone(), bytes).unwrap())
    });
    fs::write(dir.path().join(FILE), safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

/// The logits of a folder's golden tokens from weights in its files, and from the same weights loaded.
fn both_ways(dir: &Path, tokens: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let opened = checkpoint::open(dir, Audit::Full).unwrap();
    let loaded = checkpoint::load(dir).unwrap();
    let run = |decoder: Decoder| {
        let mut cache = decoder.cache(tokens.len()).unwrap();
        decoder.logits(tokens, &mut cache, false, &mut Pass::default()).unwrap()
    };
    let stored = run(Decoder::run(&opened.spec, opened.weights).unwrap());
    (stored, run(Decoder::new(&loaded.spec, loaded.params, false).unwrap()))
}

#[test]
fn halves_run_from_their_files_as_they_are_loaded() {
    use safetensors::Dtype::{BF16, F16};
    for_each(|folder| {
        if folder.ends_with("gpt_oss-mxfp4") {
            return Ok(());
        }
        let golden = Golden::of(folder);
        for ty in [BF16, F16] {
            let dir = rewritten(folder, |name, shape, values| {
                let bytes = values.iter().flat_map(|x| match ty {
                    BF16 => half::bf16::from_f32(*x).to_le_bytes(),
                    _ => half::f16::from_f32(*x).to_le_bytes(),
                });
                vec![(name.to_owned(), ty, shape.to_vec(), bytes.collect())]
            });
            let (stored, loaded) = both_ways(dir.path(), &golden.ids("tokens"));
            if stored != loaded {
                return Err(format!("{ty:?}: {:.1e} off", off(&stored, &loaded)));
            }
        }
        Ok(())
    });
}

/// As DeepSeek publishes: matrices of layers in E4M3 with a factor for each 128 × 128, here a few rows and columns of one.
#[test]
fn floats_of_eight_bits_mean_what_their_factors_say() {
    use safetensors::Dtype::{BF16, F8_E4M3, F32};
    let golden = |case: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    let folder = golden("deepseek_v3-groups-yarn");
    let tokens = Golden::of(&folder).ids("tokens");
    let packed =
        |name: &str, shape: &[usize]| shape.len() == 2 && name.contains("proj") && name.ends_with("weight");
    // The nearest of all 127 finite magnitudes.
    let magnitudes: Vec<f32> = (0..127).map(senmon_kernels::blocks::fp8_e4m3_to_f32).collect();
    let nearest = |x: f32| {
        let far = |i: &usize| (magnitudes[*i] - x.abs()).abs();
        (0..127).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap() as u8 | if x < 0.0 { 0x80 } else { 0 }
    };
    let factor = 1.0 / 512.0f32;
    let write = |decoded: bool| {
        rewritten(&folder, |name, shape, values| {
            if !packed(name, shape) {
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                return vec![(name.to_owned(), F32, shape.to_vec(), bytes)];
            }
            let codes: Vec<u8> = values.iter().map(|x| nearest(x / factor)).collect();
            if decoded {
                let value = |code: &u8| senmon_kernels::blocks::fp8_e4m3_to_f32(*code) * factor;
                let bytes = codes.iter().flat_map(|code| value(code).to_le_bytes()).collect();
                return vec![(name.to_owned(), F32, shape.to_vec(), bytes)];
            }
            let blocks = vec![shape[0].div_ceil(128), shape[1].div_ceil(128)];
            let factors =
                vec![factor; blocks.iter().product()].iter().flat_map(|x| x.to_le_bytes()).collect();
            vec![
                (name.to_owned(), F8_E4M3, shape.to_vec(), codes),
                (format!("{name}_scale_inv"), F32, blocks, factors),
            ]
        })
    };
    let (eight, plain) = (write(false), write(true));
    let (stored, loaded) = both_ways(eight.path(), &tokens);
    assert_eq!(stored, loaded);
    assert_eq!(stored, both_ways(plain.path(), &tokens).0);
    assert!(off(&stored, &Golden::of(&folder).numbers("logits")) > 1e-4, "eight bits are not 32");
    // Without its factors, or with factors of another type, a tensor means nothing.
    let refused = |without: bool| {
        let dir = rewritten(&folder, |name, shape, values| {
            let plain = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            if !name.ends_with("kv_b_proj.weight") {
                return vec![(name.to_owned(), F32, shape.to_vec(), plain)];
            }
            let mut all = vec![(name.to_owned(), F8_E4M3, shape.to_vec(), vec![0x38; values.len()])];
            if !without {
                all.push((format!("{name}_scale_inv"), BF16, vec![1, 1], vec![0x80, 0x3f]));
            }
            all
        });
        checkpoint::open(dir.path(), Audit::Full).map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(true).contains("kv_b_proj.weight_scale_inv"), "{}", refused(true));
    assert!(refused(false).contains("BF16"), "{}", refused(false));
}
