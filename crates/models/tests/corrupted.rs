//! Checkpoints corrupted in the ways that conversions corrupt them, in every layout of experts: a tensor for each, fused, fused
//! and turned, packed 4-bit floats, 8-bit floats with scales, and the experts of an encoder-decoder. Each is made of a golden
//! one, and refused by the name of what is wrong.

#![allow(clippy::unwrap_used)]

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use senmon_models::ModelError;
use senmon_models::audit::Audit;
use senmon_models::{checkpoint, seq2seq};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tensor: type, shape, bytes.
type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// A golden model, to be corrupted.
#[derive(Clone)]
struct Model {
    layout: &'static Layout,
    config: Value,
    tensors: BTreeMap<String, Tensor>,
}

/// How a model stores its experts.
#[derive(Debug)]
struct Layout {
    golden: &'static str,
    /// Every matrix of an expert is made 8-bit floats with a scale.
    eight_bits: bool,
    /// What the names of the experts' matrices in one layer begin with.
    experts: &'static str,
    /// What the name of an expert begins with, before its number; none where all of a layer's are one tensor.
    each: Option<&'static str>,
    /// What the ends of the names of the experts' matrices are.
    matrices: &'static [&'static str],
    count: usize,
    /// Keys of `config.json`: experts, layers, hidden width, heads.
    keys: [&'static str; 4],
}

const DECODER: [&str; 3] = ["num_hidden_layers", "hidden_size", "num_attention_heads"];

const fn keys(experts: &'static str) -> [&'static str; 4] {
    [experts, DECODER[0], DECODER[1], DECODER[2]]
}

const LAYOUTS: [Layout; 6] = [
    Layout {
        golden: "mixtral-top2",
        eight_bits: false,
        experts: "model.layers.1.block_sparse_moe.experts.",
        each: Some(""),
        matrices: &["w1.weight", "w2.weight", "w3.weight"],
        count: 8,
        keys: keys("num_local_experts"),
    },
    Layout {
        golden: "granitemoe-multipliers-dynamic",
        eight_bits: false,
        experts: "model.layers.1.block_sparse_moe.",
        each: None,
        matrices: &["input_linear.weight", "output_linear.weight"],
        count: 6,
        keys: keys("num_local_experts"),
    },
    Layout {
        golden: "gpt_oss-sinks-window-yarn",
        eight_bits: false,
        experts: "model.layers.1.mlp.experts.",
        each: None,
        matrices: &["gate_up_proj", "down_proj"],
        count: 6,
        keys: keys("num_local_experts"),
    },
    Layout {
        golden: "gpt_oss-mxfp4",
        eight_bits: false,
        experts: "model.layers.1.mlp.experts.",
        each: None,
        matrices: &["gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"],
        count: 4,
        keys: keys("num_local_experts"),
    },
    Layout {
        golden: "deepseek_v3-groups-yarn",
        eight_bits: true,
        experts: "model.layers.1.mlp.experts.",
        each: Some(""),
        matrices: &["gate_proj.weight", "up_proj.weight", "down_proj.weight"],
        count: 8,
        keys: keys("n_routed_experts"),
    },
    Layout {
        golden: "switch_transformers-within-capacity",
        eight_bits: false,
        experts: "encoder.block.1.layer.1.mlp.experts.",
        each: Some("expert_"),
        matrices: &["wi.weight", "wo.weight"],
        count: 3,
        keys: ["num_experts", "num_layers", "d_model", "num_heads"],
    },
];

/// What is added to the name of a tensor of 8-bit floats for that of its scales.
const SCALES: &str = "_scale_inv";

impl Layout {
    /// The tensors with the matrices of an expert, and its bytes in them: all where it has its own.
    fn of(&self, model: &Model, expert: usize) -> Vec<(String, Range<usize>)> {
        let names = self.matrices.iter().map(|matrix| match self.each {
            Some(before) => format!("{}{before}{expert}.{matrix}", self.experts),
            None => format!("{}{matrix}", self.experts),
        });
        let bytes = |name: String| {
            let all = model.tensors.get(&name).unwrap_or_else(|| panic!("no {name}")).2.len();
            let size = all / self.count;
            let range = if self.each.is_some() { 0..all } else { expert * size..(expert + 1) * size };
            (name, range)
        };
        names.map(bytes).collect()
    }
}

