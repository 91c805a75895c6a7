//! What a checkpoint holds beyond the model: the optimiser's moments, and where the run stands.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use senmon_kernels::gemm::Precision;
use senmon_kernels::simd::Level;
use senmon_models::checkpoint;
use senmon_models::decoder::{Decoder, Slot};
use senmon_models::params::param_defs;
use senmon_models::spec::{FfnSpec, ModelSpec};
use serde::{Deserialize, Serialize};

use crate::alarms::Alarms;
use crate::balancing::Balancing;
use crate::error::{Result, TrainError};
use crate::folder::{Checkpoint, PUBLISHING, RunFolder};
use crate::step::AdamW;

/// The folder of the state within a checkpoint.
pub const STATE: &str = "state";
const OPTIMIZER: &str = "optimizer.safetensors";
const BALANCE: &str = "balance.safetensors";
const PROGRESS: &str = "progress.json";
const ALARMS: &str = "alarms.json";

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds spent training, over all resumptions.
    pub seconds: f64,
    /// The step of the last evaluation.
    pub evaluated: u64,
    /// The instruction set that the steps were computed with: another gives other bits.
    pub simd: String,
    /// The model came from `--init`, so the configuration does not say its shape.
    pub from_init: bool,
    /// What the model is made of: a layout need not say what is only of training.
    pub spec: ModelSpec,
    /// A key of what the run is fed: with another, batches are others.
    pub data: String,
}

/// A run as read back from a checkpoint.
pub struct Resumed {
    /// The model, ready to be trained on.
    pub decoder: Decoder,
    /// Its optimiser.
    pub adamw: AdamW,
    /// The coefficient of `l1`, where it was saved.
    pub multiplier: Option<f64>,
    /// Where the run stands.
    pub progress: Progress,
    /// What it has noticed.
    pub alarms: Alarms,
}

/// Writes a whole checkpoint and makes it the model that the run folder shows; `extra` files are copied into it.
pub fn save(
    folder: &RunFolder,
    decoder: &Decoder,
    adamw: &AdamW,
    balancing: &Balancing,
    progress: &Progress,
    alarms: &Alarms,
    family: &str,
    extra: &[PathBuf],
) -> Result<Checkpoint> {
    let pending = folder.begin(progress.step)?;
    let path = pending.path().to_owned();
    let values = decoder.values()?;
    let slices: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
    checkpoint::save(&path, decoder.spec(), &slices, family)?;
    for file in extra {
        let to = path.join(file.file_name().unwrap_or_default());
        fs::copy(file, &to).map_err(TrainError::io("copy", file))?;
    }
    let state = path.join(STATE);
    fs::create_dir_all(&state).map_err(TrainError::io("create", &state))?;
    write_moments(&state.join(OPTIMIZER), decoder, adamw)?;
    write_balance(&state.join(BALANCE), decoder, balancing)?;
    write_json(&state.join(PROGRESS), progress)?;
    write_json(&state.join(ALARMS), alarms)?;
    let checkpoint = pending.commit()?;
    publish(&checkpoint.path, folder.root())?;
    Ok(checkpoint)
}

/// Gives the files of a checkpoint's model a name in the run folder too: `config.json` last, so that a reader who finds
/// it finds the rest. Weights are linked, not copied, where the file system can.
pub(crate) fn publish(from: &Path, root: &Path) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(from)
        .and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>())
        .map_err(TrainError::io("read", from))?
        .into_iter()
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name())
        .collect();
    names.sort_by_key(|name| (name == "config.json", name.clone()));
    for name in names {
        let (source, target) = (from.join(&name), root.join(&name));
        let mut temporary = std::ffi::OsString::from(PUBLISHING);
        temporary.push(&name);
        let temporary = root.join(temporary);
        let _ = fs::remove_file(&temporary);
        if fs::hard_link(&source, &temporary).is_err() {
            fs::copy(&source, &temporary).map_err(TrainError::io("write", &temporary))?;
        }
        fs::rename(&temporary, &target).map_err(TrainError::io("write", &target))?;
        // Between two names of one file a rename does nothing.
        let _ = fs::remove_file(&temporary);
    }
    Ok(())
}

/// Names of the two moments of a parameter.
fn moment_names(param: &str) -> (String, String) {
    (format!("m.{param}"), format!("v.{param}"))
}

