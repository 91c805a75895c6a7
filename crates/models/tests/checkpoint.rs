//! Checkpoints written, read back, and broken in every way that must be refused by name.

#![allow(clippy::unwrap_used)]

mod common;

use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use senmon_models::checkpoint::{self, Checkpoint};
use senmon_models::families::{FAMILIES, best_family};
use senmon_models::names::parts;
use senmon_models::params::{initial_values, param_defs};
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm, SpecialTokens};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

/// A small model in the layout of that family.
fn spec(family: &str) -> ModelSpec {
    let mlp = |intermediate| MlpSpec::gated(intermediate);
    let moe = |router: RouterConfig, shared| {
        FfnSpec::Moe(MoeSpec { shared_intermediate: shared, router, ..MoeSpec::plain(4, 2, mlp(6)) })
    };
    let kind = |kind: &str| RouterConfig { kind: kind.into(), ..RouterConfig::default() };
    let (qk_norm, layers) = match family {
        "mixtral" => (QkNorm::None, vec![moe(kind("topk_post"), 0); 2]),
        "olmoe" => (QkNorm::Full, vec![moe(RouterConfig { normalize: false, ..kind("topk_pre") }, 0); 2]),
        "qwen3_moe" => {
            (QkNorm::Head, vec![moe(kind("topk_pre"), 0), FfnSpec::Dense(mlp(10)), moe(kind("topk_pre"), 0)])
        }
        "dots1" => {
            let router = RouterConfig { groups: 2, top_groups: 1, scale: 2.5, ..kind("sigmoid_bias") };
            (QkNorm::Head, vec![FfnSpec::Dense(mlp(10)), moe(router, 12)])
        }
        "llama" => (QkNorm::None, vec![FfnSpec::Dense(mlp(10)); 2]),
        "qwen3" => (QkNorm::Head, vec![FfnSpec::Dense(mlp(10)); 2]),
        // What no other family says: a dense layer above an MoE layer with a norm over all heads and a shared expert.
        _ => (QkNorm::Full, vec![moe(kind("topk_pre"), 3), FfnSpec::Dense(mlp(10))]),
    };
    let attention = AttentionSpec { qk_norm, rope_theta: 5e5, ..AttentionSpec::plain(2, 1, 4) };
    ModelSpec {
        max_positions: 32,
        norm_eps: 1e-5,
        init_std: 0.3,
        tokens: SpecialTokens { bos: Some(1), eos: vec![2, 3], pad: None },
        ..ModelSpec::plain(11, 8, attention, layers)
    }
}

fn save(dir: &Path, spec: &ModelSpec) -> Vec<Vec<f32>> {
    let mut values = initial_values(spec, 5);
    // Nothing that would hide a tensor read into another's place: norms and biases are not all the same.
    for (i, (values, def)) in values.iter_mut().zip(param_defs(spec)).enumerate() {
        if def.shape.len() == 1 {
            values.iter_mut().enumerate().for_each(|(j, v)| *v = (i * 31 + j) as f32 * 0.01);
        }
    }
    let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
    checkpoint::save(dir, spec, &slices, "auto").unwrap();
    values
}

