//! Which model something was made with: a hash of its folder or file.

use crate::error::{ModelError, Result};
use crate::gguf;
use crate::tensor_files::Files;
use std::path::Path;

/// Bytes of each tensor that go into the hash.
const BEGINNING: usize = 64;

/// A hash of a model: of its `config.json`, or its metadata in GGUF, and of each tensor's name, type, shape and first 64 bytes, in the order
/// of names. It does not depend on where the files are and how the tensors are spread over them, and reads a page of each tensor at
/// most; models that differ only deeper within their tensors have the same hash.
pub fn model_hash(model: &Path) -> Result<String> {
    let (config, files) = if gguf::is_gguf(model) {
        gguf::identity(model)?
    } else {
        let path = model.join("config.json");
        let config = std::fs::read(&path).map_err(ModelError::io("read", &path))?;
        (config, Files::open(model)?)
    };
    let mut hash = blake3::Hasher::new();
    // Each part with its length: no two models run together to the same bytes.
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&config);
    for (name, entry) in &files.tensors {
        let bytes = files.bytes(entry);
        part(name.as_bytes());
        part(format!("{} {:?}", entry.dtype.name(), entry.shape).as_bytes());
        part(&bytes[..bytes.len().min(BEGINNING)]);
    }
    Ok(hash.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::initial_values;
    use crate::spec::test_spec;

    #[test]
    fn a_hash_is_that_of_the_model_and_not_of_its_place() {
        let spec = test_spec(4);
        let of = |seed: u64| {
            let folder = tempfile::tempdir().unwrap();
            let values = initial_values(&spec, seed);
            let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            crate::checkpoint::save(folder.path(), &spec, &slices, "auto").unwrap();
            (model_hash(folder.path()).unwrap(), folder)
        };
        let (one, folder) = of(1);
        assert_eq!(one, of(1).0);
        assert_ne!(one, of(2).0);
        let config = folder.path().join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text + "\n").unwrap();
        assert_ne!(one, model_hash(folder.path()).unwrap());
    }
}
