//! Checkpoints: folders in Hugging Face layout (`config.json` and safetensors, one file or several with an index), and GGUF.
//!
//! [`load`] reads all of it as f32, to be trained; [`open`] leaves the matrices where they are, to be run. Every tensor that
//! the model needs must be there once and with its shape, and none may be left over unexplained ([`crate::audit`]).

use crate::audit::{self, Audit};
use crate::decoder::Weight;
use crate::error::{ModelError, Result};
use crate::families::{self, Family, Json};
use crate::files::is_file;
use crate::generation::GenerationDefaults;
use crate::gguf::{self, arch::Arch};
use crate::names::{Part, parts};
use crate::params::{ParamDef, param_defs};
pub use crate::save::save;
use crate::sources::source;
use crate::spec::ModelSpec;
use crate::tensor_files::{Files, read_json};
use crate::text::TokenizerSource;
use senmon_moe::Stored;
use std::collections::HashSet;
use std::path::Path;

/// A model as it lies in a folder.
#[derive(Debug)]
pub struct Checkpoint {
    /// What it is.
    pub spec: ModelSpec,
    /// The layout it was in.
    pub family: &'static Family,
    /// The values of [`param_defs`], in their order.
    pub params: Vec<Vec<f32>>,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<TokenizerSource>,
    /// What its `generation_config.json` says.
    pub generation: GenerationDefaults,
    /// Tensors that the model does not need, and why they may be there.
    pub unused: Vec<(String, &'static str)>,
}

/// The layout that a model is in.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// A folder of a Hugging Face family.
    Folder(&'static Family),
    /// GGUF of an architecture.
    Gguf(&'static Arch),
}

impl Layout {
    /// Its name: that of the family, or of the architecture in GGUF.
    pub fn name(&self) -> String {
        match self {
            Layout::Folder(family) => family.name.into(),
            Layout::Gguf(arch) => format!("{} (GGUF)", arch.name),
        }
    }

    /// The family that says such a model in a folder: the layout's own if it can, else the first that can.
    pub fn family(&self, spec: &ModelSpec) -> &'static Family {
        match self {
            Layout::Folder(family) => family,
            Layout::Gguf(arch) => {
                let own = arch.families.iter().filter_map(|name| families::family(name).ok());
                let mut fit = own.filter(|family| (family.write)(spec).is_ok());
                fit.next().unwrap_or_else(|| families::best_family(spec))
            }
        }
    }

    /// What the experts of a layer are called.
    fn experts(&self, layer: usize) -> String {
        match self {
            Layout::Folder(family) => format!("model.layers.{layer}.{}", family.names.block),
            Layout::Gguf(_) => format!("blk.{layer}"),
        }
    }
}

/// Reads what a model is, without its weights.
pub fn load_spec(folder: &Path) -> Result<(ModelSpec, &'static Family)> {
    if gguf::is_gguf(folder) {
        let opened = gguf::open(folder, false)?;
        let family = Layout::Gguf(opened.arch).family(&opened.spec);
        return Ok((opened.spec, family));
    }
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

/// A checkpoint whose names, shapes and types are as its layout says.
pub(crate) struct Found {
    pub spec: ModelSpec,
    pub layout: Layout,
    pub parts: Vec<Part>,
    pub files: Files,
    pub tokenizer: Option<TokenizerSource>,
    pub generation: GenerationDefaults,
    unused: Vec<(String, &'static str)>,
    pub upcycled: bool,
}

/// Finds the model at a path. With `turned`, a GGUF model's rows of queries and keys are left in the order of the file, where
/// that is another than the family's.
pub(crate) fn find(path: &Path, turned: bool) -> Result<Found> {
    if gguf::is_gguf(path) {
        let gguf::Opened { metadata, arch, spec, parts, files } = gguf::open(path, turned)?;
        let unused = audit::structure_of(&parts, &files, |name| gguf::explanation(&spec, &files, name))?;
        return Ok(Found {
            spec,
            layout: Layout::Gguf(arch),
            parts,
            files,
            upcycled: gguf::upcycled(path, &metadata)?,
            tokenizer: gguf::has_tokenizer(&metadata)
                .then(|| TokenizerSource::Gguf { path: path.into(), metadata }),
            generation: GenerationDefaults::default(),
            unused,
        });
    }
    let json = config(path)?;
    let family = family_of(&json)?;
    let (spec, upcycled) = ((family.read)(&json)?, json.bool_or("upcycled", false)?);
    let files = Files::open(path)?;
    let parts = parts(&spec, &family.names);
    let unused = audit::structure(&spec, &parts, &files)?;
    let (tokenizer, generation) = (tokenizer(path)?, GenerationDefaults::of_folder(path)?);
    Ok(Found { spec, layout: Layout::Folder(family), parts, files, tokenizer, generation, unused, upcycled })
}

impl Found {
    /// Looks at every value.
    pub fn audit(&self) -> Result<()> {
        let experts = |layer| self.layout.experts(layer);
        audit::content(&self.spec, &experts, &self.parts, &self.files, self.upcycled)
    }
}

/// Its `tokenizer.json`, if a folder has one.
pub(crate) fn tokenizer(folder: &Path) -> Result<Option<TokenizerSource>> {
    let tokenizer = folder.join("tokenizer.json");
    Ok(is_file(&tokenizer)?.then_some(TokenizerSource::File(tokenizer)))
}

/// Loads and audits the model in a folder or a GGUF file, all of it as f32 in memory: to train it.
pub fn load(folder: &Path) -> Result<Checkpoint> {
    let found = find(folder, false)?;
    found.audit()?;
    // Only now, when every part is known to be there with its shape, is memory asked for.
    let mut params: Vec<Vec<f32>> = param_defs(&found.spec).iter().map(|def| vec![0.0; def.len()]).collect();
    for part in &found.parts {
        let into = &mut params[part.param][part.offset..][..part.len()];
        source(&found.files, part)?.0.read(&found.files, part, into)?;
    }
    Ok(Checkpoint {
        family: found.layout.family(&found.spec),
        spec: found.spec,
        params,
        tokenizer: found.tokenizer,
        generation: found.generation,
        unused: found.unused,
    })
}

/// A model whose matrices stay in its files.
#[derive(Debug)]
pub struct Opened {
    /// What it is.
    pub spec: ModelSpec,
    /// The layout it was in.
    pub layout: Layout,
    /// What the decoder is made of, in the order of [`param_defs`].
    pub weights: Vec<Weight>,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<TokenizerSource>,
    /// What its `generation_config.json` says.
    pub generation: GenerationDefaults,
    /// Tensors that the model does not need, and why they may be there.
    pub unused: Vec<(String, &'static str)>,
    /// Where its weights are.
    pub memory: Memory,
    /// Tensors that it is made of.
    pub tensors: usize,
}

/// Bytes of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Used where they lie in the files: the system reads them when they are needed, and may let go of them.
    pub mapped: u64,
    /// Held in memory: what was decoded, or copied into another order.
    pub held: u64,
}

/// Opens the model in a folder or a GGUF file to run it: matrices are used where they lie in the files, in their own type; what must be in
/// another order is copied, what is small is decoded.
pub fn open(folder: &Path, audit: Audit) -> Result<Opened> {
    let found = find(folder, true)?;
    if audit == Audit::Full || audit == Audit::Once && !audit::passed(&found.files) {
        found.audit()?;
        audit::remember(&found.files);
    }
    let (weights, memory) = weights(&param_defs(&found.spec), &found.parts, &found.files)?;
    let tensors: HashSet<&str> = found.parts.iter().map(|part| part.tensor.as_str()).collect();
    Ok(Opened {
        spec: found.spec,
        layout: found.layout,
        tensors: tensors.len(),
        weights,
        tokenizer: found.tokenizer,
        generation: found.generation,
        unused: found.unused,
        memory,
    })
}

/// What parameters are made of, in the order of `defs`, and where it is.
pub(crate) fn weights(defs: &[ParamDef], parts: &[Part], files: &Files) -> Result<(Vec<Weight>, Memory)> {
    let (mut weights, mut memory) = (Vec::with_capacity(defs.len()), Memory::default());
    for (def, parts) in defs.iter().zip(by_param(defs.len(), parts)) {
        weights.push(weight(def, &parts, files, &mut memory)?);
    }
    Ok((weights, memory))
}

/// The parts of each of `count` parameters, in their order within it.
pub(crate) fn by_param(count: usize, parts: &[Part]) -> Vec<Vec<&Part>> {
    let mut by_param: Vec<Vec<&Part>> = vec![Vec::new(); count];
    for part in parts {
        by_param[part.param].push(part);
    }
    by_param.iter_mut().for_each(|parts| parts.sort_by_key(|part| part.offset));
    by_param
}

/// What one parameter is made of.
pub(crate) fn weight(def: &ParamDef, parts: &[&Part], files: &Files, memory: &mut Memory) -> Result<Weight> {
    if !def.stays() {
        let mut values = vec![0.0; def.len()];
        memory.held += 4 * def.len() as u64;
        for part in parts {
            source(files, part)?.0.read(files, part, &mut values[part.offset..][..part.len()])?;
        }
        return Ok(Weight::Values(values));
    }
    let mut matrices = Vec::new();
    for part in parts {
        let source = source(files, part)?.0;
        let stored = source.store(files, part)?;
        let bytes: usize = stored.iter().map(|matrix| matrix.range.len()).sum();
        *if source.stays(part) { &mut memory.mapped } else { &mut memory.held } += bytes as u64;
        matrices.extend(stored);
    }
    Ok(Weight::Stored(Stored::new(&def.shape, matrices)?))
}