fn write_moments(path: &Path, decoder: &Decoder, adamw: &AdamW) -> Result<()> {
    let broken = |reason: String| TrainError::State { path: path.to_owned(), reason };
    let bytes = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let mut tensors: Vec<(String, Vec<u8>, Vec<usize>)> = Vec::new();
    for (slot, moments) in decoder.slots().iter().zip(adamw.moments()) {
        if let (Slot::Param(param), Some((m, v))) = (slot, moments) {
            let (m_name, v_name) = moment_names(param.name());
            let shape = param.tensor().dims().to_vec();
            tensors.push((m_name, bytes(m), shape.clone()));
            tensors.push((v_name, bytes(v), shape));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, bytes, shape)| {
            let view =
                TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(|e| broken(e.to_string()))?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>>>()?;
    let file = safetensors::serialize(views, None).map_err(|e| broken(e.to_string()))?;
    crate::folder::write_whole(path, &file)
}

/// Reads a checkpoint back. `expected` is what the configuration makes of the saved specification.
pub fn load(
    checkpoint: &Checkpoint,
    precision: Precision,
    expected: impl FnOnce(&Progress) -> Result<ModelSpec>,
) -> Result<Resumed> {
    let state = checkpoint.path.join(STATE);
    let path = state.join(PROGRESS);
    let progress: Progress = read_json(&path)?;
    let alarms = read_json(&state.join(ALARMS))?;
    if progress.step != checkpoint.step {
        let reason = format!("says step {}, its folder step {}", progress.step, checkpoint.step);
        return Err(TrainError::State { path, reason });
    }
    let loaded = checkpoint::load(&checkpoint.path).map_err(|e| TrainError::State {
        path: checkpoint.path.clone(),
        reason: format!("{e}; remove this checkpoint to go on from the one before"),
    })?;
    let refuse = |reason| Err(TrainError::State { path: checkpoint.path.clone(), reason });
    if let Some(reason) = difference("its state", &progress.spec, &loaded.spec) {
        return refuse(reason);
    }
    // What the configuration says now may differ in what is only of training (noise, say), not in shape.
    let spec = expected(&progress)?;
    if let Some(reason) = difference("senmon.toml", &spec, &loaded.spec) {
        return refuse(reason);
    }
    let adamw = read_moments(&state.join(OPTIMIZER), &spec, progress.step)?;
    let decoder = Decoder::train_in(&spec, loaded.params, precision)?;
    let multiplier = read_balance(&state.join(BALANCE), &decoder)?;
    Ok(Resumed { decoder, adamw, multiplier, progress, alarms })
}

/// Name of the running means of a layer's experts.
fn means_name(layer: usize) -> String {
    format!("layers.{layer}.running_means")
}

/// Writes what balancing goes by beyond the model: the coefficient of `l1`, and the running means of experts; no file where there is neither.
fn write_balance(path: &Path, decoder: &Decoder, balancing: &Balancing) -> Result<()> {
    let broken = |reason: String| TrainError::State { path: path.to_owned(), reason };
    let mut tensors: Vec<(String, Dtype, Vec<u8>, Vec<usize>)> = Vec::new();
    if let Some(multiplier) = balancing.saved() {
        tensors.push(("multiplier".into(), Dtype::F64, multiplier.to_le_bytes().to_vec(), vec![1]));
    }
    for (layer, moe) in decoder.moe_layers() {
        if let Some(means) = moe.running().values() {
            let shape = vec![moe.config().experts, moe.config().inner()];
            let bytes = means.iter().flat_map(|mean| mean.to_le_bytes()).collect();
            tensors.push((means_name(layer), Dtype::F32, bytes, shape));
        }
    }
    if tensors.is_empty() {
        return Ok(());
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, bytes, shape)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| broken(e.to_string()))?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>>>()?;
    let file = safetensors::serialize(views, None).map_err(|e| broken(e.to_string()))?;
    crate::folder::write_whole(path, &file)
}

/// Reads it back, into the decoder's layers; the coefficient of `l1`, if it is there.
fn read_balance(path: &Path, decoder: &Decoder) -> Result<Option<f64>> {
    if !path.exists() {
        return Ok(None);
    }
    let broken = |reason: String| TrainError::State { path: path.to_owned(), reason };
    let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| broken(format!("is not a whole balancing state ({e})")))?;
    for (layer, moe) in decoder.moe_layers() {
        if let Ok(view) = tensors.tensor(&means_name(layer)) {
            let shape = [moe.config().experts, moe.config().inner()];
            if view.dtype() != Dtype::F32 || view.shape() != shape {
                return Err(broken(format!(
                    "{} is {:?}, expected {shape:?}",
                    means_name(layer),
                    view.shape()
                )));
            }
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            moe.running().restore(values.collect());
        }
    }
    let Ok(view) = tensors.tensor("multiplier") else { return Ok(None) };
    match (view.dtype(), <[u8; 8]>::try_from(view.data())) {
        (Dtype::F64, Ok(bytes)) if f64::from_le_bytes(bytes).is_finite() => {
            Ok(Some(f64::from_le_bytes(bytes)))
        }
        _ => Err(broken("multiplier is not one finite number".into())),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|e| TrainError::State { path: path.to_owned(), reason: e.to_string() })?;
    crate::folder::write_whole(path, &text)
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(TrainError::io("read", path))?;
    serde_json::from_slice(&text).map_err(|e| TrainError::State {
        path: path.to_owned(),
        reason: format!("is not the state of a run: {e}"),
    })
}

