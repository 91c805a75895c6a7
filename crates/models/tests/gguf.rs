//! GGUF: every golden checkpoint whose family has an architecture is converted and comes back, computes what it computed, and is
//! told apart from what it is not.

#![allow(clippy::unwrap_used)]

mod golden_files;

use golden_files::{Golden, follows, off, tensors as plain};
use safetensors::SafeTensors;
use senmon_gguf::{ElementType, Gguf, Value, Writer};
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
        ("qwen3_moe-raw-dense-first", "layer 0 is dense"),
        ("qwen3_moe-sparse-step-tied-bias", "must be false"),
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

/// A golden file written anew: its keys and tensors (name, shape, type, bytes) changed.
type Tensor = (String, Vec<usize>, ElementType, Vec<u8>);
fn changed(
    name: &str,
    change: impl FnOnce(&mut Vec<(String, Value)>, &mut Vec<Tensor>),
) -> (tempfile::TempDir, PathBuf) {
    let bytes = fs::read(golden("gguf").join(format!("{name}.gguf"))).unwrap();
    let file = Gguf::read(&bytes).unwrap();
    let mut keys: Vec<_> =
        file.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
    let tensor = |t: &senmon_gguf::Tensor| {
        (t.name.clone(), t.shape.clone(), t.element_type, t.bytes(&bytes).unwrap().to_vec())
    };
    let mut tensors: Vec<Tensor> = file.tensors().iter().map(tensor).collect();
    change(&mut keys, &mut tensors);
    let mut writer = Writer::new();
    for (key, value) in keys {
        writer.set(&key, value).unwrap();
    }
    for (name, shape, ty, _) in &tensors {
        writer.tensor(name, shape, *ty).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut out = fs::File::create(&path).unwrap();
    let data = |info: &senmon_gguf::TensorInfo, out: &mut dyn std::io::Write| {
        out.write_all(&tensors.iter().find(|t| t.0 == info.name).unwrap().3)
    };
    writer.write(&mut out, data).unwrap();
    (dir, path)
}

fn at(tensors: &[Tensor], name: &str) -> usize {
    tensors.iter().position(|t| t.0 == name).unwrap()
}

#[test]
fn a_broken_file_is_refused_by_the_name_of_what_is_wrong() {
    let refused = |name: &str,
                   words: &[&str],
                   change: &dyn Fn(&mut Vec<(String, Value)>, &mut Vec<Tensor>)| {
        let (_dir, path) = changed(name, |keys, tensors| change(keys, tensors));
        let error = checkpoint::open(&path, Audit::Full).map(|_| words).unwrap_err();
        let text = error.to_string();
        assert!(error.is_users_mistake() && !text.contains('\n'), "{text}");
        assert!(text.contains("m.gguf") && words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    };
    let llama = "llama-mixtral-q8_0";
    let (_dir, path) = changed(llama, |_, _| {});
    assert!(checkpoint::open(&path, Audit::Full).is_ok());
    refused(llama, &["blk.1.ffn_up_exps.weight", "is missing"], &|_, tensors| {
        tensors.remove(at(tensors, "blk.1.ffn_up_exps.weight"));
    });
    refused(llama, &["blk.0.experts.1", "expert 0"], &|_, tensors| {
        for part in ["gate", "up", "down"] {
            let tensor = at(tensors, &format!("blk.0.ffn_{part}_exps.weight"));
            let bytes = &mut tensors[tensor].3;
            let size = bytes.len() / 4;
            bytes.copy_within(..size, size);
        }
    });
    refused(llama, &["blk.0.ffn_down_exps.weight", "transposed"], &|_, tensors| {
        let tensor = at(tensors, "blk.0.ffn_down_exps.weight");
        tensors[tensor].1.reverse();
        // Rows must be whole blocks: as floats.
        let count = tensors[tensor].1.iter().product::<usize>();
        (tensors[tensor].2, tensors[tensor].3) = (ElementType::F32, vec![0; 4 * count]);
    });
    refused(llama, &["blk.0.attn_q.weight", "element 7 is NaN"], &|_, tensors| {
        let tensor = at(tensors, "blk.0.attn_q.weight");
        let mut bytes = vec![0; 4 * 32 * 32];
        bytes[28..32].copy_from_slice(&f32::NAN.to_le_bytes());
        (tensors[tensor].2, tensors[tensor].3) = (ElementType::F32, bytes);
    });
    refused(llama, &["blk.0.attn_q.weight", "is inf"], &|_, tensors| {
        // A scale of a block.
        let tensor = at(tensors, "blk.0.attn_q.weight");
        tensors[tensor].3[..2].copy_from_slice(&0x7c00u16.to_le_bytes());
    });
    refused(llama, &["blk.0.ffn_extra.weight", "not part"], &|_, tensors| {
        tensors.push(("blk.0.ffn_extra.weight".into(), vec![4], ElementType::F32, vec![0; 16]));
    });
    let set = |key: &'static str, value: Value| {
        move |keys: &mut Vec<(String, Value)>, _: &mut Vec<Tensor>| {
            keys.iter_mut().find(|(name, _)| name == key).unwrap().1 = value.clone();
        }
    };
    let lies = |words: &[&str], key: &'static str, value: Value| refused(llama, words, &set(key, value));
    lies(&["architecture \"lama\"", "llama"], "general.architecture", "lama".into());
    lies(&["blk.0.ffn_gate_exps.weight", "[4, 64, 32]", "[5, 64, 32]"], "llama.expert_count", Value::U32(5));
    lies(&["experts", "top_k"], "llama.expert_used_count", Value::U32(9));
    lies(&["blk.2.attn_norm.weight", "is missing"], "llama.block_count", Value::U32(3));
    lies(&["blk.1", "not part"], "llama.block_count", Value::U32(1));
    lies(&["block_count", "4000000000"], "llama.block_count", Value::U32(4_000_000_000));
    lies(&["block_count", "0"], "llama.block_count", Value::U32(0));
    lies(&["llama.embedding_length", "STRING"], "llama.embedding_length", "wide".into());
    lies(&["token_embd.weight", "[64, 32]", "[64, 48]"], "llama.embedding_length", Value::U32(48));
    lies(&["kv_heads"], "llama.attention.head_count_kv", Value::U32(3));
    lies(&["head_count", "0"], "llama.attention.head_count", Value::U32(0));
    lies(&["layer_norm_rms_epsilon"], "llama.attention.layer_norm_rms_epsilon", Value::U32(1));
    for key in [
        "llama.context_length",
        "llama.feed_forward_length",
        "llama.expert_used_count",
        "llama.embedding_length",
    ] {
        refused(llama, &[key, "missing"], &|keys, _| keys.retain(|(name, _)| name != key));
    }
    let scaled = |kind: &'static str| {
        move |keys: &mut Vec<(String, Value)>, _: &mut Vec<Tensor>| {
            keys.push(("llama.rope.scaling.type".into(), kind.into()));
        }
    };
    refused(llama, &["rope.scaling.type", "ntk", "yarn"], &scaled("ntk"));
    refused(llama, &["rope.scaling.factor", "missing"], &scaled("yarn"));
    refused("deepseek2-v3-yarn", &["key_length_mla", "convert"], &|keys, _| {
        keys.retain(|(name, _)| name != "deepseek2.attention.key_length_mla");
    });
    refused(
        "deepseek2-v3-yarn",
        &["expert_gating_func", "4", "sigmoid"],
        &set("deepseek2.expert_gating_func", Value::U32(4)),
    );
    // Cut short, and one file of two alone.
    let whole = fs::read(golden("gguf").join(format!("{llama}.gguf"))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    fs::write(&path, &whole[..whole.len() - 64]).unwrap();
    let text = checkpoint::open(&path, Audit::Full).unwrap_err().to_string();
    assert!(text.contains("cut.gguf") && text.contains("cut short"), "{text}");
    let split = "qwen3moe-split-f16-00001-of-00002.gguf";
    fs::copy(golden("gguf").join(split), dir.path().join(split)).unwrap();
    let text = checkpoint::open(&dir.path().join(split), Audit::Full).unwrap_err().to_string();
    assert!(text.contains("00002-of-00002.gguf"), "{text}");
}

#[test]
fn types_of_matrices_are_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let from = golden("gguf").join("qwen3moe-k-mix.gguf");
    let reference = checkpoint::load(&from).unwrap();
    for (name, bound) in [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 8e-3), ("q4_k", 0.1)] {
        let to = dir.path().join(format!("{name}.gguf"));
        let types = Types::named(name).unwrap();
        let report = convert(&from, &to, types, "auto", Audit::Structure, &|_, _| true).unwrap();
        let Types::Matrices(ty) = types else { panic!() };
        assert!(report.types.iter().any(|(name, count)| *name == ty.name() && *count > 5), "{report:?}");
        assert!(fs::metadata(&to).unwrap().len() > report.bytes);
        let found = checkpoint::load(&to).unwrap();
        assert_eq!(found.spec, reference.spec);
        for (a, b) in reference.params.iter().zip(&found.params) {
            let far = off(a, b);
            assert!(far <= bound, "{name}: {far}");
        }
        // In a folder only floats.
        let folder = dir.path().join(name);
        let written = convert(&from, &folder, types, "auto", Audit::Structure, &|_, _| true);
        match ty.block_len() {
            1 => {
                assert_eq!(written.unwrap().layout, "qwen3_moe");
                let found = checkpoint::load(&folder).unwrap();
                assert!(reference.params.iter().zip(&found.params).all(|(a, b)| off(a, b) <= bound));
            }
            _ => {
                let text = written.unwrap_err().to_string();
                assert!(text.contains("GGUF") && !folder.exists(), "{text}");
            }
        }
        // What is there is not written over.
        let text =
            convert(&from, &to, types, "auto", Audit::Structure, &|_, _| true).unwrap_err().to_string();
        assert!(text.contains("is there already"), "{text}");
    }
    // Told to end, it leaves nothing.
    for name in ["ended.gguf", "ended"] {
        let to = dir.path().join(name);
        assert!(
            convert(&from, &to, Types::Keep, "auto", Audit::Structure, &|done, _| done < 50_000).is_err()
        );
        assert!(!to.exists());
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().starts_with('.')), "{left:?}");
    assert!(Types::named("q5_9").is_none());
}

