//! `config.json` of every family: whatever it says, it is a model or an error of one line. What is a model can be counted,
//! listed, described and written; with the tensors of a golden model beside it, it opens and runs, or says why not.

#![allow(clippy::unwrap_used)]

mod common;

use common::{copies, documents, golden, outcome, word};
use senmon_fuzz::{Documents, fuzz};
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::{Decoder, Pass};
use senmon_models::families::{FAMILIES, Family, Json, config_json, family};
use senmon_models::inspect::describe;
use senmon_models::names::parts;
use senmon_models::params::param_defs;
use senmon_models::spec::ModelSpec;
use std::path::Path;

/// Keys that families read and that no golden model has, or few.
const KEYS: [&str; 14] = [
    "quantization_config",
    "auto_map",
    "upcycled",
    "mlp_only_layers",
    "layer_types",
    "sliding_window",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "head_dim",
    "q_lora_rank",
    "num_key_value_heads",
    "max_window_layers",
    "clip_qkv",
];

/// Context of the runs.
const TOKENS: [u32; 3] = [1, 2, 3];

/// What must hold of every model.
fn check(family: &'static Family, spec: &ModelSpec) {
    spec.validate().unwrap();
    let defs = param_defs(spec);
    let parts = parts(spec, &family.names);
    assert!(parts.iter().all(|part| part.offset + part.len() <= defs[part.param].len()));
    let counts = spec.counts();
    assert!(counts.active <= counts.total);
    assert!(!describe(spec, family.name).table().is_empty());
    spec.flops_per_token(1 << 20);
    for family in FAMILIES {
        match config_json(spec, family.name) {
            Ok((_, json)) => {
                let json = Json::new(Path::new("config.json"), json).unwrap();
                let back = (family.read)(&json);
                assert!(back.is_ok(), "{}: {back:?} from {}", family.name, json.value());
            }
            Err(e) => drop(word(&e)),
        }
    }
}

/// Opens what the tensors fit, and runs it.
fn run(folder: &Path) -> String {
    let opened = match checkpoint::open(folder, Audit::Structure) {
        Ok(opened) => opened,
        Err(e) => return word(&e),
    };
    let decoder = match Decoder::run(&opened.spec, opened.weights) {
        Ok(decoder) => decoder,
        Err(e) => return word(&e),
    };
    let tokens: Vec<u32> =
        TOKENS.into_iter().filter(|token| (*token as usize) < decoder.spec().vocab).collect();
    if tokens.is_empty() || tokens.len() > decoder.spec().max_positions {
        return "too small to run".to_owned();
    }
    let mut cache = match decoder.cache(tokens.len()) {
        Ok(cache) => cache,
        Err(e) => return word(&e),
    };
    outcome(&decoder.logits(&tokens, &mut cache, false, &mut Pass::default()), "runs")
}

#[test]
fn any_configuration_is_a_model_or_refused() {
    let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
    let folders = golden(&names);
    let documents = Documents::new(documents(&folders, "config.json"), &KEYS);
    assert_eq!(documents.count(), folders.len());
    // A folder for each golden model, with its tensors.
    let place = tempfile::tempdir().unwrap();
    let copies = copies(place.path(), &folders, &["model.safetensors"]);
    let target = |input: &[u8]| {
        let Some((which, value)) = documents.of(input) else { return "no JSON".to_owned() };
        let text = value.to_string();
        let json = match Json::new(Path::new("config.json"), value) {
            Ok(json) => json,
            Err(e) => return word(&e),
        };
        let kind = match json.text("model_type") {
            Ok(kind) => kind.unwrap_or_default(),
            Err(e) => return word(&e),
        };
        let family = match family(kind) {
            Ok(family) => family,
            Err(e) => return word(&e),
        };
        match (family.read)(&json) {
            Ok(spec) => check(family, &spec),
            Err(e) => return format!("{} {}", family.name, word(&e)),
        }
        std::fs::write(copies[which].join("config.json"), text).unwrap();
        format!("{} {}", family.name, run(&copies[which]))
    };
    fuzz("config", &documents.seeds(), 6_000, target);
}