/// The first thing in which the model of a checkpoint is not that of the configuration.
fn difference(who: &str, config: &ModelSpec, found: &ModelSpec) -> Option<String> {
    let tell = |what: &str, config: String, found: String| {
        (config != found).then(|| {
            format!("the checkpoint has {what} {found}, {who} says {config}: put that back as it was, or train into another --out")
        })
    };
    let sizes = |spec: &ModelSpec| {
        let a = &spec.attention;
        [
            ("a vocabulary of", spec.vocab),
            ("hidden width", spec.hidden),
            ("layers:", spec.layers.len()),
            ("heads:", a.heads),
            ("key-value heads:", a.kv_heads),
            ("head width", a.head_dim),
        ]
    };
    let by_size = sizes(config)
        .into_iter()
        .zip(sizes(found))
        .find_map(|((what, config), (_, found))| tell(what, config.to_string(), found.to_string()));
    let experts = || {
        let numbers = |layer: &FfnSpec| match layer {
            FfnSpec::Dense(mlp) => {
                [("a dense width of", mlp.intermediate), ("experts:", 0), ("experts per token:", 0)]
            }
            FfnSpec::Moe(moe) => [
                ("experts of width", moe.expert.intermediate),
                ("experts:", moe.experts),
                ("experts per token:", moe.top_k),
            ],
        };
        config.layers.iter().zip(&found.layers).enumerate().find_map(|(l, (c, f))| {
            numbers(c).into_iter().zip(numbers(f)).find_map(|((_, c), (what, f))| {
                tell(&format!("in layer {l} {what}"), c.to_string(), f.to_string())
            })
        })
    };
    by_size.or_else(experts).or_else(|| {
        let shapes = |spec: &ModelSpec| {
            param_defs(spec).into_iter().map(|def| (def.name, def.shape)).collect::<Vec<_>>()
        };
        let (config, found) = (shapes(config), shapes(found));
        config
            .iter()
            .zip(&found)
            .find_map(|(c, f)| {
                tell("the parameter", format!("{} {:?}", c.0, c.1), format!("{} {:?}", f.0, f.1))
            })
            .or_else(|| tell("parameters:", config.len().to_string(), found.len().to_string()))
    })
}

fn read_moments(path: &Path, spec: &ModelSpec, steps: u64) -> Result<AdamW> {
    let broken = |reason: String| TrainError::State { path: path.to_owned(), reason };
    let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| {
        broken(format!(
            "is not a whole optimiser state ({e}); remove this checkpoint to go on from the one before"
        ))
    })?;
    let mut by_name: HashMap<String, TensorView> = tensors.tensors().into_iter().collect();
    let mut moments = Vec::new();
    for def in param_defs(spec) {
        if def.kind == senmon_models::params::ParamKind::State {
            moments.push(None);
            continue;
        }
        let mut take = |name: String| -> Result<Vec<f32>> {
            let view = by_name.remove(&name).ok_or_else(|| broken(format!("has no {name}")))?;
            if view.dtype() != Dtype::F32 || view.shape() != def.shape {
                return Err(broken(format!(
                    "{name} is {:?} {:?}, expected F32 {:?}",
                    view.dtype(),
                    view.shape(),
                    def.shape
                )));
            }
            Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let (m, v) = moment_names(&def.name);
        moments.push(Some((take(m)?, take(v)?)));
    }
    if let Some(name) = by_name.keys().min() {
        return Err(broken(format!("has {name}, which the model has not")));
    }
    Ok(AdamW::resume(moments, steps))
}

/// The name of the instruction set in force, for products of a precision.
pub fn simd(precision: Precision) -> String {
    let level = Level::current();
    let dots = precision == Precision::Bf16 && level.has_bf16_dots();
    format!("{}{}", level.min(Level::Avx512).name(), if dots { " with products of bf16" } else { "" })
}