impl Model {
    fn golden(layout: &'static Layout) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(layout.golden);
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        let tensors = file.iter().map(|(name, view)| (name.to_owned(), tensor(view))).collect();
        let mut model = Self { layout, config, tensors };
        if layout.eight_bits {
            for (name, _) in
                (0..layout.count).flat_map(|expert| layout.of(&model, expert)).collect::<Vec<_>>()
            {
                let (dtype, shape, bytes) = model.tensors.get_mut(&name).unwrap();
                assert!(shape.iter().all(|n| *n <= 128), "one block");
                // Some codes of magnitudes from 1 on, with the signs of the numbers.
                *bytes = bytes.as_chunks::<4>().0.iter().map(|x| 0x38 | x[3] & 0x80 | x[2] & 7).collect();
                *dtype = Dtype::F8_E4M3;
                let _ = shape;
                let scale = (Dtype::F32, vec![1, 1], 0.01f32.to_le_bytes().to_vec());
                model.tensors.insert(format!("{name}{SCALES}"), scale);
            }
        }
        model
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Its first tensor with matrices of experts: of expert 1 where each has its own.
    fn first(&self) -> String {
        self.layout.of(self, 1).remove(0).0
    }

    /// Makes an expert another's copy.
    fn copy(&mut self, from: usize, to: usize) {
        let layout = self.layout;
        let (from, to) = (layout.of(self, from), layout.of(self, to));
        for ((source, bytes), (target, place)) in from.into_iter().zip(to) {
            let bytes = self.tensors[&source].2[bytes].to_vec();
            self.tensor(&target).2[place].copy_from_slice(&bytes);
        }
    }

    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        write(&folder.join("model.safetensors"), self.tensors.iter());
    }

    /// Every way to use it refuses it, in the same words, which have these among them.
    fn refused(&self, expected: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        refused(self.layout, folder.path(), expected);
    }

    fn accepted(&self) {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        if let Some(error) = errors(self.layout, folder.path()).into_iter().flatten().next() {
            panic!("{}: {error}", self.layout.golden);
        }
    }
}

fn write<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) {
    let views = tensors.map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap_or_else(|e| panic!("{name}: {e}")))
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// What each way to use a folder says: to train (a decoder only), to run.
fn errors(layout: &Layout, folder: &Path) -> Vec<Option<ModelError>> {
    if layout.golden.starts_with("switch") {
        return vec![seq2seq::open(folder, Audit::Full).err()];
    }
    vec![checkpoint::load(folder).err(), checkpoint::open(folder, Audit::Full).err()]
}

fn refused(layout: &Layout, folder: &Path, expected: &[&str]) {
    for error in errors(layout, folder) {
        let error = error.unwrap_or_else(|| panic!("{}: {expected:?} is accepted", layout.golden));
        let text = error.to_string();
        assert!(error.is_users_mistake() && text.lines().count() == 1, "{text}");
        for word in expected {
            assert!(text.contains(word), "{}: {text}: does not say {word:?}", layout.golden);
        }
    }
}

/// Every layout, whole.
fn models() -> impl Iterator<Item = Model> {
    LAYOUTS.iter().map(Model::golden)
}

#[test]
fn what_is_corrupted_here_is_sound_before() {
    models().for_each(|model| model.accepted());
}

#[test]
fn a_missing_expert_is_named() {
    for mut model in models() {
        let (layout, name) = (model.layout, model.first());
        match layout.each {
            Some(_) => {
                for (name, _) in layout.of(&model, 1) {
                    model.tensors.remove(&name);
                }
                // With its scales left behind, and without.
                model.refused(&[&name, "missing"]);
                model.tensors.retain(|name, _| !name.starts_with(&format!("{}1.", layout.experts)));
                model.refused(&[&name, "missing"]);
            }
            None => {
                for (name, bytes) in layout.of(&model, 1) {
                    let (_, shape, data) = model.tensor(&name);
                    shape[0] -= 1;
                    data.drain(bytes);
                }
                model.refused(&[layout.experts, "has shape", &format!("[{},", layout.count - 1)]);
            }
        }
        let mut model = Model::golden(layout);
        model.tensors.remove(&name);
        let whole = name.trim_end_matches("_blocks");
        model.refused(&[whole, "missing"]);
    }
}