fn error(dir: &Path) -> String {
    let error = checkpoint::load(dir).unwrap_err();
    assert!(error.is_users_mistake(), "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

/// The tensors of a file: type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites the tensors of a checkpoint.
fn edit(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut tensors: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    write(&path, &tensors);
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn edit_config(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

/// A file with this header, and so many bytes of data.
fn raw(dir: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.2";

#[test]
fn every_family_comes_back_with_the_same_bits() {
    for family in FAMILIES {
        let plain =
            ["mixtral", "olmoe", "qwen3_moe", "dots1", "llama", "qwen3", "senmon"].contains(&family.name);
        let dir = tempfile::tempdir().unwrap();
        let spec = match plain {
            true => spec(family.name),
            false => {
                let mut config = common::base(family.name);
                config["eos_token_id"] = serde_json::json!([2, 3]);
                common::read(&config).unwrap()
            }
        };
        spec.validate().unwrap();
        assert_eq!(best_family(&spec).name, family.name);
        let values = save(dir.path(), &spec);
        let loaded = checkpoint::load(dir.path()).unwrap();
        assert_eq!((loaded.spec, loaded.family.name), (spec, family.name));
        assert_eq!(loaded.params, values);
        assert!(loaded.unused.is_empty() && loaded.tokenizer.is_none());
        assert_eq!(loaded.generation.eos, [2, 3]);
        // What was written is what the format's own library reads, and nothing else lies there.
        let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
        let parts = parts(&checkpoint::load_spec(dir.path()).unwrap().0, &family.names);
        assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), parts.len());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}

/// Round trips would not see two names exchanged: here each tensor is followed to the rows that the decoder takes it for.
#[test]
fn tensors_lie_where_the_decoder_takes_them_from() {
    // H = 8, I = 6 (experts) and 10 (dense), two heads and one key-value head of width 4, 4 experts.
    let attention = [
        ("self_attn.q_proj.weight", "qkv", 0),
        ("self_attn.k_proj.weight", "qkv", 8 * 8),
        ("self_attn.v_proj.weight", "qkv", 12 * 8),
        ("self_attn.o_proj.weight", "out", 0),
        ("input_layernorm.weight", "attn_norm", 0),
        ("post_attention_layernorm.weight", "ffn_norm", 0),
    ];
    let normed = [("self_attn.q_norm.weight", "q_norm", 0), ("self_attn.k_norm.weight", "k_norm", 0)];
    let expert = 3 * 12 * 8;
    let experts = [
        ("mlp.gate.weight", "router", 0),
        ("mlp.experts.3.gate_proj.weight", "experts.gate_up", expert),
        ("mlp.experts.3.up_proj.weight", "experts.gate_up", expert + 6 * 8),
        ("mlp.experts.3.down_proj.weight", "experts.down", 3 * 8 * 6),
    ];
    let dense = [
        ("mlp.gate_proj.weight", "gate_up", 0),
        ("mlp.up_proj.weight", "gate_up", 10 * 8),
        ("mlp.down_proj.weight", "down", 0),
    ];
    let mixtral = [
        ("block_sparse_moe.gate.weight", "router", 0),
        ("block_sparse_moe.experts.3.w1.weight", "experts.gate_up", expert),
        ("block_sparse_moe.experts.3.w3.weight", "experts.gate_up", expert + 6 * 8),
        ("block_sparse_moe.experts.3.w2.weight", "experts.down", 3 * 8 * 6),
    ];
    let dots = [
        ("mlp.gate.e_score_correction_bias", "router_bias", 0),
        ("mlp.shared_experts.gate_proj.weight", "shared.gate_up", 0),
        ("mlp.shared_experts.up_proj.weight", "shared.gate_up", 12 * 8),
        ("mlp.shared_experts.down_proj.weight", "shared.down", 0),
    ];
    for (family, layer, places) in [
        ("mixtral", 1, [&attention[..], &mixtral].concat()),
        ("olmoe", 1, [&attention[..], &normed, &experts].concat()),
        ("qwen3_moe", 2, [&attention[..], &normed, &experts].concat()),
        ("qwen3_moe", 1, [&attention[..], &normed, &dense].concat()),
        ("dots1", 1, [&attention[..], &normed, &experts, &dots].concat()),
        ("dots1", 0, [&attention[..], &normed, &dense].concat()),
        ("llama", 1, [&attention[..], &dense].concat()),
        ("qwen3", 1, [&attention[..], &normed, &dense].concat()),
    ] {
        let (dir, spec) = (tempfile::tempdir().unwrap(), spec(family));
        let values = save(dir.path(), &spec);
        let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let follow = |tensor: &str, param: &str, offset: usize| {
            let view = file.tensor(tensor).unwrap_or_else(|_| panic!("{family}: no {tensor}"));
            let found: Vec<f32> =
                view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let param = param_defs(&spec).iter().position(|def| def.name == param).unwrap();
            assert_eq!(found, values[param][offset..][..found.len()], "{family}: {tensor}");
        };
        for (tensor, param, offset) in places {
            follow(&format!("model.layers.{layer}.{tensor}"), &format!("layers.{layer}.{param}"), offset);
        }
        follow("model.embed_tokens.weight", "embed", 0);
        follow("model.norm.weight", "final_norm", 0);
        follow("lm_head.weight", "head", 0);
    }
}

#[test]
fn half_precision_is_widened() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let (dir, spec) = (tempfile::tempdir().unwrap(), spec("mixtral"));
        let values = save(dir.path(), &spec);
        let narrow = |x: f32| match dtype {
            Dtype::F16 => half::f16::from_f32(x).to_le_bytes(),
            _ => half::bf16::from_f32(x).to_le_bytes(),
        };
        let wide = |x: f32| match dtype {
            Dtype::F16 => half::f16::from_f32(x).to_f32(),
            _ => half::bf16::from_f32(x).to_f32(),
        };
        edit(dir.path(), |tensors| {
            for (stored, _, data) in tensors.values_mut() {
                let floats = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                *data = floats.flat_map(narrow).collect();
                *stored = dtype;
            }
        });
        let loaded = checkpoint::load(dir.path()).unwrap();
        for (loaded, values) in loaded.params.iter().zip(&values) {
            assert!(loaded.iter().zip(values).all(|(l, v)| *l == wide(*v)));
        }
    }
}

#[test]
fn broken_tensors_are_named() {
    let gate = format!("{EXPERT}.w1.weight");
    type Change = Box<dyn FnOnce(&mut Tensors)>;
    let of = |name: &str, change: fn(&mut (Dtype, Vec<usize>, Vec<u8>))| -> Change {
        let name = name.to_owned();
        Box::new(move |t| change(t.get_mut(&name).unwrap()))
    };
    let cases: Vec<(Change, Vec<&str>)> = vec![
        (Box::new(|t| drop(t.remove(&format!("{EXPERT}.w1.weight")))), vec![&gate, "missing"]),
        (Box::new(|t| drop(t.remove("lm_head.weight"))), vec!["lm_head.weight", "missing"]),
        (
            Box::new(|t| {
                let tensor = t["model.norm.weight"].clone();
                t.insert("model.layers.2.input_layernorm.weight".into(), tensor);
            }),
            vec!["model.layers.2.input_layernorm.weight", "not part"],
        ),
        (of(&gate, |t| t.1 = vec![8, 6]), vec![&gate, "[8, 6]", "[6, 8]", "transposed"]),
        (of(&gate, |t| t.1 = vec![48]), vec![&gate, "[48]", "[6, 8]"]),
        (of(&gate, |t| t.2[4..8].copy_from_slice(&f32::NAN.to_le_bytes())), vec![&gate, "element 1 is NaN"]),
        (
            of("model.norm.weight", |t| t.2[..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes())),
            vec!["model.norm.weight", "element 0 is -inf"],
        ),
        (of(&gate, |t| t.0 = Dtype::I32), vec![&gate, "I32", "BF16"]),
        (
            Box::new(|t| {
                for part in ["w1", "w2", "w3"] {
                    let other =
                        t[&format!("model.layers.1.block_sparse_moe.experts.0.{part}.weight")].clone();
                    t.insert(format!("{EXPERT}.{part}.weight"), other);
                }
            }),
            vec![EXPERT, "expert 0"],
        ),
    ];
    for (change, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &spec("mixtral"));
        edit(dir.path(), change);
        let text = error(dir.path());
        assert!(expected.iter().all(|part| text.contains(part)), "{text}: {expected:?}");
    }
}

#[test]
fn tensors_that_can_be_explained_may_be_left_over() {
    let tied = ModelSpec { tie_embeddings: true, ..spec("qwen3") };
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &tied);
    edit(dir.path(), |t| {
        let head = t["model.embed_tokens.weight"].clone();
        t.insert("lm_head.weight".into(), head);
        let frequencies = (Dtype::F32, vec![2], vec![0; 8]);
        t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    });
    assert_eq!(checkpoint::load(dir.path()).unwrap().unused.len(), 2);
    edit(dir.path(), |t| t.get_mut("lm_head.weight").unwrap().2[3] ^= 1);
    let text = error(dir.path());
    assert!(text.contains("lm_head.weight") && text.contains("tie_word_embeddings"), "{text}");
    edit(dir.path(), |t| t.get_mut("lm_head.weight").unwrap().1 = vec![8, 11]);
    assert!(error(dir.path()).contains("lm_head.weight"));
}

