//! `route`: the door for oracles to the routers.

use super::{check_out, print_json};
use crate::cli::RouteArgs;
use crate::failure::{Failure, Result};
use safetensors::tensor::{Dtype, TensorView};
use senmon_kernels::dispatch::EMPTY;
use senmon_models::files;
use senmon_train::layers::Layers;
use senmon_train::route::{Given, route};
use std::collections::BTreeMap;

pub(super) fn run(args: &RouteArgs) -> Result<()> {
    let mut layers = Layers::new();
    for path in &args.config {
        layers = layers.file(path)?;
    }
    for set in &args.set {
        layers = layers.set(set)?;
    }
    // Logits come from no language model.
    let layers = layers.set("router.allow_noncausal=true")?;
    let config = layers.resolve()?;
    let given = Given::read(&args.logits)?;
    check_out(&args.out)?;
    let (routing, losses) = route(&config, &given, args.train)?;
    let slots = routing.top_k;
    let tokens = routing.experts.len() / slots.max(1);
    let bytes =
        |numbers: &mut dyn Iterator<Item = i32>| -> Vec<u8> { numbers.flat_map(i32::to_le_bytes).collect() };
    let expert = |e: &u32| if *e == EMPTY { -1 } else { *e as i32 };
    let experts = bytes(&mut routing.experts.iter().map(expert));
    let load = bytes(&mut routing.load.iter().map(|n| *n as i32));
    let weights =
        senmon_moe::tensor::read(&routing.weights, <[f32]>::to_vec).map_err(senmon_moe::MoeError::from)?;
    let weights: Vec<u8> = weights.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensors = [
        ("experts", Dtype::I32, vec![tokens, slots], &experts),
        ("weights", Dtype::F32, vec![tokens, slots], &weights),
        ("load", Dtype::I32, vec![routing.load.len()], &load),
    ];
    let views = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(dtype, shape, bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
    let file = views.and_then(|views| safetensors::serialize(views, None));
    let file = file.map_err(|e| Failure::other(e.to_string()))?;
    files::write_whole(&args.out, |w| w.write_all(&file))?;
    if args.common.json {
        let mut by_name = BTreeMap::new();
        for loss in &losses {
            let value = loss.value.to_scalar::<f32>().map_err(senmon_moe::MoeError::from)?;
            by_name.insert(loss.name, serde_json::json!({ "value": value, "coefficient": loss.coefficient }));
        }
        print_json(&serde_json::json!({
            "out": args.out,
            "tokens": tokens,
            "slots": slots,
            "load": routing.load,
            "picked": routing.picked_load,
            "dropped": routing.dropped,
            "losses": by_name,
        }))?;
    }
    Ok(())
}