#[test]
fn an_expert_too_many_is_named() {
    for mut model in models() {
        let (layout, last) = (model.layout, model.layout.count - 1);
        let more = layout.of(&model, last);
        match layout.each {
            Some(before) => {
                for (name, _) in &more {
                    let new = name.replace(&format!("{before}{last}."), &format!("{before}{}.", last + 1));
                    let tensor = model.tensors[name].clone();
                    model.tensors.insert(new, tensor);
                }
                model
                    .refused(&[&format!("{}{before}{}.", layout.experts, last + 1), "not part of the model"]);
            }
            None => {
                for (name, bytes) in more {
                    let (_, shape, data) = model.tensor(&name);
                    shape[0] += 1;
                    data.extend_from_within(bytes);
                }
                model.refused(&[layout.experts, "has shape", &format!("[{},", layout.count + 1)]);
            }
        }
    }
}

#[test]
fn an_expert_that_is_there_twice_is_named_unless_the_model_is_upcycled() {
    for sound in models() {
        let (mut model, layout) = (sound.clone(), sound.layout);
        model.copy(0, 2);
        let expert = format!("experts.{}2", layout.each.unwrap_or_default());
        // An encoder-decoder's are named as a decoder's.
        let expert = expert.replace("expert_", "");
        for mark in [None, Some(json!(false)), Some(Value::Null)] {
            match mark {
                None => drop(model.config.as_object_mut().unwrap().remove("upcycled")),
                Some(mark) => model.config["upcycled"] = mark,
            }
            model.refused(&[&expert, "the same as expert 0"]);
        }
        model.config["upcycled"] = json!("yes");
        model.refused(&["config.json", "upcycled"]);
        model.config["upcycled"] = json!(true);
        model.accepted();
        // The mark explains nothing else.
        let name = model.first();
        model.tensor(&name).0 = Dtype::I8;
        let (_, shape, bytes) = model.tensor(&name);
        bytes.truncate(shape.iter().product());
        model.refused(&[&name, "I8"]);
        // All but one matrix the same: another expert.
        let mut model = sound;
        let (last, place) = layout.of(&model, 2).pop().unwrap();
        let own = model.tensors[&last].2[place.clone()].to_vec();
        model.copy(0, 2);
        model.tensor(&last).2[place].copy_from_slice(&own);
        if layout.golden != "gpt_oss-mxfp4" {
            model.accepted();
        }
    }
}

#[test]
fn a_transposed_expert_is_named() {
    for mut model in models() {
        let name = model.first();
        let (_, shape, _) = model.tensor(&name);
        let n = shape.len();
        let (a, b) = if name.ends_with("_blocks") { (1, 2) } else { (n - 2, n - 1) };
        assert_ne!(shape[a], shape[b]);
        shape.swap(a, b);
        let found = format!("{shape:?}");
        model.refused(&[&name, "has shape", &found]);
    }
}

#[test]
fn what_is_not_a_number_is_named() {
    for sound in models() {
        let name = sound.first();
        let (dtype, ..) = sound.tensors[&name];
        // A code that is no number, of the type; where the codes all are, of the scales.
        let (of, code): (String, Vec<u8>) = match dtype {
            Dtype::F8_E4M3 => (name.clone(), vec![0x7f]),
            Dtype::U8 => (name.replace("_blocks", "_scales"), vec![0xff]),
            _ => (name.clone(), f32::NAN.to_le_bytes().to_vec()),
        };
        let mut model = sound.clone();
        model.tensor(&of).2[..code.len()].copy_from_slice(&code);
        let shown = name.trim_end_matches("_blocks");
        // Packed floats have no code for it: their greatest scale is beyond all numbers.
        model.refused(&[shown, if dtype == Dtype::U8 { "element 0 is" } else { "element 0 is NaN" }]);
        if dtype == Dtype::F8_E4M3 {
            let mut model = sound.clone();
            model.tensor(&format!("{name}{SCALES}")).2 = f32::INFINITY.to_le_bytes().to_vec();
            model.refused(&[&name, "element 0 is", "inf"]);
        }
        // And in what is no expert.
        let norm = sound.tensors.keys().find(|name| name.ends_with("norm.weight")).unwrap().clone();
        let mut model = sound;
        model.tensor(&norm).2[4..8].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
        model.refused(&[&norm, "element 1 is -inf"]);
    }
}

