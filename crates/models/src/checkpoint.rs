//! Checkpoints in Hugging Face layout: `config.json` and safetensors, one file or several with an index.
//!
//! [`load`] reads all of it as f32, to be trained; [`open`] leaves the matrices where they are, to be run. Every tensor that
//! the model needs must be there once and with its shape, and none may be left over unexplained ([`crate::audit`]).

use crate::audit::{self, Audit};
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::families::{self, Family, Json};
use crate::files::is_file;
use crate::generation::GenerationDefaults;
use crate::names::{Part, parts};
use crate::params::{ParamDef, param_defs};
pub use crate::save::save;
use crate::sources::source;
use crate::spec::ModelSpec;
use crate::tensor_files::{Files, read_json};
use senmon_moe::Stored;
use std::path::{Path, PathBuf};

/// A model as it lies in a folder.
#[derive(Debug)]
pub struct Checkpoint {
    /// What it is.
    pub spec: ModelSpec,
    /// The layout it was in.
    pub family: &'static Family,
    /// The values of [`param_defs`], in their order.
    pub params: Vec<Vec<f32>>,
    /// Its `tokenizer.json`, if it has one.
    pub tokenizer: Option<PathBuf>,
    /// What its `generation_config.json` says.
    pub generation: GenerationDefaults,
    /// Tensors that the model does not need, and why they may be there.
    pub unused: Vec<(String, &'static str)>,
}

/// Reads `config.json` alone.
pub fn load_spec(folder: &Path) -> Result<(ModelSpec, &'static Family)> {
    let json = config(folder)?;
    let family = family_of(&json)?;
    Ok(((family.read)(&json)?, family))
}

/// The `config.json` of a folder.
fn config(folder: &Path) -> Result<Json> {
    let path = folder.join("config.json");
    if !folder.is_dir() {
        let what = if folder.exists() { "is not a folder with a model" } else { "there is no such folder" };
        return Err(ModelError::File { path: folder.into(), what: what.into() });
    }
    if !is_file(&path)? {
        return Err(ModelError::File {
            path: folder.into(),
            what: "holds no model: config.json is missing".into(),
        });
    }
    Json::new(&path, read_json(&path)?)
}

fn family_of(json: &Json) -> Result<&'static Family> {
    let kind = json.text("model_type")?.ok_or_else(|| json.error("model_type is missing"))?;
    families::family(kind).map_err(|e| json.error(e.to_string()))
}

/// A checkpoint whose names, shapes and types are as its family says.
struct Found {
    spec: ModelSpec,
    family: &'static Family,
    parts: Vec<Part>,
    files: Files,
    unused: Vec<(String, &'static str)>,
    upcycled: bool,
}

fn find(folder: &Path) -> Result<Found> {
    let json = config(folder)?;
    let family = family_of(&json)?;
    let (spec, upcycled) = ((family.read)(&json)?, json.bool_or("upcycled", false)?);
    let files = Files::open(folder)?;
    let parts = parts(&spec, &family.names);
    let unused = audit::structure(&spec, &parts, &files)?;
    Ok(Found { spec, family, parts, files, unused, upcycled })
}

impl Found {
    fn audit(&self) -> Result<()> {
        audit::content(&self.spec, self.family, &self.parts, &self.files, self.upcycled)
    }
}

/// Its `tokenizer.json`, if a folder has one.
pub(crate) fn tokenizer(folder: &Path) -> Result<Option<PathBuf>> {
    let tokenizer = folder.join("tokenizer.json");
    Ok(is_file(&tokenizer)?.then_some(tokenizer))
}

/// Loads and audits the model in a folder, all of it as f32 in memory: to train it.
pub fn load(folder: &Path) -> Result<Checkpoint> {
    let found = find(folder)?;
    found.audit()?;
    // Only now, when every part is known to be there with its shape, is memory asked for.
    let mut params: Vec<Vec<f32>> = param_defs(&found.spec).iter().map(|def| vec![0.0; def.len()]).collect();
    for part in &found.parts {
        let into = &mut params[part.param][part.offset..][..part.len()];
        source(&found.files, part)?.0.read(&found.files, part, into)?;
    }
    let (tokenizer, generation) = (tokenizer(folder)?, GenerationDefaults::of_folder(folder)?);
    Ok(Checkpoint {
        spec: found.spec,
        family: found.family,
        params,
        tokenizer,
        generation,
        unused: found.unused,
    })
}

/// A model whose matrices stay in its files.
#[derive(Debug)]
pub struct Opened {
    /// What it is.
    pub spec: ModelSpec,
    /// The layout it was in.
    pub family: &'static Family,
    /// What the decoder is made of, in the order of [`param_defs`].
    pub weights: Vec<Weight>,
    /// Its `tokenizer.json`, if it has one.
    pub tokenizer: Option<PathBuf>,
    /// What its `generation_config.json` says.
    pub generation: GenerationDefaults,
    /// Tensors that the model does not need, and why they may be there.
    pub unused: Vec<(String, &'static str)>,
    /// Where its weights are.
    pub memory: Memory,
}

/// Bytes of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Used where they lie in the files: the system reads them when they are needed, and may let go of them.
    pub mapped: u64,
    /// Held in memory: what was decoded, or copied into another order.
    pub held: u64,
}

/// Opens the model in a folder to run it: matrices are used where they lie in the files, in their own type; what must be in
/// another order is copied, what is small is decoded.
pub fn open(folder: &Path, audit: Audit) -> Result<Opened> {
    let found = find(folder)?;
    if audit == Audit::Full || audit == Audit::Once && !audit::passed(&found.files) {
        found.audit()?;
        audit::remember(&found.files);
    }
    let (weights, memory) = weights(&param_defs(&found.spec), &found.parts, &found.files)?;
    let (tokenizer, generation) = (tokenizer(folder)?, GenerationDefaults::of_folder(folder)?);
    Ok(Opened {
        spec: found.spec,
        family: found.family,
        weights,
        tokenizer,
        generation,
        unused: found.unused,
        memory,
    })
}

/// What parameters are made of, in the order of `defs`, and where it is.
pub(crate) fn weights(defs: &[ParamDef], parts: &[Part], files: &Files) -> Result<(Vec<Weight>, Memory)> {
    let mut by_param: Vec<Vec<&Part>> = vec![Vec::new(); defs.len()];
    for part in parts {
        by_param[part.param].push(part);
    }
    let (mut weights, mut memory) = (Vec::with_capacity(defs.len()), Memory::default());
    for (def, mut parts) in defs.iter().zip(by_param) {
        parts.sort_by_key(|part| part.offset);
        if !def.stays() {
            let mut values = vec![0.0; def.len()];
            memory.held += 4 * def.len() as u64;
            for part in parts {
                source(files, part)?.0.read(files, part, &mut values[part.offset..][..part.len()])?;
            }
            weights.push(Weight::Values(values));
            continue;
        }
        let mut matrices = Vec::new();
        for part in parts {
            let source = source(files, part)?.0;
            let stored = source.store(files, part)?;
            let bytes: usize = stored.iter().map(|matrix| matrix.range.len()).sum();
            *if source.stays(part) { &mut memory.mapped } else { &mut memory.held } += bytes as u64;
            matrices.extend(stored);
        }
        weights.push(Weight::Stored(Stored::new(&def.shape, matrices)?));
    }
    Ok((weights, memory))
}
