//! Rotary positions in GGUF: a kind and its numbers in the metadata, divisors of the speeds in tensors.

use super::arch::{RopeOrder, Special};
use super::metadata::Keys;
use crate::error::Result;
use crate::rope::{RopeScaling, RopeSpec, yarn_mscale};
use crate::spec::ModelSpec;
use senmon_gguf::Value;

/// Divisors of the speeds, whatever the context (Llama 3).
pub(super) const FREQS: &str = "rope_freqs.weight";
/// Divisors of the speeds in contexts up to the original length, and beyond (LongRoPE).
pub(super) const FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// The rotary positions of a file, for heads of `head_dim`, of which all turns or what a key says; and `mscale_all_dim` of YaRN.
///
/// `values` gives the numbers of a tensor.
pub(super) fn read(
    keys: &Keys,
    head_dim: usize,
    context: usize,
    values: &dyn Fn(&str) -> Result<Option<Vec<f64>>>,
) -> Result<(RopeSpec, Option<f64>)> {
    let dims = keys.size("rope.dimension_count")?.filter(|dims| *dims != head_dim);
    let kind: &str = keys.find("rope.scaling.type")?.unwrap_or("linear");
    let original = keys.size("rope.scaling.original_context_length")?.unwrap_or(context);
    let own = keys.number("rope.scaling.attn_factor")?;
    let factor = keys.number("rope.scaling.factor")?.or(keys.number("rope.scale_linear")?);
    let factor = factor.filter(|factor| *factor != 0.0);
    let all_dim = match keys.number("rope.scaling.yarn_log_multiplier")?.filter(|all| *all != 0.0) {
        // A tenth of it, by the convention of this architecture's converter.
        Some(tenth) if keys.arch.special == Special::Latent => {
            Some(super::metadata::widened((tenth / 0.1) as f32))
        }
        other => other,
    };
    let [short, long] = [values(FACTORS[0])?, values(FACTORS[1])?];
    let scaling = match (kind, short.zip(long), values(FREQS)?) {
        ("none" | "linear", None, Some(divisors)) if factor.is_none_or(|factor| factor == 1.0) => {
            RopeScaling::Longrope {
                short: divisors.clone(),
                long: divisors,
                original: context,
                short_factor: own.unwrap_or(1.0),
                long_factor: own.unwrap_or(1.0),
            }
        }
        ("none" | "linear" | "longrope", Some((short, long)), None) => {
            let both = own.unwrap_or(1.0);
            RopeScaling::Longrope { short, long, original, short_factor: both, long_factor: both }
        }
        ("none", None, None) => RopeScaling::None,
        ("linear", None, None) => match factor {
            None | Some(1.0) => RopeScaling::None,
            Some(factor) => RopeScaling::Linear { factor },
        },
        ("yarn", None, None) => {
            let factor = factor
                .ok_or_else(|| keys.error(format!("key {}: is missing", keys.name("rope.scaling.factor"))))?;
            let derived = if all_dim.is_some() { 1.0 } else { yarn_mscale(factor, 1.0) };
            let whole = keys.number("rope.scaling.yarn_attn_factor")?;
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: keys.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                truncate: keys.arch.special != Special::GptOss,
                attention_factor: whole.unwrap_or(derived * own.unwrap_or(1.0)),
            }
        }
        (kind, factors, freqs) => {
            let tensors =
                if factors.is_some() || freqs.is_some() { " with divisors of the speeds" } else { "" };
            return Err(keys.error(format!(
                "key {}: \"{kind}\"{tensors} is not known; none, linear, yarn and longrope are",
                keys.name("rope.scaling.type")
            )));
        }
    };
    let neighbours = keys.arch.rope == RopeOrder::Neighbours;
    Ok((RopeSpec { neighbours, dims, scaling }, all_dim.filter(|_| kind == "yarn")))
}

/// What is written of rotary positions: keys without the architecture, and tensors.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub keys: Vec<(&'static str, Value)>,
    pub tensors: Vec<(&'static str, Vec<f32>)>,
}

/// The keys and tensors of a model's rotary positions; or what GGUF has no word for.
pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Written, String> {
    let a = &spec.attention;
    let turning = a.latent.as_ref().map_or(a.head_dim, |latent| latent.rope);
    let mut out = Written::default();
    let key = |out: &mut Written, name, value: Value| out.keys.push((name, value));
    let number = |x: f64| Value::F32(x as f32);
    key(&mut out, "rope.dimension_count", Value::U32(a.rope.rotated(turning) as u32));
    key(&mut out, "rope.freq_base", number(a.rope_theta));
    match &a.rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            key(&mut out, "rope.scaling.type", Value::String("linear".into()));
            key(&mut out, "rope.scaling.factor", number(*factor));
        }
        RopeScaling::Dynamic { .. } => return Err("a rope_scaling of type dynamic".into()),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => {
            key(&mut out, "rope.scaling.type", Value::String("yarn".into()));
            key(&mut out, "rope.scaling.factor", number(*factor));
            key(&mut out, "rope.scaling.original_context_length", Value::U32(*original as u32));
            key(&mut out, "rope.scaling.yarn_beta_fast", number(*beta_fast));
            key(&mut out, "rope.scaling.yarn_beta_slow", number(*beta_slow));
            // DeepSeek's factor on the scores of attention.
            let plain = 1.0 / (a.head_dim as f64).sqrt();
            let all_dim = match (a.scale.filter(|_| a.latent.is_some()), *factor > 1.0) {
                (Some(scale), true) => ((scale / plain).sqrt() - 1.0) / (0.1 * factor.ln()),
                _ => 0.0,
            };
            if all_dim != 0.0 {
                key(&mut out, "rope.scaling.yarn_log_multiplier", number(0.1 * all_dim));
            }
            let derived = if all_dim != 0.0 { 1.0 } else { yarn_mscale(*factor, 1.0) };
            if (attention_factor / derived - 1.0).abs() > 1e-6 {
                key(&mut out, "rope.scaling.attn_factor", number(attention_factor / derived));
            }
        }
        RopeScaling::Llama3 { .. } => out.tensors.push((FREQS, divisors(spec))),
        RopeScaling::Longrope { short, long, original, short_factor, long_factor } => {
            if short_factor != long_factor {
                return Err(format!(
                    "a rope_scaling with short_mscale {short_factor}, long_mscale {long_factor}"
                ));
            }
            let narrow = |list: &[f64]| list.iter().map(|x| *x as f32).collect::<Vec<_>>();
            if short == long && *short_factor == 1.0 {
                out.tensors.push((FREQS, narrow(short)));
            } else {
                key(&mut out, "rope.scaling.type", Value::String("longrope".into()));
                key(&mut out, "rope.scaling.original_context_length", Value::U32(*original as u32));
                key(&mut out, "rope.scaling.attn_factor", number(*short_factor));
                out.tensors.push((FACTORS[0], narrow(short)));
                out.tensors.push((FACTORS[1], narrow(long)));
            }
        }
    }
    Ok(out)
}

/// What the speeds of a model are divided by: \[dims / 2\].
pub(super) fn divisors(spec: &ModelSpec) -> Vec<f32> {
    let a = &spec.attention;
    let plain = RopeSpec { scaling: RopeScaling::None, ..a.rope.clone() };
    let speeds = |rope: &RopeSpec| rope.frequencies(a.rope_theta, a.head_dim, spec.max_positions).0;
    speeds(&plain).into_iter().zip(speeds(&a.rope)).map(|(plain, bent)| plain / bent).collect()
}
