//! `senmon route`: from logits in a file to a routing in a file, and what is said of files that do not fit.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Place, json, refused};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A safetensors file of these f32 tensors.
fn write(place: &Place, name: &str, tensors: &[(&str, &[usize], Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    std::fs::write(place.path(name), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn logits() -> Vec<f32> {
    // Token 0 wants 2 then 0, token 1 wants 2 then 1, token 2 wants 2 then 3.
    vec![1.0, 0.0, 3.0, -1.0, 0.0, 1.5, 3.5, -1.0, 0.0, -1.0, 2.5, 1.0]
}

const OUT: &str = "--out o.safetensors --json --threads 1";

#[test]
fn logits_become_experts_weights_and_losses() {
    let place = Place::new();
    write(&place, "z.safetensors", &[("logits", &[3, 4], logits())]);
    let said = json(place.senmon(&format!(
        "route --logits z.safetensors --set experts.count=4 --set router.capacity=1.0 --train {OUT}"
    )));
    // C = 2: the third first choice of expert 2 finds no place.
    assert_eq!(said["load"], serde_json::json!([1, 1, 2, 1]));
    assert_eq!(said["picked"], serde_json::json!([1, 1, 3, 1]));
    assert_eq!(said["dropped"], 1);
    let aux = said["losses"]["aux"]["value"].as_f64().unwrap();
    let soft = |row: &[f32]| {
        let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
        row.iter().map(|z| f64::from(*z).exp() / sum).collect::<Vec<_>>()
    };
    let mean = |e: usize| logits().chunks(4).map(|row| soft(row)[e]).sum::<f64>() / 3.0;
    let want = 4.0 * (mean(0) + mean(1) + 3.0 * mean(2) + mean(3)) / 6.0;
    assert!((aux - want).abs() < 1e-6, "{aux} {want}");

    let bytes = std::fs::read(place.path("o.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let experts = file.tensor("experts").unwrap();
    assert_eq!((experts.dtype(), experts.shape()), (Dtype::I32, &[3, 2][..]));
    let numbers: Vec<i32> =
        experts.data().chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(numbers, [2, 0, 2, 1, -1, 3]);
    let weights = file.tensor("weights").unwrap();
    let last = &weights.data()[16..];
    assert_eq!(f32::from_le_bytes([last[0], last[1], last[2], last[3]]), 0.0);
    assert_eq!(file.tensor("load").unwrap().shape(), [4]);

    // Not in training there is no bound.
    let said = json(place.senmon(&format!(
        "route --logits z.safetensors --set experts.count=4 --set router.capacity=1.0 {OUT}"
    )));
    assert_eq!((&said["dropped"], &said["load"]), (&0.into(), &serde_json::json!([1, 1, 3, 1])));

    // A file says the same as flags, and kinds that look at later tokens need no leave here.
    std::fs::write(place.path("run.toml"), "[experts]\ncount = 4\n[router]\nkind = \"expert_choice\"\n")
        .unwrap();
    let said = json(place.senmon(&format!("route --config run.toml --logits z.safetensors {OUT}")));
    assert_eq!(said["load"], serde_json::json!([2, 2, 2, 2]));
}

#[test]
fn files_that_do_not_fit_are_told() {
    let place = Place::new();
    write(&place, "z.safetensors", &[("logits", &[3, 4], logits())]);
    write(&place, "flat.safetensors", &[("logits", &[12], logits())]);
    write(&place, "none.safetensors", &[("scores", &[3, 4], logits())]);
    write(&place, "bias.safetensors", &[("logits", &[3, 4], logits()), ("bias", &[3], vec![0.0; 3])]);
    write(&place, "noise.safetensors", &[("logits", &[3, 4], logits()), ("noise", &[2], vec![0.0; 2])]);
    std::fs::write(place.path("broken.safetensors"), b"nothing of the kind").unwrap();
    let route = |file: &str, more: &str| {
        place.senmon(&format!("route --logits {file} --set experts.count=4 {more} {OUT}"))
    };
    refused(route("nowhere.safetensors", ""), &["nowhere.safetensors"]);
    refused(route("broken.safetensors", ""), &["broken.safetensors", "not a whole safetensors file"]);
    refused(route("none.safetensors", ""), &["none.safetensors", "`logits`"]);
    refused(route("flat.safetensors", ""), &["flat.safetensors", "[12]", "[T, E]"]);
    refused(route("z.safetensors", "--set experts.count=8"), &["[3, 4]", "[T, 8]"]);
    refused(route("bias.safetensors", "--set router.kind=sigmoid_bias"), &["`bias`", "3", "4"]);
    refused(route("noise.safetensors", ""), &["`noise`", "2", "12"]);
    refused(route("z.safetensors", "--set router.kind=hash"), &["hash", "token ids"]);
    refused(route("z.safetensors", "--set router.kind=noisy_topk --train"), &["noise_std"]);
    refused(route("z.safetensors", "--set router.knd=hash"), &["knd"]);
    assert!(!place.path("o.safetensors").exists());
}
