//! Models in several files: `name-00001-of-00003.gguf` and so on.
//!
//! Each file is whole in itself, with the keys `split.no` (from 0), `split.count` and `split.tensors.count`
//! (of all files). The metadata of the model are those of the first.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::{GgufError, Result};
use crate::metadata::Metadata;
use crate::read::{Gguf, Tensor};

/// The number of a file, from 0.
pub const NUMBER_KEY: &str = "split.no";
/// How many files there are.
pub const COUNT_KEY: &str = "split.count";
/// How many tensors all files have together.
pub const TENSORS_KEY: &str = "split.tensors.count";

/// A model, in one file or in several.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The metadata of the first file.
    pub metadata: Metadata,
    /// All tensors in the order of the files, each with the index of its file.
    pub tensors: Vec<(usize, Tensor)>,
}

/// The name of file `number` (from 0) of `count`.
pub fn file_name(stem: &str, number: usize, count: usize) -> String {
    format!("{stem}-{:05}-of-{count:05}.gguf", number + 1)
}

/// Name, number (from 0) and count in the name of a file of a split model.
pub fn parse_name(name: &str) -> Option<(&str, usize, usize)> {
    let digits = |text: &str| {
        let plain = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse::<usize>().ok()).flatten()
    };
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let (number, count) = (digits(number)?, digits(count)?);
    (1..=count).contains(&number).then(|| (stem, number - 1, count))
}

/// The paths of all files of a model, in order, from that of any one of them; each must be there. A name that
/// is not one of a split model stands for itself alone.
pub fn siblings(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(parse_name);
    let Some((stem, _, count)) = name else {
        return Ok(vec![path.to_owned()]);
    };
    let paths = (0..count).map(|number| path.with_file_name(file_name(stem, number, count)));
    // One look each before the list is made: a name may promise 99999 files.
    let found = |path: PathBuf| {
        if path.exists() { Ok(path) } else { Err(GgufError::MissingPart { path, count }) }
    };
    paths.map(found).collect()
}

/// Joins files that were read in the order of [`siblings`]. Errors say "file 2 of 3", counted from 1.
pub fn join(files: Vec<Gguf>) -> Result<Joined> {
    let count = files.len();
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    let mut first = None;
    let mut promised = None;
    for (i, file) in files.into_iter().enumerate() {
        let (metadata, own) = file.into_parts();
        let here = |e: GgufError| match count {
            1 => e,
            _ => GgufError::file(format!("file {} of {count}: {e}", i + 1)),
        };
        let wrong = |key, what: String| here(GgufError::key(key, what));
        let says: usize = metadata.find(COUNT_KEY).map_err(here)?.unwrap_or(1);
        if says != count {
            let advice = if count == 1 { ": it must be named like ...-00001-of-00003.gguf" } else { "" };
            return Err(wrong(COUNT_KEY, format!("is {says}, there are {count} files{advice}")));
        }
        let number: Option<usize> = metadata.find(NUMBER_KEY).map_err(here)?;
        if number.is_none() && count > 1 {
            return Err(wrong(NUMBER_KEY, format!("is missing, expected {i}")));
        }
        if number.is_some_and(|number| number != i) {
            return Err(wrong(
                NUMBER_KEY,
                format!("is {}, expected {i}: files are misnamed", number.unwrap_or(0)),
            ));
        }
        let total: Option<usize> = metadata.find(TENSORS_KEY).map_err(here)?;
        if i == 0 {
            promised = total;
        } else if total.is_some() && total != promised {
            let (total, promised) =
                (total.unwrap_or(0), promised.map_or("none".to_owned(), |n| n.to_string()));
            return Err(wrong(
                TENSORS_KEY,
                format!("is {total}, in file 1 it is {promised}: they are of two models"),
            ));
        }
        for tensor in own {
            if !names.insert(tensor.name.clone()) {
                return Err(here(GgufError::tensor(&tensor.name, "is in an earlier file too")));
            }
            tensors.push((i, tensor));
        }
        first.get_or_insert(metadata);
    }
    let metadata = first.ok_or_else(|| GgufError::file("no files were given"))?;
    if promised.is_some_and(|promised| promised != tensors.len()) {
        let what = format!("is {}, there are {} tensors", promised.unwrap_or(0), tensors.len());
        return Err(GgufError::key(TENSORS_KEY, what));
    }
    Ok(Joined { metadata, tensors })
}
