//! Models in GGUF: any metadata and list of tensors before the data of a golden file. Opening ends in the audit, or says why not;
//! a tokenizer is one, or not; and what opens is counted and described.

#![allow(clippy::unwrap_used)]

mod common;

use common::outcome;
use senmon_fuzz::fuzz;
use senmon_models::audit::Audit;
use senmon_models::chat::ChatTemplate;
use senmon_models::checkpoint;
use senmon_models::inspect::describe;
use senmon_models::text::TokenizerSource;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/models/tests/golden/gguf")
}

/// The golden files, each cut where its data begin.
fn files(names: &[&str]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let cut = |name: &&str| {
        let bytes = std::fs::read(folder().join(name)).unwrap();
        let file = senmon_gguf::Gguf::read(&bytes).unwrap();
        let start = file.tensors().iter().map(|tensor| tensor.range.start).min().unwrap_or(bytes.len());
        let (head, data) = bytes.split_at(start);
        (head.to_vec(), data.to_vec())
    };
    names.iter().map(cut).collect()
}

fn seeds(files: &[(Vec<u8>, Vec<u8>)]) -> Vec<Vec<u8>> {
    files.iter().enumerate().map(|(n, (head, _))| [&[n as u8], head.as_slice()].concat()).collect()
}

#[test]
fn any_model_is_opened_or_refused() {
    let files = files(&[
        "llama-mixtral-q8_0.gguf",
        "deepseek2-v3-yarn.gguf",
        "gpt-oss-mxfp4.gguf",
        "phimoe-longrope.gguf",
        "ernie4_5-moe-bf16.gguf",
        "granitemoe-shared.gguf",
    ]);
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("m.gguf");
    let target = |input: &[u8]| {
        let Some((which, head)) = input.split_first() else { return "empty".to_owned() };
        let (_, data) = &files[usize::from(*which) % files.len()];
        // The data where a reader looks for them.
        let mut file = head.to_vec();
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        std::fs::write(&path, file).unwrap();
        let opened = checkpoint::open(&path, Audit::Structure);
        if let Ok(opened) = &opened {
            describe(&opened.spec, &opened.layout.name()).table();
        }
        outcome(&opened, "opens")
    };
    assert_eq!(target(&seeds(&files)[1]), "opens");
    fuzz("gguf_model", &seeds(&files), 3_000, target);
}

#[test]
fn any_tokenizer_is_one_or_refused() {
    let files = files(&["tokenizers/spm.gguf", "tokenizers/bytes.gguf"]);
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("m.gguf");
    let target = |input: &[u8]| {
        let Some((_, bytes)) = input.split_first() else { return "empty".to_owned() };
        std::fs::write(&path, bytes).unwrap();
        let template = ChatTemplate::of_model(&path).map(|_| ());
        let Ok(file) = senmon_gguf::Gguf::read(bytes) else { return outcome(&template, "no template") };
        let metadata = Arc::new(file.into_parts().0);
        let loaded = TokenizerSource::Gguf { path: path.clone(), metadata }.load();
        if let Ok(tokenizer) = &loaded {
            let tokens = tokenizer.encode("it's 12 ▁ naïve\n\n", true);
            let _ = tokens.map(|tokens| tokenizer.decode(tokens.get_ids(), true));
        }
        format!("{} {}", outcome(&template, "template"), outcome(&loaded, "loads"))
    };
    fuzz("gguf_tokenizer", &seeds(&files), 1_000, target);
}
