//! `config.json` of T5 and Switch, with the tensors of a golden model beside it: it opens and runs, or says why not.

#![allow(clippy::unwrap_used)]

mod common;

use common::{copies, documents, golden, outcome, word};
use senmon_fuzz::{Documents, fuzz};
use senmon_models::audit::Audit;
use senmon_models::seq2seq;
use std::path::Path;

/// Keys that are read and that no golden model has.
const KEYS: [&str; 6] = [
    "decoder_start_token_id",
    "scale_decoder_outputs",
    "router_bias",
    "is_gated_act",
    "num_sparse_encoder_layers",
    "encoder_sparse_step",
];

fn run(folder: &Path) -> String {
    match seq2seq::family_of(folder) {
        Ok(Some(_)) => {}
        Ok(None) => return "another family".to_owned(),
        Err(e) => return word(&e),
    }
    let opened = match seq2seq::open(folder, Audit::Structure) {
        Ok(opened) => opened,
        Err(e) => return word(&e),
    };
    let model = opened.model;
    let encoded = match model.encode(&[1, 2, 3], None) {
        Ok(encoded) => encoded,
        Err(e) => return word(&e),
    };
    outcome(&model.logits(&[1, 2], &encoded, &mut model.cache(), false, None), "runs")
}

#[test]
fn any_configuration_of_an_encoder_decoder_is_a_model_or_refused() {
    let folders = golden(seq2seq::FAMILIES);
    let documents = Documents::new(documents(&folders, "config.json"), &KEYS);
    let place = tempfile::tempdir().unwrap();
    let copies = copies(place.path(), &folders, &["model.safetensors"]);
    let target = |input: &[u8]| {
        let Some((which, value)) = documents.of(input) else { return "no JSON".to_owned() };
        std::fs::write(copies[which].join("config.json"), value.to_string()).unwrap();
        run(&copies[which])
    };
    fuzz("seq2seq", &documents.seeds(), 6_000, target);
}
