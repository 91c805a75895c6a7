//! What a model's makers advise for generation: `generation_config.json`.

use crate::error::Result;
use crate::families::Json;
use crate::files::is_file;
use crate::sampling::Sampling;
use crate::tensor_files::read_json;
use serde_json::Value;
use std::path::Path;

/// The name of the file.
pub const FILE: &str = "generation_config.json";

/// What a model's makers advise; chat models often say only here what ends a turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling rather than the likeliest token.
    pub do_sample: Option<bool>,
    /// As in [`Sampling`].
    pub temperature: Option<f32>,
    /// As in [`Sampling`].
    pub top_k: Option<usize>,
    /// As in [`Sampling`].
    pub top_p: Option<f32>,
    /// As in [`Sampling`].
    pub min_p: Option<f32>,
    /// As in [`Penalties`](crate::penalties::Penalties).
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a text, besides those of the specification.
    pub eos: Vec<u32>,
}

impl GenerationDefaults {
    /// What the folder of a model says; nothing where there is no file.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !is_file(&path)? {
            return Ok(Self::default());
        }
        let json = Json::new(&path, read_json(&path)?)?;
        let number = |key: &str| -> Result<Option<f32>> {
            Ok(json.typed(key, "a number", Value::as_f64)?.map(|x| x as f32))
        };
        let advice = Self {
            do_sample: json.typed("do_sample", "true or false", Value::as_bool)?,
            temperature: number("temperature")?,
            top_k: json.maybe_usize("top_k")?,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
            eos: json.tokens("eos_token_id")?,
        };
        advice.over(&Sampling::default()).validate().map_err(|e| json.error(e.to_string()))?;
        match advice.repetition_penalty {
            Some(x) if !(x.is_finite() && x > 0.0) => {
                Err(json.error(format!("repetition_penalty = {x} must be above 0")))
            }
            _ => Ok(advice),
        }
    }

    /// `own`, with what the file says put over it. Without sampling the temperature is 0.
    pub fn over(&self, own: &Sampling) -> Sampling {
        let temperature = if self.do_sample == Some(false) { Some(0.0) } else { self.temperature };
        Sampling {
            temperature: temperature.unwrap_or(own.temperature),
            top_k: self.top_k.unwrap_or(own.top_k),
            top_p: self.top_p.unwrap_or(own.top_p),
            min_p: self.min_p.unwrap_or(own.min_p),
            seed: own.seed,
        }
    }

    /// Whether it says anything of how tokens are chosen.
    pub fn advises(&self) -> bool {
        let numbers = [self.temperature, self.top_p, self.min_p, self.repetition_penalty];
        self.do_sample.is_some() || self.top_k.is_some() || numbers.iter().any(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationDefaults> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        GenerationDefaults::of_folder(dir.path())
    }

    #[test]
    fn what_the_file_says_goes_over_what_is_our_own() {
        let own = Sampling { seed: 9, ..Sampling::default() };
        for nothing in ["{}", "{\"eos_token_id\": 3, \"top_k\": null}"] {
            let advice = read(nothing).unwrap();
            assert!(!advice.advises() && advice.over(&own) == own, "{nothing}");
        }
        let advice =
            read("{\"do_sample\": true, \"temperature\": 0.6, \"top_k\": 20, \"min_p\": 0.1}").unwrap();
        let wanted = Sampling { temperature: 0.6, top_k: 20, min_p: 0.1, ..own.clone() };
        assert!(advice.advises() && advice.over(&own) == wanted);
        let greedy = read("{\"do_sample\": false, \"temperature\": 0.6, \"top_p\": 0.5}").unwrap();
        assert_eq!(greedy.over(&own), Sampling { temperature: 0.0, top_p: 0.5, ..own.clone() });
        assert_eq!(read("{\"repetition_penalty\": 1.25}").unwrap().repetition_penalty, Some(1.25));
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(GenerationDefaults::of_folder(folder.path()).unwrap(), GenerationDefaults::default());
    }

    #[test]
    fn advice_that_means_nothing_is_refused_by_its_file() {
        for (text, word) in [
            ("{\"temperature\": -1}", "temperature"),
            ("{\"temperature\": \"hot\"}", "temperature"),
            ("{\"top_p\": 2}", "top-p"),
            ("{\"min_p\": -0.5}", "min-p"),
            ("{\"top_k\": -1}", "top_k"),
            ("{\"repetition_penalty\": 0}", "repetition_penalty"),
            ("{\"do_sample\": 1}", "do_sample"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().contains(word) && error.to_string().contains(FILE), "{error}");
            assert!(error.is_users_mistake());
        }
    }
}
