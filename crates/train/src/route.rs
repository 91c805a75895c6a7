//! Routing of given logits, as a run of a configuration would route them: the door for oracles.

use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use senmon_moe::balance::{self, Around, BalanceLoss};
use senmon_moe::layer::{Routing, route_logits};
use senmon_moe::rng::{Draws, Purpose};
use senmon_moe::router::{self, RouteInput};

use crate::config::RunConfig;
use crate::error::{Result, TrainError};

/// What a routing goes by.
#[derive(Clone, Debug)]
pub struct Given {
    /// \[T, columns\].
    pub logits: Tensor,
    /// The selection bias, \[E\].
    pub bias: Option<Vec<f32>>,
    /// \[T\].
    pub token_ids: Option<Vec<u32>>,
    /// The experts of each token id, \[V, K\], of `hash`; without it they are balanced over `token_ids`.
    pub table: Option<Vec<f32>>,
    /// Random numbers to take, \[T, E\], whatever they are for: normal for `noisy_topk`, uniform (column 0) or Gumbel for `gshard`, exponential for the first
    /// pick of `sparsemixer`, uniform for `drop = "random"` and for `random`.
    pub noise: Option<Vec<f32>>,
    /// As `noise`, for the second pick of `sparsemixer`.
    pub second: Option<Vec<f32>>,
    /// Uniform numbers \[T, 2\] by which `sparsemixer` cuts weights.
    pub keep: Option<Vec<f32>>,
    /// The deviation of learned noise, \[T, E\].
    pub noise_std: Option<Tensor>,
    /// Tokens that count, \[T\].
    pub mask: Option<Vec<bool>>,
    /// What the predictor of `depth` makes of each token, \[T, 1\].
    pub predicted: Option<Tensor>,
    /// Sequences of equal length that the tokens are; 0 is 1.
    pub sequences: usize,
}

impl Given {
    /// Just logits.
    pub fn new(logits: Tensor) -> Self {
        Self {
            logits,
            bias: None,
            token_ids: None,
            table: None,
            noise: None,
            second: None,
            keep: None,
            noise_std: None,
            mask: None,
            predicted: None,
            sequences: 0,
        }
    }

    /// Reads a safetensors file with `logits` and whatever else there is, by the names of the fields (`noise2` is `second`).
    pub fn read(path: &Path) -> Result<Self> {
        let bad = |reason: String| TrainError::State { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| bad(format!("is not a whole safetensors file: {e}")))?;
        let find = |name: &str| file.tensor(name).ok();
        let floats = |name: &str| -> Result<Option<(Vec<f32>, Vec<usize>)>> {
            find(name).map(|view| Ok((floats(name, &view).map_err(bad)?, view.shape().to_vec()))).transpose()
        };
        let wholes = |name: &str| -> Result<Option<Vec<u32>>> {
            find(name).map(|view| wholes(name, &view).map_err(bad)).transpose()
        };
        let tensor = |name: &str| -> Result<Option<Tensor>> {
            let Some((values, shape)) = floats(name)? else { return Ok(None) };
            Ok(Some(Tensor::from_vec(values, shape, &Device::Cpu).map_err(senmon_moe::MoeError::from)?))
        };
        let logits = tensor("logits")?.ok_or_else(|| bad("has no tensor `logits` [T, E]".into()))?;
        let &[tokens, columns] = logits.dims() else {
            return Err(bad(format!("`logits` has shape {:?}, expected [T, E]", logits.dims())));
        };
        let values = |name: &str| -> Result<Option<Vec<f32>>> { Ok(floats(name)?.map(|(values, _)| values)) };
        let given = Self {
            bias: values("bias")?,
            token_ids: wholes("token_ids")?,
            table: match find("table").map(|view| view.dtype()) {
                None | Some(Dtype::F32) => values("table")?,
                Some(_) => wholes("table")?.map(|table| table.iter().map(|e| *e as f32).collect()),
            },
            noise: values("noise")?,
            second: values("noise2")?,
            keep: values("keep")?,
            noise_std: tensor("noise_std")?,
            mask: wholes("mask")?.map(|mask| mask.iter().map(|counts| *counts != 0).collect()),
            predicted: tensor("predicted")?,
            sequences: wholes("sequences")?.and_then(|n| n.first().copied()).unwrap_or(0) as usize,
            logits,
        };
        let lengths = [
            ("token_ids", given.token_ids.as_ref().map(Vec::len), tokens),
            ("mask", given.mask.as_ref().map(Vec::len), tokens),
            ("noise", given.noise.as_ref().map(Vec::len), tokens * columns),
            ("noise2", given.second.as_ref().map(Vec::len), tokens * columns),
            ("keep", given.keep.as_ref().map(Vec::len), tokens * 2),
            ("noise_std", given.noise_std.as_ref().map(Tensor::elem_count), tokens * columns),
            ("predicted", given.predicted.as_ref().map(Tensor::elem_count), tokens),
        ];
        for (name, found, expected) in lengths {
            if let Some(found) = found.filter(|found| *found != expected) {
                return Err(bad(format!("`{name}` has {found} elements, expected {expected}")));
            }
        }
        Ok(given)
    }
}

