//! Encoder-decoders: T5 (1910.10683) and Switch Transformer (2101.03961), as transformers' `t5` and `switch_transformers` have them.
//! They are read and run, not trained.

mod config;
mod model;
mod parts;

pub use config::{Seq2SeqSpec, StackSpec};
pub use model::{DecoderCache, Encoded, Seq2Seq};

use crate::audit::{self, Audit};
use crate::checkpoint::{tokenizer, weights};
use crate::error::Result;
use crate::families::Json;
use crate::generation::GenerationDefaults;
use crate::tensor_files::{Files, read_json};
use crate::text::TokenizerSource;
use std::path::Path;

/// The families, by their `model_type`.
pub const FAMILIES: &[&str] = &["t5", "switch_transformers"];

/// The `model_type` of a folder, where it is one of [`FAMILIES`].
pub fn family_of(folder: &Path) -> Result<Option<&'static str>> {
    let path = folder.join("config.json");
    if !crate::files::is_file(&path)? {
        return Ok(None);
    }
    let json = Json::new(&path, read_json(&path)?)?;
    let kind = json.text("model_type")?;
    Ok(FAMILIES.iter().find(|name| Some(**name) == kind).copied())
}

/// A model with what is beside it in its folder.
#[derive(Debug)]
pub struct Opened {
    /// The model.
    pub model: Seq2Seq,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<TokenizerSource>,
    /// What its `generation_config.json` says.
    pub generation: GenerationDefaults,
}

/// Opens the model in a folder.
pub fn open(folder: &Path, audit: Audit) -> Result<Opened> {
    let path = folder.join("config.json");
    let json = Json::new(&path, read_json(&path)?)?;
    let files = Files::open(folder)?;
    let (mut spec, upcycled) = (config::read(&json)?, json.bool_or("upcycled", false)?);
    // A head, or embeddings, of their own go before the shared ones, as in transformers.
    spec.own_head |= parts::has_own(&spec, &files, "lm_head.weight")?;
    spec.own_tables = [
        parts::has_own(&spec, &files, "encoder.embed_tokens.weight")?,
        parts::has_own(&spec, &files, "decoder.embed_tokens.weight")?,
    ];
    let (defs, parts) = parts::all(&spec);
    audit::structure_of(&parts, &files, |name| parts::explanation(&spec, name))?;
    if audit == Audit::Full || audit == Audit::Once && !audit::passed(&files) {
        audit::finite_all(&parts, &files)?;
        if !upcycled {
            audit::twins(&defs, &parts, &files, &parts::of_experts)?;
        }
        audit::remember(&files);
    }
    let (weights, _) = weights(&defs, &parts, &files)?;
    let params = parts::Params::new(&defs, weights)?;
    let model = Seq2Seq::new(spec, &params)?;
    Ok(Opened { model, tokenizer: tokenizer(folder)?, generation: GenerationDefaults::of_folder(folder)? })
}
