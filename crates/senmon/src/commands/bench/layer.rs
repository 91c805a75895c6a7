//! `bench layer`: a layer of experts and its dense twin, forward and backward.

use super::{Case, alternate, normal, profile, profiled, refuse_zero};
use crate::cli::BenchLayerArgs;
use crate::commands::{print, print_json};
use crate::failure::{Failure, Result};
use crate::ui::median;
use candle_core::{Device, Tensor, Var};
use senmon_kernels::activation::Activation;
use senmon_kernels::expert_mlp::Shape;
use senmon_kernels::simd::Level;
use senmon_moe::layer::MoeParams;
use senmon_moe::{Ctx, MoeConfig, MoeLayer, Param, ops};
use senmon_train::presets::dense_twin_width;
use std::fmt::Write;

/// A layer of experts and its dense twin: forward, and backward with the gradients of inputs and weights.
pub(in crate::commands) fn layer(args: BenchLayerArgs) -> Result<()> {
    senmon_kernels::process::keep_freed_memory();
    let (t, h, i, k) = (args.tokens, args.hidden, args.intermediate, args.top_k);
    let fewest = args.experts.iter().copied().min().unwrap_or(0);
    let sizes = [
        ("--experts", fewest),
        ("--tokens", t),
        ("--hidden", h),
        ("--intermediate", i),
        ("--top-k", k),
        ("--runs", args.runs),
    ];
    refuse_zero(&sizes)?;
    let Some(&first) = args.experts.first() else { return Err(Failure::mistake("--experts needs a number")) };
    let x = Var::from_vec(normal(1, t * h, 1.0), (t, h), &Device::Cpu)?;
    let upstream = Tensor::from_vec(normal(2, t * h, 1.0), (t, h), &Device::Cpu)?;
    let backward = move |y: &Tensor| -> Result<()> {
        (y * &upstream)?.sum_all()?.backward()?;
        Ok(())
    };
    let mut cases = Vec::new();

    let width = dense_twin_width(first as f64, k, i, 0, true);
    let shape = Shape { hidden: h, intermediate: width, activation: Activation::Silu, gated: true };
    let weight = |name: &str, values: Vec<f32>, shape: &[usize]| {
        Param::trainable(name, values, shape).map(|param| param.with_precision(args.precision.into()))
    };
    let up = weight("up", normal(3, 2 * width * h, 0.02), &[2 * width, h])?;
    let down = weight("down", normal(4, width * h, 0.02), &[h, width])?;
    let (input, back) = (x.as_tensor().clone(), backward.clone());
    cases.push(Case {
        name: format!("dense, I {width}"),
        experts: 0,
        flops: 18.0 * (t * h * width) as f64,
        load_cv: None,
        work: Box::new(move || back(&ops::mlp(&input, &up, &down, shape)?)),
        seconds: Vec::new(),
    });
    for &experts in &args.experts {
        let config = MoeConfig::new(h, i, experts, k);
        let params = MoeParams::new(
            Param::trainable("router", normal(5, experts * h, 0.02), &[experts, h])?,
            weight("gate_up", normal(6, experts * 2 * i * h, 0.02), &[experts, 2 * i, h])?,
            weight("down", normal(7, experts * i * h, 0.02), &[experts, h, i])?,
        );
        let layer = MoeLayer::from_params(config, params)?;
        let (_, routing) = layer.forward(x.as_tensor(), &mut Ctx::default())?;
        let counts: Vec<u64> = routing.load.iter().map(|n| u64::from(*n)).collect();
        let load = senmon_train::observer::LayerStats::from_counts(0, &counts, 0);
        drop(routing);
        let (input, back) = (x.as_tensor().clone(), backward.clone());
        cases.push(Case {
            name: format!("{experts} experts, top-{k}"),
            experts,
            flops: 18.0 * (t * h * i * k) as f64 + 6.0 * (t * h * experts) as f64,
            load_cv: Some(load.load_cv),
            work: Box::new(move || {
                let mut ctx = Ctx { train: true, ..Ctx::default() };
                back(&layer.forward(&input, &mut ctx)?.0)
            }),
            seconds: Vec::new(),
        });
    }
    let peaks = alternate(&mut cases, args.runs, args.precision)?;
    let profiles = profiled(&mut cases, &args.profile)?;
    let dense = median(&cases[0].seconds);
    let timings: Vec<super::Timing> = cases.iter().map(|case| case.timing(&peaks, dense)).collect();
    if args.common.json {
        return print_json(&serde_json::json!({
            "tokens": t, "hidden": h, "intermediate": i, "top_k": k, "runs": args.runs,
            "threads": rayon::current_num_threads(), "simd": Level::current().name(),
            "precision": args.precision.name(), "peak_gflops": peaks.flops() / 1e9, "peak_read_gbs": median(&peaks.bandwidth) / 1e9,
            "cases": timings, "profiles": profile::json(&profiles),
        }));
    }
    let mut out = peaks.words();
    let _ = writeln!(
        out,
        "\n{t} tokens, H {h}, I {i}; forward and backward, gradients of inputs and weights; {} runs\n\n\
         {:<24} {:>9}  {:>17}  {:>8}  {:>7}  {:>8}  load CV",
        args.runs, "", "median ms", "lowest to highest", "GFLOP/s", "of peak", "to dense"
    );
    for case in &timings {
        let cv = case.load_cv.map_or_else(String::new, |cv| format!("{cv:.2}"));
        let range = format!("{:.1} to {:.1}", case.lowest, case.highest);
        let _ = writeln!(
            out,
            "{:<24} {:>9.2}  {range:>17}  {:>8.1}  {:>5.1} %  {:>8.3}  {cv}",
            case.name,
            case.milliseconds,
            case.gflops,
            100.0 * case.of_peak,
            case.to_dense
        );
    }
    out.push_str(&profile::words(&profiles, rayon::current_num_threads()));
    print(&out)
}