#[test]
fn a_type_that_does_not_fit_is_named() {
    for sound in models() {
        let name = sound.first();
        // The same bytes under another name, as long as that is possible.
        let others: &[Dtype] = match sound.tensors[&name].0 {
            Dtype::F32 => &[Dtype::I32, Dtype::U32],
            Dtype::U8 => &[Dtype::I8, Dtype::F8_E4M3, Dtype::F8_E5M2],
            _ => &[Dtype::U8, Dtype::I8, Dtype::F8_E5M2],
        };
        for other in others {
            let mut model = sound.clone();
            model.tensor(&name).0 = *other;
            model.refused(&[&name, &format!("{other:?}")]);
        }
        if sound.layout.eight_bits {
            let mut model = sound.clone();
            model.tensors.remove(&format!("{name}{SCALES}"));
            model.refused(&[&name, SCALES, "missing"]);
            let mut model = sound.clone();
            *model.tensor(&format!("{name}{SCALES}")) = (Dtype::F32, vec![1, 2], vec![0; 8]);
            model.refused(&[&name, SCALES, "[1, 2]"]);
        }
    }
}

/// A model as two files with an index.
fn shards(model: &Model) -> (tempfile::TempDir, PathBuf, Value) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), model.config.to_string()).unwrap();
    let mut map = serde_json::Map::new();
    let tensors: Vec<_> = model.tensors.iter().collect();
    for (n, half) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("part-{n}.safetensors");
        write(&folder.path().join(&file), half.iter().copied());
        map.extend(half.iter().map(|(name, _)| ((*name).clone(), file.as_str().into())));
    }
    let index = folder.path().join("model.safetensors.index.json");
    (folder, index, json!({ "weight_map": map }))
}

#[test]
fn a_file_that_is_cut_or_missing_is_named() {
    for model in models() {
        let (folder, index, json) = shards(&model);
        std::fs::write(&index, json.to_string()).unwrap();
        assert!(errors(model.layout, folder.path()).iter().all(Option::is_none), "{}", model.layout.golden);
        let part = folder.path().join("part-1.safetensors");
        let whole = std::fs::read(&part).unwrap();
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for length in [0, 7, 8, header / 2, header, (header + whole.len()) / 2, whole.len() - 1] {
            std::fs::write(&part, &whole[..length]).unwrap();
            refused(model.layout, folder.path(), &["part-1.safetensors", "cut short"]);
        }
        // Where the header is whole, the tensor that the file ends in is known.
        refused(model.layout, folder.path(), &["part-1.safetensors: tensor ", "cut short"]);
        std::fs::remove_file(&part).unwrap();
        refused(model.layout, folder.path(), &["part-1.safetensors"]);
    }
}

#[test]
fn an_index_that_lies_is_named() {
    for model in models() {
        let (folder, index, json) = shards(&model);
        let name = model.first();
        let own = json["weight_map"][&name].as_str().unwrap().to_owned();
        let other = if own.contains('0') { "part-1.safetensors" } else { "part-0.safetensors" };
        let say = |change: &dyn Fn(&mut Value)| {
            let mut json = json.clone();
            change(&mut json["weight_map"]);
            std::fs::write(&index, json.to_string()).unwrap();
        };
        say(&|map| map[&name] = json!(other));
        refused(model.layout, folder.path(), &[&format!("tensor {name}"), "index"]);
        say(&|map| drop(map.as_object_mut().unwrap().remove(&name)));
        refused(model.layout, folder.path(), &[&name, &own, "index"]);
        say(&|map| map["experts.9"] = json!(own.clone()));
        refused(model.layout, folder.path(), &["experts.9", &own, "index"]);
        for outside in ["../x.safetensors", "/x.safetensors", "a/x.safetensors"] {
            say(&|map| map[&name] = json!(outside));
            refused(model.layout, folder.path(), &["index.json", &name, outside]);
        }
        // The tensor in both files.
        say(&|_| {});
        let mut tensors: BTreeMap<String, Tensor> = model.tensors.clone();
        tensors.retain(|tensor, _| json["weight_map"][tensor] == json!(other) || *tensor == name);
        write(&folder.path().join(other), tensors.iter());
        refused(model.layout, folder.path(), &[&name, other, "index"]);
    }
}