#[test]
fn broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &spec("llama"));
    let whole = fs::read(dir.path().join("model.safetensors")).unwrap();
    let one =
        |offsets: &str| format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{offsets}}}}}");
    let two = |offsets: &str| {
        let b = format!("\"b\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{offsets}}}");
        format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}},{b}}}")
    };
    let huge = "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}";
    for (header, data, expected) in [
        ("no header", 0, "not JSON"),
        ("[]", 0, "not JSON"),
        ("{\"a\":3}", 8, "tensor a"),
        (&one("[0,16]"), 16, "tensor a"),
        (&one("[8,0]"), 16, "tensor a"),
        (&one("[0,8,16]"), 16, "tensor a"),
        (&one("[-8,0]"), 16, "tensor a"),
        (&one("[0,8]"), 7, "cut short"),
        (&one("[0,8]"), 9, "1 bytes behind"),
        (&one("[18446744073709551607,18446744073709551615]"), 8, "tensor a"),
        (&two("[4,12]"), 12, "tensor b: begins at byte 4"),
        (&two("[16,24]"), 24, "tensor b: begins at byte 16"),
        (huge, 8, "tensor a"),
    ] {
        raw(dir.path(), header, data);
        let text = error(dir.path());
        assert!(text.contains(expected) && text.contains("model.safetensors"), "{header}: {text}");
    }
    let path = dir.path().join("model.safetensors");
    for (bytes, expected) in [
        (Vec::new(), "cut short"),
        (u64::MAX.to_le_bytes().to_vec(), "header has 18446744073709551615 bytes"),
        (99_999_999u64.to_le_bytes().to_vec(), "cut short"),
        ([whole.as_slice(), &[0; 3]].concat(), "3 bytes behind"),
    ] {
        fs::write(&path, bytes).unwrap();
        let text = error(dir.path());
        assert!(text.contains(expected) && text.contains("model.safetensors"), "{text}");
    }
    for length in (0..whole.len()).step_by(37).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..length]).unwrap();
        let text = error(dir.path());
        assert!(text.contains("cut short") && text.contains("model.safetensors"), "{length}: {text}");
    }
    fs::remove_file(&path).unwrap();
    assert!(error(dir.path()).contains("no model.safetensors"));
    fs::write(dir.path().join("pytorch_model.bin"), [0; 8]).unwrap();
    assert!(error(dir.path()).contains("pytorch_model.bin"));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(error(dir.path()).contains("config.json"));
    assert!(error(&dir.path().join("nowhere")).contains("no such folder"));
    assert!(error(&dir.path().join("pytorch_model.bin")).contains("not a folder"));
}

