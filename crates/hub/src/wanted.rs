//! Which files of a repository make a model: configuration, tokenizer and safetensors, or GGUF.

use crate::error::{HubError, Result};
use crate::name::{Name, is_inside};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// What every model in safetensors has.
pub(crate) const CONFIG: &str = "config.json";
/// Says which tensor is in which file.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// All tensors in one file.
const SINGLE: &str = "model.safetensors";
/// What a model may have beside its configuration.
const BESIDE: [&str; 4] =
    ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
/// Ends of the names of weights that are not read: most of them are programs that make the weights.
const UNREAD: [&str; 8] = [".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".pkl"];
/// Names that a message shows at most.
const SHOWN: usize = 12;

/// The files of a model.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A folder: first these, then the shards that the index names where there is one, or the one file of tensors.
    Folder { beside: Vec<String>, weights: String },
    /// One model in GGUF, in so many files, the first first.
    Gguf(Vec<String>),
}

/// Chooses among the files of a repository.
pub(crate) fn choose(name: &Name, listing: &[String]) -> Result<Wanted> {
    let wrong = |what: String| HubError::Repository { name: name.to_string(), what };
    let has = |file: &str| listing.iter().any(|known| known == file);
    if let Some(part) = &name.file {
        return gguf(name, listing, Some(part)).map(Wanted::Gguf);
    }
    let weights = [SINGLE, INDEX].into_iter().find(|file| has(file));
    if let (true, Some(weights)) = (has(CONFIG), weights) {
        let beside = [CONFIG].into_iter().chain(BESIDE).filter(|file| has(file)).map(str::to_owned).collect();
        return Ok(Wanted::Folder { beside, weights: weights.into() });
    }
    if listing.iter().any(|file| is_gguf(file)) {
        return gguf(name, listing, None).map(Wanted::Gguf);
    }
    if weights.is_some() {
        return Err(wrong(format!("has no {CONFIG}")));
    }
    let unread = listing.iter().find(|file| UNREAD.iter().any(|end| file.to_lowercase().ends_with(end)));
    Err(wrong(match unread {
        Some(file) => {
            format!(
                "has weights as {file} only, which is not read, as such files can hold programs: save the model as safetensors"
            )
        }
        None => {
            format!("has neither {SINGLE} nor {INDEX} nor a .gguf file: it holds no model that can be read")
        }
    }))
}

