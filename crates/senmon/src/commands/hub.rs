//! Models by their names on the Hugging Face hub.

use crate::failure::Result;
use crate::ui::HubProgress;
use senmon_hub::{Hub, Name, Settings};
use senmon_models::{checkpoint, seq2seq};
use std::path::{Path, PathBuf};

/// Makes a name of the hub the path of the model, which is downloaded where the cache does not have it. A path that exists, or
/// that has not the form of a name, stays as it is.
pub(super) fn find(model: &mut PathBuf, quiet: bool) -> Result<()> {
    let is_gguf = model.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    let name = model.to_str().filter(|text| Name::looks_like(text) && !is_gguf);
    if let (Some(name), Err(_)) = (name, model.symlink_metadata()) {
        let progress = HubProgress::new(quiet);
        let found = Hub::new(Settings::from_env()?).find(&Name::parse(name)?, &progress, &accept);
        progress.done();
        *model = found?;
    }
    Ok(())
}

/// A configuration of a model that can be run.
fn accept(folder: &Path) -> std::result::Result<(), String> {
    match seq2seq::family_of(folder).map_err(|e| e.to_string())? {
        Some(_) => Ok(()),
        None => checkpoint::load_spec(folder).map(drop).map_err(|e| e.to_string()),
    }
}
