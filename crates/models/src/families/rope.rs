//! Rotary positions in `config.json`: `rope_parameters` of transformers 5, `rope_scaling` and `rope_theta` of before.

use super::common::Json;
use crate::error::Result;
use crate::rope::{RopeScaling, RopeSpec, yarn_mscale};
use crate::spec::AttentionSpec;
use serde_json::{Map, Value, json};

/// What a file says of rotary positions.
#[derive(Debug)]
pub struct RopeKeys<'a> {
    json: &'a Json,
    /// The table that goes before all else, and its name.
    table: Option<(&'static str, &'a Map<String, Value>)>,
}

/// The keys that a table may have.
const KNOWN: &[&str] = &[
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
    "alpha",
    // Not read by transformers, and without meaning for the maths.
    "finetuned",
    "max_position_embeddings",
];

impl<'a> RopeKeys<'a> {
    /// The tables of a file. As in transformers, what `rope_scaling` says goes before `rope_parameters`, and both before a
    /// `rope_theta` of its own.
    pub fn new(json: &'a Json) -> Result<Self> {
        let mut table = None;
        for name in ["rope_scaling", "rope_parameters"] {
            let Some(value) = json.get(name) else { continue };
            let Some(map) = value.as_object() else {
                return Err(json.error(format!("{name} = {value} is not a table")));
            };
            if map.values().any(Value::is_object) {
                return Err(
                    json.error(format!("{name} = {value}: a table for each kind of layer is not supported"))
                );
            }
            if let Some(key) = map.keys().find(|key| !KNOWN.contains(&key.as_str())) {
                return Err(json.error(format!(
                    "{name}.{key} = {} changes what the model computes and is not supported",
                    map[key]
                )));
            }
            table = table.or((!map.is_empty()).then_some((name, map)));
        }
        Ok(Self { json, table })
    }

