//! `senmon`: the specification itself, for what no other family says. Tensors have the names of `qwen3_moe` and `dots1`.

use super::common::{Json, Written, with};
use crate::error::Result;
use crate::spec::ModelSpec;
use serde_json::{Map, json};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let spec = json.get("spec").ok_or_else(|| json.error("spec is missing"))?;
    let spec: ModelSpec =
        serde_json::from_value(spec.clone()).map_err(|e| json.error(format!("spec: {e}")))?;
    spec.validate().map_err(|e| json.error(e.to_string()))?;
    Ok(spec)
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    let spec = serde_json::to_value(spec).map_err(|e| e.to_string())?;
    Ok(with(Map::new(), json!({ "spec": spec, "torch_dtype": "float32" })))
}