#[test]
fn headers_with_absurd_sizes_are_refused_by_name() {
    for model in models() {
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path());
        let path = folder.path().join("model.safetensors");
        let whole = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(whole[..8].try_into().unwrap());
        for length in [0, 1, header - 1, header + 1, whole.len() as u64, 1 << 31, 1 << 63, u64::MAX] {
            let mut bytes = whole.clone();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            std::fs::write(&path, bytes).unwrap();
            refused(model.layout, folder.path(), &["model.safetensors"]);
        }
        // A tensor whose sizes overflow, or that lies where no file ends.
        let name = model.first();
        let mut json: Value = serde_json::from_slice(&whole[8..8 + header as usize]).unwrap();
        let own = json[&name].clone();
        for (key, value) in [
            ("shape", json!([1u64 << 40, 1u64 << 40])),
            ("shape", json!([u64::MAX])),
            ("shape", json!([0])),
            ("shape", json!([-1])),
            ("shape", json!([1.5])),
            ("data_offsets", json!([0, u64::MAX])),
            ("data_offsets", json!([u64::MAX, u64::MAX])),
            ("data_offsets", json!([8, 4])),
            ("data_offsets", json!([])),
        ] {
            json[&name] = own.clone();
            json[&name][key] = value;
            let text = json.to_string();
            let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text.as_bytes());
            bytes.extend(&whole[8 + header as usize..]);
            std::fs::write(&path, bytes).unwrap();
            refused(model.layout, folder.path(), &[&format!("tensor {name}")]);
        }
    }
}

#[test]
fn a_configuration_that_lies_is_refused_by_a_name() {
    for sound in models() {
        let [experts, layers, hidden, heads] = sound.layout.keys;
        let number = |key: &str| sound.config[key].as_u64().unwrap();
        for key in [experts, layers, hidden, heads] {
            let n = number(key);
            for lie in [0, n - 1, n + 1, 2 * n, 1000 * n, 1 << 24, 1 << 40, u64::MAX] {
                let mut model = sound.clone();
                model.config[key] = json!(lie);
                let folder = tempfile::tempdir().unwrap();
                model.write(folder.path());
                for error in errors(model.layout, folder.path()) {
                    let what = format!("{}: {key} = {lie}", sound.layout.golden);
                    let error = error.unwrap_or_else(|| panic!("{what} is accepted"));
                    let text = error.to_string();
                    // A tensor that shows the lie, or the key (or what the specification calls it).
                    let named = matches!(error, ModelError::Tensor { .. } | ModelError::Spec { .. })
                        || text.contains("config.json");
                    assert!(named && error.is_users_mistake() && text.lines().count() == 1, "{what}: {text}");
                }
            }
            for lie in [json!(-1), json!(1.5), json!("8"), json!([8]), json!(true)] {
                let mut model = sound.clone();
                model.config[key] = lie;
                model.refused(&["config.json", key]);
            }
        }
    }
}

/// Listing the tensors of such a model would take longer than any disk, and more memory than there is.
#[test]
fn more_experts_than_a_file_can_list_are_refused_at_once() {
    for model in models().filter(|model| model.layout.each.is_some()) {
        let mut model = model;
        let [experts, layers, ..] = model.layout.keys;
        model.config[experts] = json!(4096);
        model.config[layers] = json!(4096);
        for step in ["encoder_sparse_step", "decoder_sparse_step"] {
            if model.config.get(step).is_some() {
                model.config[step] = json!(1);
            }
        }
        let start = std::time::Instant::now();
        model.refused(&["experts", "131072"]);
        assert!(start.elapsed().as_secs() < 5);
    }
}

#[test]
fn sizes_of_an_encoder_decoder_that_overflow_are_refused() {
    let mut model = models().find(|model| model.layout.golden.starts_with("switch")).unwrap();
    for key in ["d_model", "num_heads", "d_kv", "d_ff", "vocab_size"] {
        model.config[key] = json!(1 << 24);
    }
    model.refused(&["config.json", "parameters"]);
}