#[test]
fn configurations_that_lie_are_refused() {
    let more = "model.layers.2.input_layernorm.weight";
    for (key, value, expected) in [
        ("num_hidden_layers", json!(3), more),
        ("num_hidden_layers", json!(1), "model.layers.1."),
        ("num_local_experts", json!(5), "experts.4.w1.weight"),
        ("num_local_experts", json!(3), "block_sparse_moe.gate.weight"),
        ("num_local_experts", json!(60_000), "experts.4.w1.weight"),
        ("num_local_experts", json!(65_536), "experts = 65536"),
        ("vocab_size", json!(12), "model.embed_tokens.weight"),
        ("vocab_size", json!(16_000_000), "model.embed_tokens.weight"),
        ("hidden_size", json!(16), "model.embed_tokens.weight"),
        ("intermediate_size", json!(7), "experts.0.w1.weight"),
        ("head_dim", json!(8), "self_attn.q_proj.weight"),
        ("model_type", json!("mixtrall"), "mixtral"),
        ("model_type", json!(7), "model_type"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
        ("eos_token_id", json!("end"), "eos_token_id"),
        ("eos_token_id", json!(-7), "eos_token_id"),
        ("quantization_config", json!({"quant_method": "fp8"}), "quantization_config"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &spec("mixtral"));
        edit_config(dir.path(), |config| config[key] = value.clone());
        let text = error(dir.path());
        assert!(text.contains(expected), "{key} = {value}: {text}");
    }
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &spec("mixtral"));
    for broken in ["", "[]", "{", "null", "{}", "{\"model_type\": null}"] {
        fs::write(dir.path().join("config.json"), broken).unwrap();
        assert!(error(dir.path()).contains("config.json"), "{broken}");
    }
    save(dir.path(), &spec("mixtral"));
    fs::write(dir.path().join("generation_config.json"), "{\"top_k\": -1}").unwrap();
    let text = error(dir.path());
    assert!(text.contains("generation_config.json") && text.contains("top_k"), "{text}");
}

