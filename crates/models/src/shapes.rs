//! Shapes of known models by name, and random weights for them: what speed is measured on where no checkpoint is at hand.

use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::packing;
use crate::params::{ParamDef, ParamKind, param_defs};
use crate::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_kernels::elements::Matrix;
use senmon_kernels::packed::{Format, pack};
use senmon_moe::RouterConfig;
use senmon_moe::packed::PackedWeight;
use senmon_moe::rng::Stream;

/// Names that [`shape`] knows.
pub const NAMES: [&str; 4] = ["olmoe-1b-7b", "mixtral-8x7b", "mixtral-2k", "qwen3-30b-a3b"];

/// The shape of a model: `olmoe-1b-7b`, `mixtral-8x7b`, `qwen3-30b-a3b` as published, `mixtral-2k` as Mixtral's with H 2048 and I
/// 4096; with another number of layers or another vocabulary where one is given.
pub fn shape(name: &str, layers: Option<usize>, vocab: Option<usize>) -> Result<ModelSpec> {
    struct Facts(usize, usize, usize, usize, usize, [usize; 3], QkNorm, bool, usize);
    // Layers, vocabulary, H, E, K, [heads, heads of keys, I], norms of queries and keys, normalised weights, positions.
    let Facts(
        own_layers,
        own_vocab,
        hidden,
        experts,
        top_k,
        [heads, kv_heads, intermediate],
        qk_norm,
        normalize,
        positions,
    ) = match name {
        "olmoe-1b-7b" => Facts(16, 50_304, 2048, 64, 8, [16, 16, 1024], QkNorm::Full, false, 4096),
        "mixtral-8x7b" => Facts(32, 32_000, 4096, 8, 2, [32, 8, 14_336], QkNorm::None, true, 32_768),
        "mixtral-2k" => Facts(32, 32_000, 2048, 8, 2, [16, 4, 4096], QkNorm::None, true, 4096),
        "qwen3-30b-a3b" => Facts(48, 151_936, 2048, 128, 8, [32, 4, 768], QkNorm::Head, true, 40_960),
        _ => {
            let what = format!("no shape is called {name:?}; there are {}", NAMES.join(", "));
            return Err(ModelError::Option { what });
        }
    };
    let moe = MoeSpec {
        router: RouterConfig { normalize, ..RouterConfig::default() },
        ..MoeSpec::plain(experts, top_k, MlpSpec::gated(intermediate))
    };
    let attention = AttentionSpec { qk_norm, ..AttentionSpec::plain(heads, kv_heads, 128) };
    let layers = vec![FfnSpec::Moe(moe); layers.unwrap_or(own_layers)];
    let spec = ModelSpec {
        max_positions: positions,
        norm_eps: 1e-5,
        ..ModelSpec::plain(vocab.unwrap_or(own_vocab), hidden, attention, layers)
    };
    spec.validate()?;
    Ok(spec)
}

/// Random weights for a model whose packed matrices are in `format` (in `Q8_0` where its blocks do not fit, in f32 where those do
/// not either): each panel is one of a few that were made. In the order of [`param_defs`].
pub fn random_weights(spec: &ModelSpec, format: Format, seed: u64) -> Result<Vec<Weight>> {
    param_defs(spec)
        .iter()
        .enumerate()
        .map(|(index, def)| {
            let stream = Stream::new(&[seed, index as u64]);
            match packing::rows(spec, def) {
                Some(rows) => Ok(Weight::Packed(random_packed(def, rows, format, &stream)?)),
                None if packing::is_router(def) => {
                    Ok(Weight::Packed(random_packed(def, 0, Format::F32, &stream)?))
                }
                None => Ok(Weight::Values(match def.kind {
                    ParamKind::Norm => vec![1.0; def.len()],
                    ParamKind::Bias | ParamKind::State => vec![0.0; def.len()],
                    ParamKind::Weight => {
                        (0..def.len() as u64).map(|i| (0.02 * stream.normal(i)) as f32).collect()
                    }
                })),
            }
        })
        .collect()
}

fn random_packed(def: &ParamDef, rows: usize, format: Format, stream: &Stream) -> Result<PackedWeight> {
    const MADE: usize = 8;
    let k = def.shape.last().copied().unwrap_or(0);
    let rows = if rows == 0 { def.len() / k.max(1) } else { rows };
    let format = [format, Format::Q8_0].into_iter().find(|format| format.fits(k)).unwrap_or(Format::F32);
    let values: Vec<f32> = (0..(MADE * 16 * k) as u64).map(|i| (0.02 * stream.normal(i)) as f32).collect();
    let mut made = vec![0; format.bytes(MADE * 16, k)];
    pack(format, Matrix::plain(&values, MADE * 16, k), &mut made);
    let size = format.panel_bytes(k);
    Ok(PackedWeight::from_bytes(format, &def.shape, rows, |bytes| {
        for (panel, out) in bytes.chunks_exact_mut(size).enumerate() {
            let which = stream.bits(panel as u64) as usize % MADE;
            out.copy_from_slice(&made[which * size..][..size]);
        }
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::{Decoder, Pass};

    #[test]
    fn shapes_have_the_parameters_of_the_published_models() {
        let billions = |name: &str| {
            let spec = shape(name, None, None).unwrap();
            param_defs(&spec).iter().map(ParamDef::len).sum::<usize>() as f64 / 1e9
        };
        assert!((billions("olmoe-1b-7b") - 6.92).abs() < 0.01);
        assert!((billions("mixtral-8x7b") - 46.7).abs() < 0.01);
        assert!((billions("qwen3-30b-a3b") - 30.53).abs() < 0.01);
        let error = shape("mixtral", None, None).unwrap_err().to_string();
        assert!(error.contains("mixtral-8x7b"), "{error}");
    }

    #[test]
    fn random_models_run_in_every_format() {
        let mut spec = shape("qwen3-30b-a3b", Some(1), Some(96)).unwrap();
        let FfnSpec::Moe(moe) = &mut spec.layers[0] else { unreachable!() };
        (moe.experts, moe.expert.intermediate, spec.hidden) = (16, 48, 256);
        for format in Format::ALL {
            let decoder = Decoder::run(&spec, random_weights(&spec, format, 1).unwrap()).unwrap();
            let mut cache = decoder.cache(8).unwrap();
            let logits = decoder.logits(&[1, 2, 3], &mut cache, false, &mut Pass::default()).unwrap();
            let spread = logits.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(logits.len() == 3 * 96 && spread.is_finite() && spread > 0.0, "{format:?}");
        }
    }
}
