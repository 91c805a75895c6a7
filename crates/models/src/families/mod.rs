//! The layouts that checkpoints come in. A family is a file that reads a `config.json` into a [`ModelSpec`] and writes one
//! back where the family says the model exactly, and a row of [`FAMILIES`].

mod common;
mod deepseek;
mod dots1;
mod ernie4_5_moe;
mod flex_olmo;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod hunyuan_v1_moe;
mod llama;
mod minimax_m2;
mod mistral;
mod mixtral;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rope;
mod senmon;

use crate::error::{ModelError, Result};
use crate::names::{Names, PLAIN};
use crate::spec::ModelSpec;
use common::Written;
pub use common::{Json, activation_named};
use serde_json::Value;

/// A layout.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub name: &'static str,
    /// The class that transformers loads it with.
    pub architecture: &'static str,
    /// What its tensors are called.
    pub names: Names,
    /// From `config.json`.
    pub read: fn(&Json) -> Result<ModelSpec>,
    /// To `config.json`; or the field that the family has no word for.
    pub write: fn(&ModelSpec) -> Written,
}

/// All families, those that transformers knows first.
pub const FAMILIES: &[Family] = &[
    Family {
        name: "mixtral",
        architecture: "MixtralForCausalLM",
        names: mixtral::NAMES,
        read: mixtral::read,
        write: mixtral::write,
    },
    Family {
        name: "olmoe",
        architecture: "OlmoeForCausalLM",
        names: PLAIN,
        read: olmoe::read,
        write: olmoe::write,
    },
    Family {
        name: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        names: PLAIN,
        read: qwen3_moe::read,
        write: qwen3_moe::write,
    },
    Family {
        name: "dots1",
        architecture: "Dots1ForCausalLM",
        names: PLAIN,
        read: dots1::read,
        write: dots1::write,
    },
    Family {
        name: "flex_olmo",
        architecture: "FlexOlmoForCausalLM",
        names: flex_olmo::NAMES,
        read: flex_olmo::read,
        write: flex_olmo::write,
    },
    Family {
        name: "qwen2_moe",
        architecture: "Qwen2MoeForCausalLM",
        names: qwen2_moe::NAMES,
        read: qwen2_moe::read,
        write: qwen2_moe::write,
    },
    Family {
        name: "deepseek_v2",
        architecture: "DeepseekV2ForCausalLM",
        names: PLAIN,
        read: deepseek::read_v2,
        write: deepseek::write_v2,
    },
    Family {
        name: "deepseek_v3",
        architecture: "DeepseekV3ForCausalLM",
        names: PLAIN,
        read: deepseek::read_v3,
        write: deepseek::write_v3,
    },
    Family {
        name: "gpt_oss",
        architecture: "GptOssForCausalLM",
        names: gpt_oss::NAMES,
        read: gpt_oss::read,
        write: gpt_oss::write,
    },
    Family {
        name: "granitemoe",
        architecture: "GraniteMoeForCausalLM",
        names: granitemoe::NAMES,
        read: granitemoe::read,
        write: granitemoe::write,
    },
    Family {
        name: "granitemoeshared",
        architecture: "GraniteMoeSharedForCausalLM",
        names: granitemoe::NAMES,
        read: granitemoe::read_shared,
        write: granitemoe::write_shared,
    },
    Family {
        name: "phimoe",
        architecture: "PhimoeForCausalLM",
        names: phimoe::NAMES,
        read: phimoe::read,
        write: phimoe::write,
    },
    Family {
        name: "ernie4_5_moe",
        architecture: "Ernie4_5_MoeForCausalLM",
        names: ernie4_5_moe::NAMES,
        read: ernie4_5_moe::read,
        write: ernie4_5_moe::write,
    },
    Family {
        name: "glm4_moe",
        architecture: "Glm4MoeForCausalLM",
        names: PLAIN,
        read: glm4_moe::read,
        write: glm4_moe::write,
    },
    Family {
        name: "hunyuan_v1_moe",
        architecture: "HunYuanMoEV1ForCausalLM",
        names: hunyuan_v1_moe::NAMES,
        read: hunyuan_v1_moe::read,
        write: hunyuan_v1_moe::write,
    },
    Family {
        name: "minimax_m2",
        architecture: "MiniMaxM2ForCausalLM",
        names: minimax_m2::NAMES,
        read: minimax_m2::read,
        write: minimax_m2::write,
    },
    Family {
        name: "llama",
        architecture: "LlamaForCausalLM",
        names: PLAIN,
        read: llama::read,
        write: llama::write,
    },
    Family {
        name: "mistral",
        architecture: "MistralForCausalLM",
        names: PLAIN,
        read: mistral::read,
        write: mistral::write,
    },
    Family {
        name: "qwen3",
        architecture: "Qwen3ForCausalLM",
        names: PLAIN,
        read: qwen3::read,
        write: qwen3::write,
    },
    Family {
        name: "senmon",
        architecture: "SenmonForCausalLM",
        names: PLAIN,
        read: senmon::read,
        write: senmon::write,
    },
];