#[test]
fn what_is_beside_a_model_goes_along() {
    // Equal experts that are meant to be, and tokens that end a turn.
    let dir = tempfile::tempdir().unwrap();
    let (folder, file, back) = (dir.path().join("f"), dir.path().join("m.gguf"), dir.path().join("b"));
    let from = golden("mixtral-top2");
    let loaded = checkpoint::load(&from).unwrap();
    let mut params = loaded.params.clone();
    for (def, values) in senmon_models::params::param_defs(&loaded.spec).iter().zip(&mut params) {
        if def.name.contains(".experts.") {
            let size = values.len() / loaded.spec.first_moe().unwrap().experts;
            values.copy_within(..size, size);
        }
    }
    let slices: Vec<&[f32]> = params.iter().map(Vec::as_slice).collect();
    fs::create_dir(&folder).unwrap();
    checkpoint::save(&folder, &loaded.spec, &slices, "mixtral").unwrap();
    assert!(keep(&folder, &file).unwrap_err().to_string().contains("is the same as expert"));
    let config = folder.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["upcycled"] = true.into();
    fs::write(&config, json.to_string()).unwrap();
    fs::write(folder.join("generation_config.json"), "{\"eos_token_id\": [1, 7]}").unwrap();
    keep(&folder, &file).unwrap();
    assert_eq!(checkpoint::open(&file, Audit::Full).unwrap().spec.tokens.eos, [1, 7]);
    keep(&file, &back).unwrap();
    assert!(checkpoint::load(&back).unwrap().params == params);
    // A name that promises other files is refused.
    let split = dir.path().join("m-00001-of-00002.gguf");
    let text = keep(&folder, &split).unwrap_err().to_string();
    assert!(text.contains("split model") && !split.exists(), "{text}");
}
