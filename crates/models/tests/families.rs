//! `config.json` as transformers 4 and 5 write it, and what in it changes the maths.

#![allow(clippy::unwrap_used)]

mod common;

use common::{base, known, read};
use senmon_models::Result;
use senmon_models::families::{best_family, config_json};
use senmon_models::rope::RopeScaling;
use senmon_models::spec::{FfnSpec, ModelSpec};
use serde_json::{Value, json};

/// The specification of a family's plain configuration with some keys set; a null removes the key.
fn with(name: &str, keys: Value) -> Result<ModelSpec> {
    let mut config = base(name);
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    read(&config)
}

fn without(name: &str, key: &str) -> Result<ModelSpec> {
    let mut config = base(name);
    config.as_object_mut().unwrap().remove(key).unwrap();
    read(&config)
}

#[test]
fn configurations_come_back_and_say_what_the_family_implies() {
    for name in known() {
        let spec = read(&base(name)).unwrap();
        let (family, config) = config_json(&spec, name).unwrap();
        assert_eq!(read(&config).unwrap(), spec, "{name}");
        assert_eq!(best_family(&spec).name, name);
        assert_eq!(config["architectures"], json!([family.architecture]));
        assert_eq!(config["torch_dtype"], "float32");
        assert_eq!(spec.attention.rope_theta, 20000.0);
    }
    let router = |name: &str| {
        let router = read(&base(name)).unwrap().first_moe().unwrap().router.clone();
        (router.kind, router.normalize, router.scale, router.groups, router.top_groups)
    };
    assert_eq!(router("mixtral").0, "topk_post");
    assert_eq!(router("olmoe"), ("topk_pre".into(), false, 1.0, 1, 1));
    assert_eq!(router("qwen3_moe"), ("topk_pre".into(), true, 1.0, 1, 1));
    assert_eq!(router("dots1"), ("sigmoid_bias".into(), true, 2.5, 2, 1));
    assert_eq!(read(&base("dots1")).unwrap().first_moe().unwrap().shared_intermediate, 16);
    for (name, normalize) in [("dots1", false), ("olmoe", true), ("qwen3_moe", false)] {
        let spec = with(name, json!({ "norm_topk_prob": normalize })).unwrap();
        assert_eq!(spec.first_moe().unwrap().router.normalize, normalize, "{name}");
        assert_eq!(config_json(&spec, name).unwrap().1["norm_topk_prob"], normalize, "{name}");
    }
}

#[test]
fn equal_routings_are_exported_under_either_name() {
    let mut spec = read(&base("mixtral")).unwrap();
    for layer in &mut spec.layers {
        let FfnSpec::Moe(moe) = layer else { unreachable!() };
        (moe.router.kind, moe.router.normalize) = ("topk_pre".into(), true);
    }
    assert_eq!(best_family(&spec).name, "mixtral");
    for layer in &mut spec.layers {
        let FfnSpec::Moe(moe) = layer else { unreachable!() };
        moe.router.normalize = false;
    }
    assert_eq!(best_family(&spec).name, "senmon");
    let text = config_json(&spec, "mixtral").unwrap_err().to_string();
    assert!(text.contains("mixtral") && text.contains("normalised"), "{text}");
}

