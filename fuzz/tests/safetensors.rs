//! Safetensors: any header before the tensors of a golden model, and any index of two files of them. Loading either ends in the
//! audit, or says why not.

#![allow(clippy::unwrap_used)]

mod common;

use common::{copies, golden, outcome};
use senmon_fuzz::fuzz;
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use std::path::{Path, PathBuf};

/// Models with a tensor for each expert, with fused ones, and with packed ones.
const MODELS: [&str; 5] = [
    "mixtral-top2",
    "granitemoe-multipliers-dynamic",
    "gpt_oss-mxfp4",
    "llama-plain",
    "deepseek_v3-groups-yarn",
];

/// The files of a model.
const BOTH: [&str; 2] = ["config.json", "model.safetensors"];

/// Where a file's header ends.
fn header_end(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize
}

/// Loads it to be trained, and opens it to be run.
fn load(folder: &Path) -> String {
    let loaded = checkpoint::load(folder);
    let opened = checkpoint::open(folder, Audit::Structure);
    assert!(loaded.is_err() || opened.is_ok(), "what loads, opens: {:?}", opened.err());
    format!("{} {}", outcome(&loaded, "loads"), outcome(&opened, "opens"))
}

#[test]
fn any_header_is_read_or_refused() {
    let place = tempfile::tempdir().unwrap();
    let models: Vec<_> = copies(place.path(), &golden(&MODELS), &BOTH)
        .into_iter()
        .map(|folder| {
            let file = std::fs::read(folder.join("model.safetensors")).unwrap();
            let (header, data) = file.split_at(header_end(&file));
            (folder, header.to_vec(), data.to_vec())
        })
        .collect();
    // The first byte says whose tensors follow; the others are the file up to there.
    let seed = |(n, (_, header, _)): (usize, &(PathBuf, Vec<u8>, Vec<u8>))| {
        let mut seed = vec![n as u8];
        seed.extend(header);
        seed
    };
    let seeds: Vec<Vec<u8>> = models.iter().enumerate().map(seed).collect();
    let target = |input: &[u8]| {
        let Some((which, header)) = input.split_first() else { return "empty".to_owned() };
        let (folder, _, data) = &models[usize::from(*which) % models.len()];
        let mut file = header.to_vec();
        // A length that is right, more often than chance would have it.
        if which & 0x80 == 0 && file.len() >= 8 {
            let length = (file.len() - 8) as u64;
            file[..8].copy_from_slice(&length.to_le_bytes());
        }
        file.extend(data);
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
        load(folder)
    };
    fuzz("safetensors", &seeds, 4_000, target);
}

#[test]
fn any_index_is_read_or_refused() {
    let place = tempfile::tempdir().unwrap();
    let folder = copies(place.path(), &golden(&MODELS), &BOTH).remove(0);
    let file = std::fs::read(folder.join("model.safetensors")).unwrap();
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let (header, data) = file.split_at(header_end(&file));
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&header[8..]).unwrap();
    // Two files, each with half of the tensors.
    let mut tensors: Vec<_> = header.into_iter().filter(|(name, _)| name != "__metadata__").collect();
    tensors.sort_by_key(|(_, info)| info["data_offsets"][0].as_u64());
    let mut map = serde_json::Map::new();
    for (n, half) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("part-{n}.safetensors");
        let offset = |info: &serde_json::Value, at: usize| info["data_offsets"][at].as_u64().unwrap();
        let (first, last) = (offset(&half[0].1, 0), offset(&half[half.len() - 1].1, 1));
        let mut header = serde_json::Map::new();
        for (tensor, info) in half {
            let mut info = info.clone();
            info["data_offsets"] = serde_json::json!([offset(&info, 0) - first, offset(&info, 1) - first]);
            header.insert(tensor.clone(), info);
            map.insert(tensor.clone(), name.as_str().into());
        }
        let header = serde_json::Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(&data[first as usize..last as usize]);
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map }).to_string();
    let path = folder.join("model.safetensors.index.json");
    let target = |input: &[u8]| {
        std::fs::write(&path, input).unwrap();
        load(&folder)
    };
    assert_eq!(target(index.as_bytes()), "loads opens");
    fuzz("index", &[index.into_bytes()], 4_000, target);
}
