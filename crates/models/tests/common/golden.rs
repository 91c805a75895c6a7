//! Golden files: what an independent implementation computes with a checkpoint, and how Senmon is held against it.

#![allow(dead_code)]

use safetensors::SafeTensors;
use senmon_models::audit::Audit;
use senmon_models::checkpoint;
use senmon_models::decoder::{Cache, Decoder, Pass};
use senmon_models::rope::RopeScaling;
use senmon_moe::{Routing, RoutingObserver};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The tensors of a safetensors file: shapes and bytes by name.
pub fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// What the golden file of a folder holds.
pub struct Golden {
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Golden {
    /// That of a folder.
    pub fn of(folder: &Path) -> Self {
        Self { tensors: tensors(&folder.join("golden.safetensors")) }
    }

    fn words(&self, name: &str) -> impl Iterator<Item = [u8; 4]> {
        self.tensors[name].1.as_chunks::<4>().0.to_vec().into_iter()
    }

    /// Ids.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.words(name).map(u32::from_le_bytes).collect()
    }

    /// Numbers.
    pub fn numbers(&self, name: &str) -> Vec<f32> {
        self.words(name).map(f32::from_le_bytes).collect()
    }
}

/// The largest difference, as a part of the largest expected.
pub fn off(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()));
    let greatest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |a, b| a.max(b.abs()));
    let off = greatest(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    off / greatest(&mut expected.iter().copied())
}

pub const BOUND: f32 = 1e-4;

/// The routing of every layer: for each token, experts and weights.
#[derive(Default)]
pub struct Seen(BTreeMap<usize, Vec<Vec<(u32, f32)>>>);

impl RoutingObserver for Seen {
    fn routed(&mut self, layer: usize, routing: &Routing) {
        let weights: Vec<f32> = routing.weights.flatten_all().unwrap().to_vec1().unwrap();
        for (experts, weights) in routing.experts.chunks(routing.top_k).zip(weights.chunks(routing.top_k)) {
            let slots = experts.iter().copied().zip(weights.iter().copied());
            self.0.entry(layer).or_default().push(slots.collect());
        }
    }
}

/// A model computes what its golden file says: logits, the routing of every layer, the tokens that follow greedily; its values
/// loaded, and from the file token by token, which give the same `bits` or nearly the same numbers.
pub fn follows(model: &Path, golden: &Golden, bits: bool) -> Result<(), String> {
    let loaded = checkpoint::load(model).map_err(|e| e.to_string())?;
    let decoder = Decoder::new(&loaded.spec, loaded.params, false).map_err(|e| e.to_string())?;
    let tokens = golden.ids("tokens");
    let mut seen = Seen::default();
    let run = |tokens: &[u32], cache: &mut Cache, seen: Option<&mut dyn RoutingObserver>| {
        decoder.logits(tokens, cache, false, &mut Pass { observer: seen, ..Pass::default() }).unwrap()
    };
    let whole = run(&tokens, &mut decoder.cache(tokens.len()).unwrap(), Some(&mut seen));
    let far = off(&whole, &golden.numbers("logits"));
    println!("{}: {far:.1e} of the largest", model.file_name().unwrap().display());
    if far > BOUND {
        return Err(format!("logits are {far:.1e} off"));
    }
    for (layer, rows) in &seen.0 {
        let (experts, weights) = (format!("experts.{layer}"), format!("weights.{layer}"));
        let k = golden.tensors[&experts].0[1];
        let (experts, weights) = (golden.ids(&experts), golden.numbers(&weights));
        for (t, row) in rows.iter().enumerate() {
            let wanted: Vec<_> =
                experts[t * k..][..k].iter().copied().zip(weights[t * k..].iter().copied()).collect();
            let there = |(expert, weight): &(u32, f32)| {
                row.iter().any(|(e, w)| e == expert && (w - weight).abs() <= 1e-5)
            };
            if row.len() != k || !wanted.iter().all(there) {
                return Err(format!("layer {layer}, token {t}: {row:?}, not {wanted:?}"));
            }
        }
    }
    let layers = golden.tensors.keys().filter(|name| name.starts_with("experts.")).count();
    if layers != seen.0.len() {
        return Err(format!("{} layers routed, not {layers}", seen.0.len()));
    }
    // The same bits from matrices that stay in the file, and token by token; then the tokens that follow.
    let opened = checkpoint::open(model, Audit::Full).map_err(|e| e.to_string())?;
    let decoder = Decoder::run(&opened.spec, opened.weights).map_err(|e| e.to_string())?;
    let greedy = golden.ids("greedy");
    let growing = matches!(
        opened.spec.attention.rope.scaling,
        RopeScaling::Dynamic { original, .. } if tokens.len() + greedy.len() > original
    );
    let mut cache = decoder.cache(tokens.len()).unwrap();
    let mut steps = Vec::new();
    for token in &tokens {
        steps.extend(decoder.logits(&[*token], &mut cache, false, &mut Pass::default()).unwrap());
    }
    if bits && steps != whole || off(&steps, &whole) > BOUND {
        return Err(format!("token by token, from the file: {:.1e} off", off(&steps, &whole)));
    }
    let (mut text, mut last) = (tokens.clone(), whole[(tokens.len() - 1) * opened.spec.vocab..].to_vec());
    let most = opened.spec.max_positions;
    let mut cache = decoder.cache((tokens.len() + greedy.len()).min(most)).unwrap();
    decoder.logits(&tokens, &mut cache, true, &mut Pass::default()).unwrap();
    for (n, want) in greedy.iter().enumerate() {
        let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap() as u32;
        if best != *want {
            return Err(format!("token {n} of the continuation is {best}, not {want}"));
        }
        text.push(best);
        if text.len() > most {
            break;
        }
        last = if growing {
            // Speeds follow the length of the text: the oracle computed it anew for each token.
            let mut cache = decoder.cache(text.len()).unwrap();
            decoder.logits(&text, &mut cache, true, &mut Pass::default()).unwrap()
        } else {
            decoder.logits(&[best], &mut cache, true, &mut Pass::default()).unwrap()
        };
    }
    Ok(())
}