    /// A key of the table.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.table.and_then(|(_, map)| map.get(key)).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, what: &str) -> crate::error::ModelError {
        let name = self.table.map_or("rope_parameters", |(name, _)| name);
        self.json.error(format!("{name}.{key} {what}"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.error(key, &format!("= {value} is not a number"))),
            },
        }
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// θ.
    pub fn theta(&self, default: f64) -> Result<f64> {
        match self.number("rope_theta")? {
            Some(theta) => Ok(theta),
            None => self.json.f64_or("rope_theta", default),
        }
    }

    /// Which part of a head turns.
    pub fn partial(&self, default: f64) -> Result<f64> {
        match self.number("partial_rotary_factor")? {
            Some(part) => Ok(part),
            None => self.json.f64_or("partial_rotary_factor", default),
        }
    }

    /// The longest context of the model before its speeds were bent.
    fn original(&self) -> Result<usize> {
        // A key of the file itself goes before the table's.
        if let Some(original) = self.json.maybe_usize("original_max_position_embeddings")? {
            return Ok(original);
        }
        let whole = |value: &Value| value.as_u64().filter(|n| *n > 0 && *n <= 1 << 24).map(|n| n as usize);
        if let Some(value) = self.get("original_max_position_embeddings") {
            return whole(value).ok_or_else(|| {
                self.error(
                    "original_max_position_embeddings",
                    &format!("= {value} is not a number of tokens"),
                )
            });
        }
        self.json.usize("max_position_embeddings")
    }

    fn list(&self, key: &str) -> Result<Vec<f64>> {
        let numbers =
            |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>();
        let value = self.get(key).ok_or_else(|| self.error(key, "is missing"))?;
        numbers(value).ok_or_else(|| self.error(key, "is not a list of numbers"))
    }

    /// The kind of scaling.
    pub fn kind(&self) -> Result<&'a str> {
        let kind = self.get("rope_type").or_else(|| self.get("type"));
        match kind {
            // Anything but θ and the part without a type is a scaling of some kind.
            None => {
                let plain = |key: &String| matches!(key.as_str(), "rope_theta" | "partial_rotary_factor");
                match self.table.and_then(|(_, map)| map.iter().find(|(key, v)| !plain(key) && !v.is_null()))
                {
                    Some((key, _)) => Err(self.error(key, "is there without a rope_type")),
                    None => Ok("default"),
                }
            }
            Some(kind) => {
                kind.as_str().ok_or_else(|| self.error("rope_type", &format!("= {kind} is not a text")))
            }
        }
    }

    /// How speeds are bent, and, for YaRN, the factors (`mscale`, `mscale_all_dim`) of the paper.
    pub fn scaling(&self) -> Result<RopeScaling> {
        Ok(match self.kind()? {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: self.needed("factor")? },
            "dynamic" => RopeScaling::Dynamic {
                factor: self.needed("factor")?,
                original: self.json.usize("max_position_embeddings")?,
            },
            "yarn" => {
                let original = self.original()?;
                let factor = match self.number("factor")? {
                    Some(factor) => factor,
                    None => self.json.usize("max_position_embeddings")? as f64 / original as f64,
                };
                let (mscale, all) = (self.number("mscale")?, self.number("mscale_all_dim")?);
                let attention_factor = match (self.number("attention_factor")?, mscale, all) {
                    (Some(given), ..) => given,
                    (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => {
                        yarn_mscale(factor, mscale) / yarn_mscale(factor, all)
                    }
                    _ => yarn_mscale(factor, 1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original,
                    beta_fast: self.number("beta_fast")?.filter(|x| *x != 0.0).unwrap_or(32.0),
                    beta_slow: self.number("beta_slow")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                    truncate: match self.get("truncate") {
                        None => true,
                        Some(value) => value.as_bool().ok_or_else(|| {
                            self.error("truncate", &format!("= {value} is not true or false"))
                        })?,
                    },
                    attention_factor,
                }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: self.needed("factor")?,
                original: self.original()?,
                low: self.needed("low_freq_factor")?,
                high: self.needed("high_freq_factor")?,
            },
            "longrope" | "su" => {
                let original = self.original()?;
                let most = self.json.usize("max_position_embeddings")?;
                let factor = match self.number("factor")? {
                    Some(factor) => factor,
                    None => most as f64 / original as f64,
                };
                let derived = match factor > 1.0 {
                    true => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
                    false => 1.0,
                };
                let both = self.number("attention_factor")?.unwrap_or(derived);
                RopeScaling::Longrope {
                    short: self.list("short_factor")?,
                    long: self.list("long_factor")?,
                    original,
                    short_factor: self.number("short_mscale")?.unwrap_or(both),
                    long_factor: self.number("long_mscale")?.unwrap_or(both),
                }
            }
            other => {
                let what = format!(
                    "= \"{other}\" is not known; default, linear, dynamic, yarn, llama3 and longrope are"
                );
                return Err(self.error("rope_type", &what));
            }
        })
    }

    /// `alpha` of Hunyuan's dynamic scaling.
    pub fn alpha(&self) -> Result<Option<f64>> {
        self.number("alpha")
    }

    /// `mscale_all_dim` of YaRN, and its factor.
    pub fn all_dim(&self) -> Result<Option<(f64, f64)>> {
        Ok(self.number("factor")?.zip(self.number("mscale_all_dim")?.filter(|x| *x != 0.0)))
    }
}

/// The elements of a head of `head_dim` that turn, `None` for all.
pub fn dims(json: &Json, head_dim: usize, part: f64) -> Result<Option<usize>> {
    if !(part > 0.0 && part <= 1.0) {
        return Err(json.error(format!("partial_rotary_factor = {part} must be above 0 and at most 1")));
    }
    let dims = (head_dim as f64 * part) as usize;
    Ok((dims != head_dim).then_some(dims))
}

/// `rope_parameters` of an attention.
pub fn write(a: &AttentionSpec) -> Value {
    let RopeSpec { dims, scaling, .. } = &a.rope;
    let mut value = match scaling {
        RopeScaling::None => json!({ "rope_type": "default" }),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Dynamic { factor, .. } => json!({ "rope_type": "dynamic", "factor": factor }),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate, "attention_factor": attention_factor,
        }),
        RopeScaling::Llama3 { factor, original, low, high } => json!({
            "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original,
            "low_freq_factor": low, "high_freq_factor": high,
        }),
        RopeScaling::Longrope { short, long, original, long_factor, .. } => json!({
            "rope_type": "longrope", "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": original, "attention_factor": long_factor,
        }),
    };
    value["rope_theta"] = a.rope_theta.into();
    if let Some(dims) = dims {
        value["partial_rotary_factor"] = (*dims as f64 / a.head_dim as f64).into();
    }
    value
}