/// The elements of an f32 tensor.
fn floats(name: &str, view: &TensorView) -> std::result::Result<Vec<f32>, String> {
    if view.dtype() != Dtype::F32 {
        return Err(format!("`{name}` is {:?}, expected F32", view.dtype()));
    }
    Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// The elements of a tensor of whole numbers from 0 on.
fn wholes(name: &str, view: &TensorView) -> std::result::Result<Vec<u32>, String> {
    let data = view.data();
    let wide = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i]));
    let numbers: Vec<i64> = match view.dtype() {
        Dtype::U8 | Dtype::BOOL => data.iter().map(|b| i64::from(*b)).collect(),
        Dtype::U32 => {
            data.chunks_exact(4).map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        Dtype::I32 => {
            data.chunks_exact(4).map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        Dtype::I64 => data.chunks_exact(8).map(wide).collect(),
        other => return Err(format!("`{name}` is {other:?}, expected U32")),
    };
    let whole =
        |n: i64| u32::try_from(n).map_err(|_| format!("`{name}` holds {n}, expected numbers from 0 on"));
    numbers.into_iter().map(whole).collect()
}

/// Routes as the first MoE layer of a run of this configuration would, in training or not, with the losses of its balancing.
pub fn route(config: &RunConfig, given: &Given, train: bool) -> Result<(Routing, Vec<BalanceLoss>)> {
    let Some(experts) = config.expert_counts()?.first().copied() else {
        return Err(TrainError::Conflict("the configuration has no MoE layer to route for".into()));
    };
    let layer = config.moe_spec(experts).layer(config.model.hidden);
    let kind = router::kind(&config.router.kind)?;
    let router = router::build(&layer.router, layer.choices(), layer.top_k)?;
    let mut draws = Vec::new();
    if let Some(noise) = &given.noise {
        draws.extend([Purpose::Noise, Purpose::Pick, Purpose::Drop].map(|purpose| (purpose, &noise[..])));
    }
    draws.extend(given.second.as_ref().map(|draws| (Purpose::Second, &draws[..])));
    draws.extend(given.keep.as_ref().map(|draws| (Purpose::Keep, &draws[..])));
    let zeros = kind.selection_bias.then(|| vec![0.0; layer.choices()]);
    let bias = given.bias.as_ref().filter(|_| kind.selection_bias).or(zeros.as_ref());
    if let Some(found) = bias.map(Vec::len).filter(|found| *found != layer.choices()) {
        return Err(TrainError::Conflict(format!(
            "`bias` has {found} elements, expected {}",
            layer.choices()
        )));
    }
    let table = match (&given.table, &given.token_ids) {
        (Some(table), _) => Some(table.clone()),
        (None, Some(ids)) if kind.by_token_id => {
            if let Some(id) = ids.iter().find(|id| **id >= 1 << 24) {
                return Err(TrainError::Conflict(format!("`token_ids` holds {id}, beyond any vocabulary")));
            }
            let mut counts = vec![0; ids.iter().max().map_or(0, |id| *id as usize + 1)];
            ids.iter().for_each(|id| counts[*id as usize] += 1);
            Some(router::balanced_table(&counts, experts, layer.top_k))
        }
        _ => None,
    };
    let input = RouteInput {
        top_k: layer.top_k,
        bias: bias.map(Vec::as_slice),
        forced: None,
        train,
        draws: Draws { seed: config.train.seed, given: &draws, ..Draws::default() },
        noise_std: given.noise_std.as_ref(),
        token_ids: given.token_ids.as_deref(),
        table: table.as_deref(),
        mask: given.mask.as_deref(),
        together: 0,
        predicted: given.predicted.as_ref(),
    };
    let routing = route_logits(&layer, &*router, &given.logits, &input, given.sequences)
        .map_err(|e| TrainError::Conflict(e.to_string()))?;
    let multiplier = if kind.name == "relu" { balance::LEAST_MULTIPLIER } else { 0.0 };
    let around = Around { multiplier, ..Around::default() };
    let losses = balance::losses_of(std::slice::from_ref(&routing), &config.balance, around)?;
    Ok((routing, losses))
}