/// One checkpoint as two files with an index.
fn shard(dir: &Path) {
    save(dir, &spec("llama"));
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut files = [Tensors::new(), Tensors::new()];
    let mut index = serde_json::Map::new();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    // In the order of their names: the library's own order changes from run to run.
    let by_name: BTreeMap<_, _> = tensors.iter().collect();
    for (i, (name, view)) in by_name.into_iter().enumerate() {
        let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        files[i % 2].insert(name.to_owned(), tensor);
        index.insert(name.to_owned(), format!("part-{}.safetensors", i % 2).into());
    }
    for (i, tensors) in files.iter().enumerate() {
        write(&dir.join(format!("part-{i}.safetensors")), tensors);
    }
    fs::remove_file(&path).unwrap();
    fs::write(dir.join(INDEX), json!({ "weight_map": index }).to_string()).unwrap();
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn indices_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    shard(dir.path());
    let Checkpoint { spec: loaded, .. } = checkpoint::load(dir.path()).unwrap();
    assert_eq!(loaded, spec("llama"));
    let index = fs::read(dir.path().join(INDEX)).unwrap();
    let change = |change: &dyn Fn(&mut Value), expected: &[&str]| {
        let mut json: Value = serde_json::from_slice(&index).unwrap();
        change(&mut json);
        fs::write(dir.path().join(INDEX), json.to_string()).unwrap();
        let text = error(dir.path());
        assert!(expected.iter().all(|part| text.contains(part)), "{text}: {expected:?}");
    };
    let norm = "model.norm.weight";
    change(&|json| *json = json!({}), &[INDEX, "weight_map"]);
    change(&|json| json["weight_map"] = json!({}), &[INDEX, "weight_map"]);
    change(&|json| json["weight_map"][norm] = json!(3), &[INDEX, norm]);
    for outside in ["../x.safetensors", "/etc/passwd", "", "..", "a/b"] {
        change(&|json| json["weight_map"][norm] = json!(outside), &[INDEX, norm]);
    }
    let elsewhere = "part-9.safetensors";
    change(
        &|json| {
            json["weight_map"].as_object_mut().unwrap().values_mut().for_each(|file| *file = json!(elsewhere))
        },
        &[elsewhere],
    );
    change(&|json| json["weight_map"][norm] = json!(elsewhere), &[norm, "part-0"]);
    change(&|json| drop(json["weight_map"].as_object_mut().unwrap().remove(norm)), &[norm]);
    change(&|json| json["weight_map"]["more"] = json!("part-0.safetensors"), &["tensor more", "part-0"]);
    fs::write(dir.path().join(INDEX), &index).unwrap();
    fs::copy(dir.path().join("part-0.safetensors"), dir.path().join("part-1.safetensors")).unwrap();
    assert!(error(dir.path()).contains("part-1.safetensors"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Any bytes anywhere: an error or a model, never a panic, never memory that the files do not have.
    #[test]
    fn damaged_files_do_not_panic(at in any::<prop::sample::Index>(), bytes: [u8; 3], config: bool) {
        const FILES: [&str; 2] = ["model.safetensors", "config.json"];
        // Saved once: a save waits for the disk.
        static WHOLE: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
            let dir = tempfile::tempdir().unwrap();
            save(dir.path(), &spec("dots1"));
            FILES.map(|name| fs::read(dir.path().join(name)).unwrap())
        });
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in FILES.iter().zip(&*WHOLE) {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        let path = dir.path().join(FILES[usize::from(config)]);
        let mut file = WHOLE[usize::from(config)].clone();
        // The header is what has a structure to break.
        let end = if config { file.len() } else { file.len().min(6000) };
        let at = at.index(end);
        file[at..].iter_mut().zip(bytes).for_each(|(f, b)| *f = b);
        fs::write(&path, file).unwrap();
        if let Err(error) = checkpoint::load(dir.path()) {
            prop_assert!(error.is_users_mistake(), "{}", error);
        }
    }
}
