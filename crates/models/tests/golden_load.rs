//! Checkpoints that transformers wrote (`tests/golden`, made by `tools/parity`): each loads with every tensor used, computes
//! the logits that transformers computes, and is saved again as the same tensors.

#![allow(clippy::unwrap_used)]

use safetensors::SafeTensors;
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::{Cache, Decoder, Pass};
use senmon_models::families::FAMILIES;
use senmon_models::params::param_defs;
use senmon_models::rope::RopeScaling;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_moe::{RouterConfig, Routing, RoutingObserver};
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

/// What the golden file of a folder holds.
struct Golden {
    tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Golden {
    fn of(folder: &Path) -> Self {
        Self { tensors: tensors(&folder.join("golden.safetensors")) }
    }

    fn words(&self, name: &str) -> impl Iterator<Item = [u8; 4]> {
        self.tensors[name].1.as_chunks::<4>().0.to_vec().into_iter()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.words(name).map(u32::from_le_bytes).collect()
    }

    fn numbers(&self, name: &str) -> Vec<f32> {
        self.words(name).map(f32::from_le_bytes).collect()
    }
}

/// How far the logits of a model are from those of the folder's golden file, as a part of the largest.
fn distance(folder: &Path, spec: &ModelSpec, params: Vec<Vec<f32>>) -> f32 {
    let golden = Golden::of(folder);
    let decoder = Decoder::new(spec, params, false).unwrap();
    let tokens = golden.ids("tokens");
    let mut cache = decoder.cache(tokens.len()).unwrap();
    let logits = decoder.logits(&tokens, &mut cache, false, &mut Pass::default()).unwrap();
    off(&logits, &golden.numbers("logits"))
}

/// The largest difference, as a part of the largest expected.
fn off(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()));
    let greatest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |a, b| a.max(b.abs()));
    let off = greatest(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    off / greatest(&mut expected.iter().copied())
}

const BOUND: f32 = 1e-4;

/// The routing of every layer: for each token, experts and weights.
#[derive(Default)]
struct Seen(BTreeMap<usize, Vec<Vec<(u32, f32)>>>);

impl RoutingObserver for Seen {
    fn routed(&mut self, layer: usize, routing: &Routing) {
        let weights: Vec<f32> = routing.weights.flatten_all().unwrap().to_vec1().unwrap();
        for (experts, weights) in routing.experts.chunks(routing.top_k).zip(weights.chunks(routing.top_k)) {
            let slots = experts.iter().copied().zip(weights.iter().copied());
            self.0.entry(layer).or_default().push(slots.collect());
        }
    }
}

#[test]
fn logits_routing_and_greedy_tokens_are_those_of_transformers() {
    for_each(|folder| {
        let golden = Golden::of(folder);
        let loaded = checkpoint::load(folder).map_err(|e| e.to_string())?;
        let decoder = Decoder::new(&loaded.spec, loaded.params, false).map_err(|e| e.to_string())?;
        let tokens = golden.ids("tokens");
        let mut seen = Seen::default();
        let run = |tokens: &[u32], cache: &mut Cache, seen: Option<&mut dyn RoutingObserver>| {
            decoder.logits(tokens, cache, false, &mut Pass { observer: seen, ..Pass::default() }).unwrap()
        };
        let whole = run(&tokens, &mut decoder.cache(tokens.len()).unwrap(), Some(&mut seen));
        let far = off(&whole, &golden.numbers("logits"));
        println!("{}: {far:.1e} of the largest", folder.file_name().unwrap().display());
        if far > BOUND {
            return Err(format!("logits are {far:.1e} off"));
        }
        for (layer, rows) in &seen.0 {
            let (experts, weights) = (format!("experts.{layer}"), format!("weights.{layer}"));
            let k = golden.tensors[&experts].0[1];
            let (experts, weights) = (golden.ids(&experts), golden.numbers(&weights));
            for (t, row) in rows.iter().enumerate() {
                let wanted: Vec<_> =
                    experts[t * k..][..k].iter().copied().zip(weights[t * k..].iter().copied()).collect();
                let there = |(expert, weight): &(u32, f32)| {
                    row.iter().any(|(e, w)| e == expert && (w - weight).abs() <= 1e-5)
                };
                if row.len() != k || !wanted.iter().all(there) {
                    return Err(format!("layer {layer}, token {t}: {row:?}, not {wanted:?}"));
                }
            }
        }
        let layers = golden.tensors.keys().filter(|name| name.starts_with("experts.")).count();
        if layers != seen.0.len() {
            return Err(format!("{} layers routed, not {layers}", seen.0.len()));
        }
        // The same bits from matrices that stay in the file, and token by token; then the tokens that follow.
        let opened = checkpoint::open(folder, Audit::Full).map_err(|e| e.to_string())?;
        let decoder = Decoder::run(&opened.spec, opened.weights).map_err(|e| e.to_string())?;
        let greedy = golden.ids("greedy");
        let growing = matches!(
            opened.spec.attention.rope.scaling,
            RopeScaling::Dynamic { original, .. } if tokens.len() + greedy.len() > original
        );
        let mut cache = decoder.cache(tokens.len()).unwrap();
        let mut steps = Vec::new();
        for token in &tokens {
            steps.extend(decoder.logits(&[*token], &mut cache, false, &mut Pass::default()).unwrap());
        }
        if steps != whole {
            return Err(format!("token by token, from the file: {:.1e} off", off(&steps, &whole)));
        }
        let (mut text, mut last) = (tokens.clone(), whole[(tokens.len() - 1) * opened.spec.vocab..].to_vec());
        let most = opened.spec.max_positions;
        let mut cache = decoder.cache((tokens.len() + greedy.len()).min(most)).unwrap();
        decoder.logits(&tokens, &mut cache, true, &mut Pass::default()).unwrap();
        for (n, want) in greedy.iter().enumerate() {
            let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap() as u32;
            if best != *want {
                return Err(format!("token {n} of the continuation is {best}, not {want}"));
            }
            text.push(best);
            if text.len() > most {
                break;
            }
            last = if growing {
                // Speeds follow the length of the text: the oracle computed it anew for each token.
                let mut cache = decoder.cache(text.len()).unwrap();
                decoder.logits(&text, &mut cache, true, &mut Pass::default()).unwrap()
            } else {
                decoder.logits(&[best], &mut cache, true, &mut Pass::default()).unwrap()
            };
        }
        Ok(())
    });
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
