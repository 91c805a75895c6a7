//! What flags make of a model that makes texts: another number of experts, how it multiplies, how tokens are chosen.

use crate::cli::{ComputeArgs, TextArgs};
use crate::failure::{Failure, Result};
use senmon_files::available_memory;
use senmon_models::ModelError;
use senmon_models::decoder::{Decoder, Weight};
use senmon_models::generation::{FILE, GenerationDefaults};
use senmon_models::packing::{Packing, Packings};
use senmon_models::penalties::Penalties;
use senmon_models::sampling::Sampling;
use senmon_models::spec::{FfnSpec, ModelSpec};
use senmon_models::text::{Tokenizer, TokenizerSource, check_vocab};

/// How tokens are chosen: by flags, else by the model's `generation_config.json`, else by defaults of our own.
pub(super) struct Choice {
    pub sampling: Sampling,
    pub penalties: Penalties,
    /// Something of it is from the model's file.
    advised: bool,
}

impl Choice {
    /// The choice for a vocabulary of `vocab`, checked.
    pub fn new(args: &TextArgs, advice: &GenerationDefaults, vocab: usize) -> Result<Self> {
        let default = advice.over(&Sampling { seed: args.seed, ..Sampling::default() });
        let sampling = Sampling {
            temperature: args.temperature.unwrap_or(default.temperature),
            top_k: args.top_k.unwrap_or(default.top_k),
            top_p: args.top_p.unwrap_or(default.top_p),
            min_p: args.min_p.unwrap_or(default.min_p),
            seed: args.seed,
        };
        sampling.validate()?;
        let none = Penalties::default();
        let repetition = args.repetition_penalty.or(advice.repetition_penalty);
        let penalties = Penalties {
            repetition: repetition.unwrap_or(none.repetition),
            presence: args.presence_penalty,
            frequency: args.frequency_penalty,
            bias: args.logit_bias.iter().copied().collect(),
        };
        penalties.validate(vocab)?;
        Ok(Self { sampling, penalties, advised: advice.advises() })
    }

    /// For people.
    pub fn words(&self) -> String {
        let s = &self.sampling;
        let mut words = match s.temperature {
            0.0 => vec!["the likeliest token".to_owned()],
            temperature => vec![format!("temperature {temperature}")],
        };
        let limits = [("top-k", s.top_k as f32, 0.0), ("top-p", s.top_p, 1.0), ("min-p", s.min_p, 0.0)];
        for (name, value, off) in limits {
            if value != off && s.temperature != 0.0 {
                words.push(format!("{name} {value}"));
            }
        }
        let p = &self.penalties;
        for (name, value, off) in [
            ("repetition", p.repetition, 1.0),
            ("presence", p.presence, 0.0),
            ("frequency", p.frequency, 0.0),
        ] {
            if value != off {
                words.push(format!("{name} penalty {value}"));
            }
        }
        if self.advised {
            words.push(format!("with {FILE}"));
        }
        words.join(", ")
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Value {
        let (s, p) = (&self.sampling, &self.penalties);
        serde_json::json!({
            "temperature": plain(s.temperature),
            "top_k": s.top_k,
            "top_p": plain(s.top_p),
            "min_p": plain(s.min_p),
            "repetition_penalty": plain(p.repetition),
            "presence_penalty": plain(p.presence),
            "frequency_penalty": plain(p.frequency),
            "seed": s.seed,
            "generation_config": self.advised,
        })
    }
}

/// A number as short as its f32 can be written.
pub(super) fn plain(x: f32) -> Option<f64> {
    x.to_string().parse().ok().filter(|x: &f64| x.is_finite())
}

pub(super) fn tokenizer_of(args: &TextArgs, found: Option<TokenizerSource>) -> Result<TokenizerSource> {
    Ok(found.ok_or_else(|| ModelError::File {
        path: args.from.model.clone(),
        what: "has no tokenizer: text cannot be made of its tokens".into(),
    })?)
}

/// The decoder in a folder, with what the options change of it, its tokenizer, and how its tokens are chosen.
pub(super) fn open_decoder(args: &TextArgs) -> Result<(Decoder, Tokenizer, Choice)> {
    let mut loaded = args.from.open()?;
    if let Some(k) = args.experts_per_token {
        loaded.spec = with_experts_per_token(loaded.spec, k)?;
    }
    // Chat models often say only beside the model what ends a turn.
    for eos in &loaded.generation.eos {
        if !loaded.spec.tokens.eos.contains(eos) {
            loaded.spec.tokens.eos.push(*eos);
        }
    }
    let choice = Choice::new(args, &loaded.generation, loaded.spec.vocab)?;
    let source = tokenizer_of(args, loaded.tokenizer)?;
    let tokenizer = source.load()?;
    check_vocab(&tokenizer, &loaded.spec, source.path())?;
    Ok((decoder(&args.compute, &loaded.spec, loaded.weights)?, tokenizer, choice))
}

/// The model with another number of experts for each token.
fn with_experts_per_token(mut spec: ModelSpec, k: usize) -> Result<ModelSpec> {
    let mut found = false;
    for layer in &mut spec.layers {
        let FfnSpec::Moe(moe) = layer else { continue };
        found = true;
        if k == 0 || k > moe.experts {
            let experts = moe.experts;
            return Err(Failure::mistake(format!(
                "--experts-per-token {k} must be from 1 to the model's {experts} experts"
            )));
        }
        moe.top_k = k;
    }
    if !found {
        return Err(Failure::mistake(format!("--experts-per-token {k}: the model has no experts")));
    }
    spec.validate()?;
    Ok(spec)
}

/// A decoder of these weights that multiplies so. A model that would not fit into memory packed runs as it is stored, and that is
/// said.
pub(super) fn decoder(compute: &ComputeArgs, spec: &ModelSpec, weights: Vec<Weight>) -> Result<Decoder> {
    if compute.exact {
        return Ok(Decoder::run(spec, weights)?);
    }
    let needed = Packings::plan(spec, &weights, compute.quantize).bytes;
    // What else is needed, caches and activations, is small beside weights.
    if let Some(free) = available_memory().filter(|free| needed > free / 10 * 9) {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        if let Some(ty) = compute.quantize {
            return Err(Failure::mistake(format!(
                "--quantize {}: the weights would take {:.1} GB, {:.1} GB of memory are free",
                ty.name().to_lowercase(),
                gb(needed),
                gb(free)
            )));
        }
        eprintln!(
            "{:.1} GB of weights do not fit into {:.1} GB of free memory: they are used where they lie in the files, which is \
             slower (--quantize q4_k takes less)",
            gb(needed),
            gb(free)
        );
        return Ok(Decoder::run(spec, weights)?);
    }
    let packing = compute.quantize.map_or(Packing::Packed, Packing::Coded);
    Ok(Decoder::run_as(spec, weights, packing)?)
}
