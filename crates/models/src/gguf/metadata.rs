//! The metadata of a GGUF file, by the keys of its architecture, with errors that name file and key.

use super::arch::{Arch, arch};
use crate::error::{ModelError, Result};
use senmon_gguf::{Array, FromValue, Metadata, Value};
use std::path::{Path, PathBuf};

/// The metadata of a model.
#[derive(Debug)]
pub struct Keys<'a> {
    /// The file.
    path: PathBuf,
    /// Its metadata.
    metadata: &'a Metadata,
    /// Its architecture.
    pub arch: &'static Arch,
}

impl<'a> Keys<'a> {
    /// The metadata of the file at `path`, which must be of a known architecture.
    pub fn new(path: &Path, metadata: &'a Metadata) -> Result<Self> {
        let name: &str = metadata.require("general.architecture").map_err(|e| of_file(path, e))?;
        let arch = arch(name).map_err(|e| ModelError::File { path: path.into(), what: e.to_string() })?;
        Ok(Self { path: path.into(), metadata, arch })
    }

    /// An error about the file.
    pub fn error(&self, what: impl Into<String>) -> ModelError {
        ModelError::File { path: self.path.clone(), what: what.into() }
    }

    /// A key of the architecture, in full.
    pub fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch.name)
    }

    /// The value of a key of the architecture.
    pub fn find<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        self.metadata.find(&self.name(key)).map_err(|e| of_file(&self.path, e))
    }

    /// The value of a key of the architecture that must be there.
    pub fn require<T: FromValue<'a>>(&self, key: &str) -> Result<T> {
        self.metadata.require(&self.name(key)).map_err(|e| of_file(&self.path, e))
    }

    /// The value of any key.
    pub fn find_any<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        self.metadata.find(key).map_err(|e| of_file(&self.path, e))
    }

    /// A size: one number, or the same number for each layer.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        let name = self.name(key);
        let Some(Value::Array(array)) = self.metadata.get(&name) else {
            return self.find(key)?.map(|n: u64| self.fit(key, n)).transpose();
        };
        let all: Vec<u64> = self.require(key)?;
        match all.split_first() {
            Some((first, rest)) if rest.iter().all(|n| n == first) => self.fit(key, *first).map(Some),
            _ => Err(self.error(format!(
                "key {name}: has {} numbers that differ: layers of different sizes are not supported",
                array.len()
            ))),
        }
    }

    fn fit(&self, key: &str, n: u64) -> Result<usize> {
        usize::try_from(n).ok().filter(|n| *n <= crate::spec::LIMIT).ok_or_else(|| {
            self.error(format!("key {}: {n} is more than {}", self.name(key), crate::spec::LIMIT))
        })
    }

    /// A size that must be there.
    pub fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.error(format!("key {}: is missing", self.name(key))))
    }

    /// A number as it was before it became an `f32`: the shortest one that does.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.find::<f32>(key)?.map(widened))
    }

    /// A truth for each of `count` layers, if the key is there.
    pub fn flags(&self, key: &str, count: usize) -> Result<Option<Vec<bool>>> {
        let Some(array) = self.find::<&Array>(key)? else { return Ok(None) };
        match array {
            Array::Bool(flags) if flags.len() == count => Ok(Some(flags.clone())),
            _ => {
                Err(self.error(format!("key {}: is not a truth for each of {count} layers", self.name(key))))
            }
        }
    }
}

/// The shortest decimal number that is this `f32`, as an `f64`.
pub(super) fn widened(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// An error of the container, with the file.
pub(super) fn of_file(path: &Path, error: senmon_gguf::GgufError) -> ModelError {
    ModelError::File { path: path.into(), what: error.to_string() }
}
