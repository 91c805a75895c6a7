//! `config.json` as transformers 4 and 5 write it, and what in it changes the maths.

#![allow(clippy::unwrap_used)]

use senmon_models::Result;
use senmon_models::families::{FAMILIES, Json, best_family, config_json, family};
use senmon_models::spec::{FfnSpec, ModelSpec};
use serde_json::{Value, json};
use std::path::Path;

/// Keys that every family needs.
fn base(name: &str) -> Value {
    let mut config = json!({
        "model_type": name, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "intermediate_size": 48,
        "hidden_act": "silu", "rope_theta": 20000.0, "torch_dtype": "bfloat16", "transformers_version": "4.57.0",
        "use_cache": true, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": false,
        "architectures": ["X"], "bos_token_id": 1, "eos_token_id": 2, "attention_bias": false,
    });
    let more = match name {
        "mixtral" => json!({ "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": null }),
        "olmoe" => {
            json!({ "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": false, "clip_qkv": null })
        }
        "qwen3_moe" => json!({
            "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true, "moe_intermediate_size": 8,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": false, "sliding_window": 4096,
            "max_window_layers": 2, "head_dim": 16,
        }),
        "dots1" => json!({
            "n_routed_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": true, "moe_intermediate_size": 8,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
            "routed_scaling_factor": 2.5, "sliding_window": null, "max_window_layers": 62,
        }),
        "qwen3" => json!({ "use_sliding_window": false, "sliding_window": null, "head_dim": 16 }),
        _ => json!({ "mlp_bias": false }),
    };
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn read(config: &Value) -> Result<ModelSpec> {
    let name = config["model_type"].as_str().unwrap();
    (family(name).unwrap().read)(&Json::new(Path::new("config.json"), config.clone()).unwrap())
}

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

fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.name).filter(|name| *name != "senmon")
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
        ("rope_scaling", json!({ "type": "linear", "factor": 2.0 })),
        ("rope_scaling", json!({ "factor": 2.0 })),
        ("rope_scaling", json!("linear")),
        ("rope_scaling", json!(2.0)),
        ("rope_parameters", json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4 })),
        ("rope_parameters", json!({ "rope_type": 3 })),
        ("rope_parameters", json!({ "rope_theta": "big" })),
        ("rope_parameters", json!({ "rope_theta": 1e4, "partial_rotary_factor": 0.5 })),
        ("rope_parameters", json!({ "full_attention": { "rope_type": "default", "rope_theta": 1e4 } })),
        ("rope_parameters", json!({ "rope_type": "default", "full_attention": { "rope_theta": 1e6 } })),
        ("partial_rotary_factor", json!(0.25)),
        ("rope_theta", json!("10000")),
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!(0)),
    ] {
        for name in known() {
            let text = with(name, json!({ key: value.clone() })).unwrap_err().to_string();
            assert!(text.contains(key) && text.contains("config.json"), "{name} {key} = {value}: {text}");
        }
    }
}

#[test]
fn keys_that_change_the_maths_are_refused_by_name() {
    for (name, key, value) in [
        ("olmoe", "clip_qkv", json!(8.0)),
        ("olmoe", "sliding_window", json!(16)),
        ("llama", "mlp_bias", json!(true)),
        ("qwen3", "use_sliding_window", json!(true)),
        ("llama", "hidden_act", json!("gelu_new")),
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
        (
            "dots1",
            "layer_types",
            json!(["full_attention", "full_attention", "full_attention", "sliding_attention"]),
        ),
    ] {
        let text = with(name, json!({ key: value.clone() })).unwrap_err().to_string();
        assert!(text.contains(key) && text.contains("config.json"), "{name} {key} = {value}: {text}");
    }
    // What is only of training, of display, or not known to change anything.
    for (key, value) in [
        ("attention_dropout", json!(0.1)),
        ("router_jitter_noise", json!(0.1)),
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
    let found: Vec<_> = known().map(|name| (name, kv(name))).collect();
    assert_eq!(
        found,
        [("mixtral", 8), ("olmoe", 32), ("qwen3_moe", 4), ("dots1", 32), ("llama", 32), ("qwen3", 32)]
    );
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
    assert!(window("dots1", json!({ "sliding_window": 7, "max_window_layers": 2 })).is_err());
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
}