/// The files of tensors that an index names; they must be beside it.
pub(crate) fn shards(name: &Name, index: &[u8], listing: &[String]) -> Result<Vec<String>> {
    let wrong =
        |what: String| HubError::Repository { name: name.to_string(), what: format!("{INDEX}: {what}") };
    let json: Value = serde_json::from_slice(index).map_err(|e| wrong(format!("is not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.filter(|map| !map.is_empty()).ok_or_else(|| wrong("has no weight_map".into()))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().unwrap_or_default();
        if !is_inside(file) || file.contains('/') || !file.ends_with(".safetensors") {
            return Err(wrong(format!("weight_map.{tensor:?} = {file:?} is no .safetensors file beside it")));
        }
        if !listing.iter().any(|known| known == file) {
            return Err(wrong(format!("weight_map.{tensor:?} = {file:?} is missing")));
        }
        files.insert(file.to_owned());
    }
    Ok(files.into_iter().collect())
}

fn is_gguf(file: &str) -> bool {
    file.to_lowercase().ends_with(".gguf")
}

/// The files of the one model in GGUF whose name has `part`.
fn gguf(name: &Name, listing: &[String], part: Option<&str>) -> Result<Vec<String>> {
    let wrong = |what: String| HubError::Repository { name: name.to_string(), what };
    let mut models: BTreeMap<&str, Vec<(Split, &String)>> = BTreeMap::new();
    // What sees pictures for a model is no model of its own.
    let of_text = |file: &&String| is_gguf(file) && !file.to_lowercase().contains("mmproj");
    for file in listing.iter().filter(of_text) {
        let (model, split) = split_of(file);
        models.entry(model).or_default().push((split, file));
    }
    let all: Vec<&str> = models.keys().copied().collect();
    let with = |test: &dyn Fn(&str, &str) -> bool| -> Vec<&str> {
        let part = part.unwrap_or_default().to_lowercase();
        all.iter().copied().filter(|model| test(&model.to_lowercase(), &part)).collect()
    };
    // Q4_K is also a part of Q4_K_M: where it stands by itself, that is meant.
    let mut found = with(&stands_in);
    if found.is_empty() {
        found = with(&|model, part| model.contains(part));
    }
    let among = |models: &[&str]| {
        let more = models.len().saturating_sub(SHOWN);
        let shown = models[..models.len() - more].join(", ");
        if more > 0 { format!("{shown} and {more} more") } else { shown }
    };
    let [model] = found[..] else {
        let (which, models) = match (part, found.is_empty()) {
            (Some(part), true) => (format!("has no GGUF model with {part:?} in its name, but"), &all),
            (Some(part), false) => (format!("has several GGUF models with {part:?} in their names"), &found),
            (None, _) => ("has several GGUF models".to_owned(), &all),
        };
        if models.is_empty() {
            return Err(wrong("has no GGUF models".into()));
        }
        let repository = &name.repository;
        return Err(wrong(format!("{which} {}: say {repository}:PART_OF_A_NAME", among(models))));
    };
    let mut files = models.remove(model).unwrap_or_default();
    files.sort();
    let count = files[0].0.of;
    if let Some(missing) = (1..=count).find(|n| files.get(*n - 1).is_none_or(|(split, _)| split.n != *n))
        && count > 0
    {
        return Err(wrong(format!("has not all splits of {model}: number {missing} of {count} is missing")));
    }
    let files: Vec<String> = files.into_iter().map(|(_, file)| file.clone()).collect();
    match files.iter().find(|file| !is_inside(file)) {
        Some(file) => Err(wrong(format!("its file {file:?} would lie outside of the cache"))),
        None => Ok(files),
    }
}

/// Which of how many files; 0 of 0 where a model is one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Split {
    of: usize,
    n: usize,
}

/// A model's name, without the number of a split, and the split.
fn split_of(file: &str) -> (&str, Split) {
    let stem = file.get(..file.len() - ".gguf".len()).unwrap_or(file);
    let parts = || {
        let (rest, of) = stem.rsplit_once("-of-")?;
        let (model, n) = rest.rsplit_once('-')?;
        let number = |text: &str| if text.len() == 5 { text.parse().ok() } else { None };
        Some((model, Split { of: number(of)?, n: number(n)? }))
    };
    parts().unwrap_or((stem, Split::default()))
}

/// `part` stands in `name` with nothing but '-', '.' or '/' at its sides.
fn stands_in(name: &str, part: &str) -> bool {
    let edge = |c: Option<char>| c.is_none_or(|c| "-./".contains(c));
    name.match_indices(part)
        .any(|(at, _)| edge(name[..at].chars().next_back()) && edge(name[at + part.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, listing: &[&str]) -> Result<Wanted> {
        let listing: Vec<String> = listing.iter().map(|file| file.to_string()).collect();
        choose(&Name::parse(name).unwrap(), &listing)
    }

    fn refused(name: &str, listing: &[&str], words: &[&str]) {
        let error = chosen(name, listing).unwrap_err();
        let text = error.to_string();
        assert!(error.is_users_mistake() && text.lines().count() == 1, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text} does not say {words:?}");
    }

    fn gguf_of(name: &str, listing: &[&str]) -> Vec<String> {
        match chosen(name, listing).unwrap() {
            Wanted::Gguf(files) => files,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn of_a_folder_only_configuration_tokenizer_and_safetensors_are_wanted() {
        let listing = [
            "README.md",
            "config.json",
            "modeling_x.py",
            "pytorch_model.bin",
            "tokenizer.json",
            INDEX,
            "a.safetensors",
        ];
        let folder = |weights: &str| Wanted::Folder {
            beside: vec!["config.json".into(), "tokenizer.json".into()],
            weights: weights.into(),
        };
        assert_eq!(chosen("a/b", &listing).unwrap(), folder(INDEX));
        assert_eq!(chosen("a/b", &[&listing[..], &[SINGLE]].concat()).unwrap(), folder(SINGLE));
    }

    #[test]
    fn weights_that_can_hold_programs_are_refused_by_name() {
        refused("a/b", &["config.json", "pytorch_model.bin"], &["a/b", "pytorch_model.bin", "safetensors"]);
        refused("a/b", &["config.json", "consolidated.00.pth"], &["consolidated.00.pth"]);
        refused("a/b", &["README.md"], &["model.safetensors", ".gguf"]);
        refused("a/b", &[SINGLE], &["config.json"]);
    }

    #[test]
    fn an_index_names_files_beside_it_that_are_there() {
        let name = Name::parse("a/b").unwrap();
        let listing = ["x.safetensors".to_owned(), "y.safetensors".to_owned(), "z.bin".to_owned()];
        let of = |map: &str| shards(&name, format!("{{\"weight_map\": {map}}}").as_bytes(), &listing);
        let files = of(r#"{"t": "y.safetensors", "u": "x.safetensors", "v": "x.safetensors"}"#).unwrap();
        assert_eq!(files, ["x.safetensors", "y.safetensors"]);
        for file in [
            "../x.safetensors",
            "/x.safetensors",
            "a/x.safetensors",
            "z.bin",
            "n.safetensors",
            "",
            "..\\\\x.safetensors",
        ] {
            let text = of(&format!(r#"{{"t": "{file}"}}"#)).unwrap_err().to_string();
            assert!(text.contains("weight_map.\"t\"") && text.contains(INDEX), "{text}");
        }
        assert!(of("{}").is_err() && of("3").is_err() && of(r#"{"t": 3}"#).is_err());
        assert!(shards(&name, b"no", &listing).is_err());
    }

    #[test]
    fn a_gguf_model_is_chosen_by_a_part_of_its_name() {
        let listing = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf", "m-Q8_0_L.gguf", "mmproj-f16.gguf"];
        assert_eq!(gguf_of("a/b:q4_k_m", &listing), ["m-Q4_K_M.gguf"]);
        assert_eq!(gguf_of("a/b:Q8_0", &listing), ["m-Q8_0.gguf"]);
        assert_eq!(gguf_of("a/b:k_s", &listing), ["m-Q4_K_S.gguf"]);
        refused("a/b:Q4_K", &listing, &["several", "m-Q4_K_M", "m-Q4_K_S"]);
        refused("a/b:Q2", &listing, &["no GGUF model", "m-Q8_0"]);
        refused("a/b", &listing, &["several", "m-Q4_K_M", "m-Q8_0", "a/b:"]);
        refused("a/b:Q2", &["config.json"], &["no GGUF"]);
        assert_eq!(gguf_of("a/b", &["README.md", "only.GGUF", "mmproj-x.gguf"]), ["only.GGUF"]);
    }

    #[test]
    fn all_splits_of_a_gguf_model_are_wanted() {
        let (one, two) = ("q/m-Q4_0-00001-of-00002.gguf", "q/m-Q4_0-00002-of-00002.gguf");
        assert_eq!(gguf_of("a/b", &[two, one]), [one, two]);
        assert_eq!(gguf_of("a/b:Q4_0", &[two, one, "m-F16.gguf"]), [one, two]);
        refused("a/b", &[two], &["number 1 of 2 is missing", "m-Q4_0"]);
        refused("a/b", &[one], &["number 2 of 2 is missing"]);
        refused("a/b", &["../x.gguf"], &["../x.gguf", "outside"]);
    }
}