/// The family of that name; the error names the nearest ones.
pub fn family(name: &str) -> Result<&'static Family> {
    if crate::seq2seq::FAMILIES.contains(&name) {
        let what =
            format!("\"{name}\" is an encoder-decoder: `logits` and `generate` run it, nothing else does");
        return Err(ModelError::Option { what });
    }
    FAMILIES.iter().find(|family| family.name == name).ok_or_else(|| {
        let near = nearest(name, FAMILIES.iter().map(|family| family.name));
        ModelError::Option { what: format!("model family \"{name}\" is not known; the nearest are {near}") }
    })
}

/// The three of some names that are most like `name`.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    let mut near: Vec<_> = names.map(|known| (strsim::jaro_winkler(name, known), known)).collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    let near: Vec<_> = near.iter().take(3).map(|(_, known)| *known).collect();
    near.join(", ")
}

/// The first family that says the model exactly.
pub fn best_family(spec: &ModelSpec) -> &'static Family {
    let plain = spec.at_inference();
    let exact = FAMILIES.iter().find(|family| (family.write)(&plain).is_ok());
    exact.unwrap_or(&FAMILIES[FAMILIES.len() - 1])
}

/// The `config.json` of the model in the layout `name` (`auto`: the best), and the family.
pub fn config_json(spec: &ModelSpec, name: &str) -> Result<(&'static Family, Value)> {
    let chosen = if name == "auto" { best_family(spec) } else { family(name)? };
    // Layouts of other projects say what runs; how it was trained stays with the run.
    let written =
        if chosen.name == "senmon" { (chosen.write)(spec) } else { (chosen.write)(&spec.at_inference()) };
    let mut value = written.map_err(|what| ModelError::Layout { family: chosen.name.into(), what })?;
    value.insert("model_type".into(), chosen.name.into());
    value.insert("architectures".into(), vec![chosen.architecture].into());
    Ok((chosen, Value::Object(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::test_spec;
    use std::path::Path;

    /// What a family can say comes back as it was, up to names of the same routing.
    #[test]
    fn specifications_survive_their_families() {
        let mut seen = std::collections::BTreeMap::new();
        for seed in 0..12_000 {
            let mut spec = test_spec(seed);
            // Families need one kind of layer and gated MLPs more often than chance gives them.
            if seed % 2 == 0 {
                let first = spec.layers[seed as usize / 2 % 3].clone();
                spec.layers = vec![first; 3];
            }
            spec.attention.out_bias = spec.attention.qkv_bias;
            if seed % 5 < 2 {
                spec.hidden = spec.attention.heads * spec.attention.head_dim;
            }
            if seed % 3 > 0 {
                spec.attention.qkv_bias = false;
                spec.attention.out_bias = false;
            }
            for family in FAMILIES {
                let Ok((_, json)) = config_json(&spec, family.name) else { continue };
                let json = Json::new(Path::new("config.json"), json).unwrap();
                let back = (family.read)(&json).unwrap();
                let (_, again) = config_json(&back, family.name).unwrap();
                assert_eq!(json.value(), &again, "{} {spec:?}", family.name);
                assert_eq!(
                    crate::params::param_defs(&back),
                    crate::params::param_defs(&spec),
                    "{}",
                    family.name
                );
                *seen.entry(family.name).or_insert(0) += 1;
            }
        }
        // The other families need what chance does not give; `tests/families.rs` has them.
        let plain = ["mixtral", "olmoe", "qwen3_moe", "dots1", "llama", "qwen3", "senmon"];
        assert!(plain.iter().all(|name| seen.get(name).copied().unwrap_or(0) > 5), "{seen:?}");
    }

    #[test]
    fn an_unknown_family_names_its_neighbours() {
        let text = family("qwen3-moe").unwrap_err().to_string();
        assert!(text.contains("qwen3-moe") && text.contains("qwen3_moe"), "{text}");
    }

    #[test]
    fn what_a_configuration_lies_about_is_named() {
        let spec = ModelSpec { vocab: 64, ..test_spec(3) };
        let (_, good) = config_json(&spec, "senmon").unwrap();
        assert!((family("senmon").unwrap().read)(&Json::new(Path::new("c"), good).unwrap()).is_ok());
        let mixtral = serde_json::json!({
            "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        });
        let read = |key: &str, value: Value| {
            let mut json = mixtral.clone();
            json[key] = value;
            (family("mixtral").unwrap().read)(&Json::new(Path::new("config.json"), json).unwrap())
        };
        assert!(read("hidden_act", "silu".into()).is_ok());
        for (key, value) in [
            ("hidden_size", (-1).into()),
            ("hidden_size", "32".into()),
            ("num_hidden_layers", 0.into()),
            ("num_hidden_layers", 99_999_999_999u64.into()),
            ("num_experts_per_tok", 5.into()),
            ("num_key_value_heads", 3.into()),
            ("hidden_act", "swish2".into()),
            ("rope_scaling", serde_json::json!({"rope_type": "yarn2", "factor": 4.0})),
            ("rms_norm_eps", Value::Null),
        ] {
            let text = read(key, value.clone()).unwrap_err().to_string();
            let named = text.contains(key)
                || text.contains("top_k")
                || text.contains("kv_heads")
                || text.contains("layers");
            assert!(named, "{key} = {value}: {text}");
        }
    }
}
