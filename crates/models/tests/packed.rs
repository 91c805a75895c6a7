//! Models with packed weights against the same models whose weights are decoded at each product.

#![allow(clippy::unwrap_used)]

mod golden_files;

use golden_files::{Golden, folders, off};
use senmon_kernels::packed::Format;
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::{Decoder, Pass, Slot};
use senmon_models::packing::{Packing, Packings};
use senmon_models::shapes::{random_weights, shape};
use senmon_models::spec::FfnSpec;
use std::path::Path;

fn open(path: &Path, packing: Packing) -> Decoder {
    let opened = checkpoint::open(path, Audit::Structure).unwrap();
    Decoder::run_as(&opened.spec, opened.weights, packing).unwrap()
}

fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let mut cache = decoder.cache(tokens.len()).unwrap();
    decoder.logits(tokens, &mut cache, false, &mut Pass::default()).unwrap()
}

/// The median over tokens of how far their logits are off: where two experts are nearly as good, rounding may choose the other, and
/// such a token is far off.
fn median_off(got: &[f32], want: &[f32], vocab: usize) -> f32 {
    let mut offs: Vec<f32> =
        got.chunks(vocab).zip(want.chunks(vocab)).map(|(got, want)| off(got, want)).collect();
    offs.sort_by(f32::total_cmp);
    offs[offs.len() / 2]
}

/// Formats that a decoder's weights are packed in, but for routers: they are always in f32.
fn formats(decoder: &Decoder) -> Vec<Format> {
    let params = decoder.slots().iter().filter_map(|slot| match slot {
        Slot::Param(param) if param.name().ends_with(".router") => None,
        Slot::Param(param) => param.as_packed().map(|packed| packed.format()),
        Slot::State(_) => None,
    });
    let mut formats: Vec<Format> = params.collect();
    formats.sort_by_key(|format| format!("{format:?}"));
    formats.dedup();
    formats
}

#[test]
fn families_in_f32_have_the_same_bits_packed() {
    let mut seen = 0;
    for folder in folders() {
        if checkpoint::load_spec(&folder).is_err() {
            continue;
        }
        let tokens = Golden::of(&folder).ids("tokens");
        let (exact, packed) = (open(&folder, Packing::Exact), open(&folder, Packing::Packed));
        let found = formats(&packed);
        let (want, got) = (logits(&exact, &tokens), logits(&packed, &tokens));
        let name = folder.file_name().unwrap().to_str().unwrap();
        match found.as_slice() {
            // A bias is added to the sum; exact products start from it.
            [Format::F32] if exact.spec().attention.qkv_bias => {
                assert!(off(&got, &want) < 3e-6, "{name}: {:.1e} off", off(&got, &want));
            }
            [Format::F32] => assert!(want == got, "{name}: {:.1e} off", off(&got, &want)),
            // gpt-oss with its experts in four bits: activations have eight.
            [Format::F32, Format::Mxfp4] | [Format::Bf16, Format::Mxfp4] => {
                assert!(off(&got, &want) < 0.03, "{name}: {:.1e} off", off(&got, &want));
            }
            other => panic!("{name}: {other:?}"),
        }
        seen += 1;
    }
    assert!(seen > 30, "{seen} families");
}

#[test]
fn gguf_models_are_as_near_as_their_activations_are_rounded() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf");
    let mut coded = 0;
    for entry in std::fs::read_dir(golden).unwrap() {
        let path = entry.unwrap().path();
        let first = path.to_str().is_some_and(|path| !path.contains("-of-") || path.contains("-00001-of-"));
        if path.extension().is_none_or(|e| e != "gguf") || !first || checkpoint::load_spec(&path).is_err() {
            continue;
        }
        let (exact, packed) = (open(&path, Packing::Exact), open(&path, Packing::Packed));
        let vocab = exact.spec().vocab as u32;
        let tokens: Vec<u32> = (0..24).map(|i| (i * 37 + 11) % vocab).collect();
        let off = median_off(&logits(&packed, &tokens), &logits(&exact, &tokens), vocab as usize);
        let found = formats(&packed);
        coded += usize::from(found.iter().any(|format| !matches!(format, Format::F32 | Format::F16)));
        assert!(off < 0.05, "{}: {off:.1e} off, {found:?}", path.display());
    }
    assert!(coded >= 3, "{coded} files with coded weights");
}

/// A small model of Qwen3's shape, whose sums fit every format.
fn small(format: Format) -> Decoder {
    let mut spec = shape("qwen3-30b-a3b", Some(2), Some(160)).unwrap();
    spec.hidden = 256;
    for layer in &mut spec.layers {
        let FfnSpec::Moe(moe) = layer else { unreachable!() };
        (moe.experts, moe.top_k, moe.expert.intermediate) = (8, 2, 256);
    }
    spec.attention.heads = 2;
    spec.attention.kv_heads = 1;
    Decoder::run(&spec, random_weights(&spec, format, 3).unwrap()).unwrap()
}

#[test]
fn every_format_is_near_the_model_of_its_decoded_weights() {
    for format in Format::ALL {
        let packed = small(format);
        let decoded = Decoder::new(packed.spec(), packed.values().unwrap(), false).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| (i * 53 + 7) % 160).collect();
        let off = median_off(&logits(&packed, &tokens), &logits(&decoded, &tokens), 160);
        let bound = if matches!(format, Format::F32 | Format::F16) { 1e-5 } else { 0.02 };
        assert!(off < bound, "{format:?}: {off:.1e}");
    }
}

#[test]
fn tokens_one_by_one_and_beside_others_have_the_bits_of_the_prompt_at_once() {
    for format in Format::ALL {
        let decoder = small(format);
        let tokens: Vec<u32> = (0..33).map(|i| (i * 53 + 7) % 160).collect();
        let whole = logits(&decoder, &tokens);
        let (mut cache, mut other) = (decoder.cache(33).unwrap(), decoder.cache(33).unwrap());
        let mut found = Vec::new();
        for (n, token) in tokens.iter().enumerate() {
            let beside = &tokens[..if n % 3 == 0 { 0 } else { 1 }];
            let mut caches = [&mut other, &mut cache];
            let both =
                decoder.logits_batch(&[beside, &[*token]], &mut caches, false, &mut Pass::default()).unwrap();
            found.extend_from_slice(&both[1]);
        }
        assert!(found == whole, "{format:?}");
    }
}

#[test]
fn weights_are_coded_when_they_are_loaded() {
    use senmon_kernels::blocks::ElementType;
    let dir = tempfile::tempdir().unwrap();
    let spec = small(Format::F32).spec().clone();
    let values = senmon_models::params::initial_values(&spec, 5);
    let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
    checkpoint::save(dir.path(), &spec, &values, "auto").unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * 53 + 7) % 160).collect();
    let want = logits(&open(dir.path(), Packing::Exact), &tokens);
    let opened = checkpoint::open(dir.path(), Audit::Structure).unwrap();
    let bytes = |to| Packings::plan(&spec, &opened.weights, to).bytes;
    for (ty, has, bound) in [
        (ElementType::Q8_0, vec![Format::Q8_0], 0.05),
        (ElementType::Q4K, vec![Format::Q4K, Format::Q6K], 0.3),
    ] {
        let coded = open(dir.path(), Packing::Coded(ty));
        assert_eq!(formats(&coded), has);
        let off = median_off(&logits(&coded, &tokens), &want, 160);
        assert!(off < bound, "{ty}: {off:.1e}");
        assert!(bytes(Some(ty)) < bytes(None) / 3);
    }
}