#[test]
fn rotary_positions_of_both_versions() {
    let theta = |keys: Value| with("llama", keys).map(|spec| spec.attention.rope_theta);
    assert_eq!(theta(json!({ "rope_theta": null })).unwrap(), 10_000.0);
    assert_eq!(with("mixtral", json!({ "rope_theta": null })).unwrap().attention.rope_theta, 1e6);
    assert_eq!(theta(json!({ "rope_theta": 500000 })).unwrap(), 500_000.0);
    // Version 5: the table goes before the key.
    let five = json!({ "rope_parameters": { "rope_theta": 3e4, "rope_type": "default" } });
    assert_eq!(theta(five).unwrap(), 3e4);
    assert_eq!(theta(json!({ "rope_parameters": { "rope_theta": 3e4 } })).unwrap(), 3e4);
    assert_eq!(theta(json!({ "rope_parameters": { "rope_type": "default" } })).unwrap(), 20_000.0);
    assert_eq!(theta(json!({ "rope_scaling": null })).unwrap(), 20_000.0);
    assert_eq!(theta(json!({ "rope_scaling": { "type": "default" } })).unwrap(), 20_000.0);
    for (key, value) in [
        ("rope_scaling", json!({ "type": "linear" })),
        ("rope_scaling", json!({ "factor": 2.0 })),
        ("rope_scaling", json!("linear")),
        ("rope_scaling", json!(2.0)),
        ("rope_scaling", json!({ "type": "linear", "factor": 0.0 })),
        ("rope_scaling", json!({ "type": "linear", "factor": "2" })),
        ("rope_scaling", json!({ "type": "dynamic" })),
        ("rope_scaling", json!({ "type": "mrope", "mrope_section": [1, 1] })),
        ("rope_scaling", json!({ "type": "proportional", "factor": 2.0 })),
        (
            "rope_scaling",
            json!({ "type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0 }),
        ),
        (
            "rope_scaling",
            json!({ "type": "longrope", "short_factor": 1.0, "long_factor": [1.0], "factor": 2.0 }),
        ),
        (
            "rope_scaling",
            json!({ "type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0 }),
        ),
        ("rope_scaling", json!({ "type": "llama3", "factor": 2.0, "low_freq_factor": 1.0 })),
        (
            "rope_parameters",
            json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0 }),
        ),
        ("rope_parameters", json!({ "rope_type": "yarn", "factor": 4.0, "truncate": 1 })),
        ("rope_parameters", json!({ "rope_type": 3 })),
        ("rope_parameters", json!({ "rope_theta": "big" })),
        ("rope_parameters", json!({ "rope_theta": 1e4, "partial_rotary_factor": 1.5 })),
        ("rope_parameters", json!({ "full_attention": { "rope_type": "default", "rope_theta": 1e4 } })),
        ("rope_parameters", json!({ "rope_type": "default", "full_attention": { "rope_theta": 1e6 } })),
        ("partial_rotary_factor", json!("half")),
        ("rope_theta", json!("10000")),
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!(0)),
    ] {
        for name in known() {
            let text = with(name, json!({ key: value.clone() })).unwrap_err().to_string();
            let named = [key, "partial_rotary_factor", "rope_type"].iter().any(|name| text.contains(name));
            assert!(named && text.contains("config.json"), "{name} {key} = {value}: {text}");
        }
    }
    assert!(with("llama", json!({ "partial_rotary_factor": 0.5 })).is_err());
}

#[test]
fn bent_speeds_of_both_versions() {
    let scaling = |keys: Value| with("llama", keys).unwrap().attention.rope.scaling;
    let linear = json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } });
    assert_eq!(scaling(linear), RopeScaling::Linear { factor: 2.0 });
    let dynamic = json!({ "rope_parameters": { "rope_type": "dynamic", "factor": 2.0 } });
    assert_eq!(scaling(dynamic), RopeScaling::Dynamic { factor: 2.0, original: 128 });
    // The factor of YaRN may follow from the lengths; its attention factor from two numbers.
    let yarn = json!({ "rope_scaling": { "type": "yarn", "original_max_position_embeddings": 32 } });
    let RopeScaling::Yarn { factor, original, attention_factor, .. } = scaling(yarn) else { panic!() };
    assert_eq!((factor, original), (4.0, 32));
    assert!((attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    let yarn =
        json!({ "rope_scaling": { "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0 } });
    let RopeScaling::Yarn { attention_factor, .. } = scaling(yarn) else { panic!() };
    assert_eq!(attention_factor, 1.0);
    let list = [1.0, 1.5, 2.0, 3.0];
    let long = json!({
        "rope_scaling": { "type": "longrope", "short_factor": list, "long_factor": list },
        "original_max_position_embeddings": 32,
    });
    let RopeScaling::Longrope { original, long_factor, .. } = scaling(long) else { panic!() };
    assert!(original == 32 && (long_factor - (1.0 + 4f64.ln() / 32f64.ln()).sqrt()).abs() < 1e-12);
    // Hunyuan's alpha is another base.
    let alpha = json!({ "rope_scaling": { "type": "dynamic", "factor": 1.0, "alpha": 1000.0 } });
    let a = with("hunyuan_v1_moe", alpha).unwrap().attention;
    assert_eq!(a.rope.scaling, RopeScaling::None);
    assert!((a.rope_theta / (20_000.0 * 1000f64.powf(8.0 / 6.0)) - 1.0).abs() < 1e-12);
    // DeepSeek's factor on the scores.
    for name in ["deepseek_v2", "deepseek_v3"] {
        let yarn = json!({ "rope_scaling": { "type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0 } });
        let spec = with(name, yarn).unwrap();
        let m = 0.1 * 40f64.ln() + 1.0;
        assert!((spec.attention.scale.unwrap() - m * m / 10f64.sqrt()).abs() < 1e-12, "{name}");
        let back = read(&config_json(&spec, name).unwrap().1).unwrap();
        assert!(
            (back.attention.scale.unwrap() / spec.attention.scale.unwrap() - 1.0).abs() < 1e-12,
            "{name}"
        );
    }
    // All come back from what is written, in every family that is not bound to one kind.
    for table in [
        json!({ "rope_type": "linear", "factor": 2.0 }),
        json!({ "rope_type": "dynamic", "factor": 2.0 }),
        json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "truncate": false }),
        json!({ "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 }),
    ] {
        for name in known().filter(|name| *name != "phimoe") {
            let spec = with(name, json!({ "rope_parameters": table.clone() })).unwrap();
            assert_eq!(read(&config_json(&spec, name).unwrap().1).unwrap(), spec, "{name} {table}");
        }
    }
}

#[test]
fn keys_that_change_the_maths_are_refused_by_name() {
    for (name, key, value) in [
        ("olmoe", "clip_qkv", json!(8.0)),
        ("olmoe", "sliding_window", json!(16)),
        ("qwen3", "use_sliding_window", json!(true)),
        ("llama", "hidden_act", json!("mish")),
        ("llama", "hidden_act", json!(1)),
        ("llama", "quantization_config", json!({ "quant_method": "gptq" })),
        ("qwen3_moe", "decoder_sparse_step", json!(0)),
        ("qwen3_moe", "mlp_only_layers", json!(["1"])),
        ("qwen3_moe", "mlp_only_layers", json!(1)),
        ("qwen3_moe", "num_local_experts", json!(5)),
        ("mixtral", "num_experts", json!(5)),
        ("mixtral", "sliding_window", json!(0)),
        ("dots1", "layer_types", json!(["full_attention"])),
        (
            "dots1",
            "layer_types",
            json!(["linear_attention", "linear_attention", "linear_attention", "linear_attention"]),
        ),
        (
            "dots1",
            "layer_types",
            json!(["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention"]),
        ),
        ("gpt_oss", "swiglu_limit", json!(0.0)),
        ("gpt_oss", "quantization_config", json!({ "quant_method": "fp8" })),
        ("deepseek_v2", "norm_topk_prob", json!(true)),
        ("deepseek_v2", "topk_method", json!("noaux_tc")),
        ("deepseek_v3", "scoring_func", json!("softmax")),
        ("ernie4_5_moe", "moe_layer_interval", json!(0)),
        ("ernie4_5_moe", "moe_layer_end_index", json!(-2)),
        ("phimoe", "num_experts_per_tok", json!(1)),
        ("granitemoe", "logits_scaling", json!(0.0)),
        ("hunyuan_v1_moe", "moe_topk", json!([1, 2])),
        ("minimax_m2", "scoring_func", json!("softmax")),
    ] {
        let text = with(name, json!({ key: value.clone() })).unwrap_err().to_string();
        assert!(text.contains(key) && text.contains("config.json"), "{name} {key} = {value}: {text}");
    }
    // What is only of training, of display, or not known to change anything.
    for (key, value) in [
        ("attention_dropout", json!(0.1)),
        ("output_router_logits", json!(true)),
        ("dtype", json!("float16")),
        ("something_new", json!({ "a": 1 })),
    ] {
        for name in known() {
            assert_eq!(with(name, json!({ key: value.clone() })).unwrap(), read(&base(name)).unwrap());
        }
    }
}

#[test]
fn lies_name_their_key() {
    let keys = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "rope_theta",
        "tie_word_embeddings",
        "hidden_act",
        "eos_token_id",
        "attention_bias",
    ];
    for name in known() {
        for key in keys {
            for value in [json!(-3), json!("12"), json!({}), json!(1e300), json!(2.5)] {
                let is_number = matches!(key, "rms_norm_eps" | "initializer_range" | "rope_theta");
                if is_number && value.as_f64().is_some_and(|x| x > 0.0) {
                    continue;
                }
                let text = with(name, json!({ key: value.clone() })).unwrap_err().to_string();
                assert!(text.contains(key), "{name} {key} = {value}: {text}");
            }
        }
        for key in ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"] {
            if name.starts_with("deepseek") && key == "num_key_value_heads" {
                continue; // Latent attention has none.
            }
            let text = with(name, json!({ key: 0 })).unwrap_err().to_string();
            assert!(text.contains(&format!("{key} = 0")), "{name}: {text}");
        }
        for key in ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"] {
            let text = without(name, key).unwrap_err().to_string();
            assert!(text.contains(&format!("{key} is missing")), "{name}: {text}");
        }
    }
}

#[test]
fn absent_keys_are_what_transformers_takes() {
    let kv = |name: &str| {
        let mut config = base(name);
        config["num_attention_heads"] = json!(32);
        config["head_dim"] = json!(4);
        config["hidden_size"] = json!(128);
        config["num_key_value_heads"] = Value::Null;
        assert_eq!(read(&config).unwrap().attention.kv_heads, 32, "{name}");
        config.as_object_mut().unwrap().remove("num_key_value_heads");
        read(&config).unwrap().attention.kv_heads
    };
    for name in known() {
        let expected = match name {
            "mixtral" | "gpt_oss" | "phimoe" | "glm4_moe" | "minimax_m2" | "mistral" => 8,
            "qwen3_moe" | "ernie4_5_moe" => 4,
            "qwen2_moe" => 16,
            _ => 32,
        };
        assert_eq!(kv(name), expected, "{name}");
    }
    let layers = with("gpt_oss", json!({})).unwrap().attention.window_layers;
    assert_eq!(layers, Some(vec![true, false, true, false]));
    assert_eq!(without("qwen3", "head_dim").unwrap().attention.head_dim, 128);
    assert_eq!(without("qwen3_moe", "head_dim").unwrap().attention.head_dim, 8);
    assert!(without("qwen3_moe", "norm_topk_prob").unwrap().first_moe().is_some_and(|m| !m.router.normalize));
    // Version 5 writes the experts of Qwen3 under another name.
    let mut config = base("qwen3_moe");
    config.as_object_mut().unwrap().remove("num_experts");
    assert!(read(&config).unwrap_err().to_string().contains("num_experts is missing"));
    config["num_local_experts"] = json!(4);
    assert_eq!(read(&config).unwrap(), read(&base("qwen3_moe")).unwrap());
}

#[test]
fn windows_are_those_of_transformers() {
    let window = |name: &str, keys: Value| with(name, keys).map(|spec| spec.attention.window);
    assert_eq!(window("mixtral", json!({ "sliding_window": 7 })).unwrap(), Some(7));
    assert_eq!(window("qwen3_moe", json!({ "sliding_window": 7 })).unwrap(), None);
    assert_eq!(
        window("qwen3_moe", json!({ "use_sliding_window": true, "sliding_window": 7 })).unwrap(),
        Some(7)
    );
    assert!(window("qwen3_moe", json!({ "use_sliding_window": true, "sliding_window": null })).is_err());
    // dots1: layers from max_window_layers on, unless layer_types says it.
    assert_eq!(window("dots1", json!({ "sliding_window": 7 })).unwrap(), None);
    assert_eq!(window("dots1", json!({ "sliding_window": 7, "max_window_layers": 0 })).unwrap(), Some(7));
    let some = with("dots1", json!({ "sliding_window": 7, "max_window_layers": 2 })).unwrap().attention;
    assert_eq!((some.window, some.window_layers), (Some(7), Some(vec![false, false, true, true])));
    assert_eq!(without("dots1", "sliding_window").unwrap().attention.window, None);
    let kinds = |kind: &str| json!({ "sliding_window": 7, "layer_types": [kind, kind, kind, kind] });
    assert_eq!(window("dots1", kinds("full_attention")).unwrap(), None);
    assert_eq!(window("dots1", kinds("sliding_attention")).unwrap(), Some(7));
}

#[test]
fn dense_layers_among_experts() {
    let dense = |name: &str, keys: Value| -> Vec<bool> {
        let spec = with(name, keys).unwrap();
        let (_, config) = config_json(&spec, name).unwrap();
        assert_eq!(read(&config).unwrap(), spec);
        spec.layers.iter().map(|layer| matches!(layer, FfnSpec::Dense(_))).collect()
    };
    assert_eq!(dense("qwen3_moe", json!({ "decoder_sparse_step": 2 })), [true, false, true, false]);
    assert_eq!(dense("qwen3_moe", json!({ "mlp_only_layers": [0, 3, 9] })), [true, false, false, true]);
    assert_eq!(dense("dots1", json!({ "first_k_dense_replace": 2 })), [true, true, false, false]);
    assert_eq!(dense("dots1", json!({ "first_k_dense_replace": 0 })), [false; 4]);
    assert_eq!(dense("ernie4_5_moe", json!({})), [true, false, true, false]);
    assert_eq!(dense("ernie4_5_moe", json!({ "moe_layer_end_index": 2 })), [true, false, true, true]);
    let interval = json!({ "moe_layer_interval": 1, "moe_layer_start_index": 2 });
    assert_eq!(dense("ernie4_5_moe", interval), [true, true, false, false]);
    assert_eq!(dense("deepseek_v3", json!({ "first_k_dense_replace": 3 })), [true, true, true, false]);
}
