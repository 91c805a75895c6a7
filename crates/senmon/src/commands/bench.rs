//! `bench`: speed beside the machine's own limits, measured in the same run.

use super::{print, print_json};
use crate::cli::{BenchLayerArgs, BenchTrainArgs};
use crate::failure::{Failure, Result};
use crate::ui::median;
use candle_core::{Device, Tensor, Var};
use senmon_kernels::activation::Activation;
use senmon_kernels::expert_mlp::Shape;
use senmon_kernels::peak;
use senmon_kernels::simd::Level;
use senmon_models::decoder::Decoder;
use senmon_models::params::initial_values;
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec};
use senmon_moe::layer::MoeParams;
use senmon_moe::rng::Stream;
use senmon_moe::{Ctx, MoeConfig, MoeLayer, Param, RouterConfig, ops};
use senmon_train::balancing::Balancing;
use senmon_train::config::{OptimizerConfig, RunConfig};
use senmon_train::presets::{dense_twin_width, footprint};
use senmon_train::step::{AdamW, MicroBatch, step};
use serde::Serialize;
use std::fmt::Write;
use std::time::Instant;

/// Bytes read by a measurement of bandwidth: far beyond any last cache.
const READ: usize = 512 << 20;

/// The machine's limits, as measured between the runs.
#[derive(Default)]
struct Peaks {
    flops: Vec<f64>,
    bandwidth: Vec<f64>,
}

impl Peaks {
    fn measure(&mut self) {
        let threads = rayon::current_num_threads();
        self.flops.push(peak::f32_flops(Level::current(), threads));
        self.bandwidth.push(peak::read_bandwidth(threads, READ));
    }

    /// Operations per second.
    fn flops(&self) -> f64 {
        median(&self.flops)
    }

    fn words(&self) -> String {
        format!(
            "machine: {} threads, {}, f32 peak {:.0} GFLOP/s, read bandwidth {:.1} GB/s",
            rayon::current_num_threads(),
            Level::current().name(),
            self.flops() / 1e9,
            median(&self.bandwidth) / 1e9
        )
    }
}

/// Times of one thing that was run several times.
#[derive(Serialize)]
struct Timing {
    name: String,
    /// E; 0 for a dense one.
    experts: usize,
    milliseconds: f64,
    lowest: f64,
    highest: f64,
    gflops: f64,
    of_peak: f64,
    /// Its time over that of the dense twin.
    to_dense: f64,
    /// Coefficient of variation of its experts' loads.
    load_cv: Option<f64>,
}

/// One thing to be timed.
struct Case {
    name: String,
    experts: usize,
    flops: f64,
    load_cv: Option<f64>,
    work: Box<dyn FnMut() -> Result<()>>,
    seconds: Vec<f64>,
}

impl Case {
    fn run(&mut self) -> Result<f64> {
        let start = Instant::now();
        (self.work)()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// `dense` is the median time of the dense twin.
    fn timing(&self, peaks: &Peaks, dense: f64) -> Timing {
        let seconds = median(&self.seconds);
        Timing {
            name: self.name.clone(),
            experts: self.experts,
            milliseconds: 1e3 * seconds,
            lowest: 1e3 * self.seconds.iter().copied().fold(f64::INFINITY, f64::min),
            highest: 1e3 * self.seconds.iter().copied().fold(0.0, f64::max),
            gflops: self.flops / seconds / 1e9,
            of_peak: self.flops / seconds / peaks.flops(),
            to_dense: seconds / dense,
            load_cv: self.load_cv,
        }
    }
}

/// Runs all cases in turn, `runs` times after one that does not count, so that a machine that slows down slows all.
fn alternate(cases: &mut [Case], runs: usize) -> Result<Peaks> {
    let mut peaks = Peaks::default();
    for case in cases.iter_mut() {
        case.run()?;
    }
    for _ in 0..runs.max(1) {
        peaks.measure();
        for case in cases.iter_mut() {
            // The measurement before, and the other cases, have taken the caches.
            let seconds = case.run()?;
            case.seconds.push(seconds);
        }
    }
    Ok(peaks)
}

/// Normally distributed numbers, always the same.
fn normal(name: u64, count: usize, deviation: f32) -> Vec<f32> {
    let stream = Stream::new(&[name]);
    (0..count as u64)
        .map(|i| {
            let radius = (-2.0 * (1.0 - stream.uniform(2 * i)).max(f32::MIN_POSITIVE).ln()).sqrt();
            deviation * radius * (std::f32::consts::TAU * stream.uniform(2 * i + 1)).cos()
        })
        .collect()
}

fn refuse_zero(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some((flag, _)) => Err(Failure::mistake(format!("{flag} 0 must be at least 1"))),
        None => Ok(()),
    }
}

/// A layer of experts and its dense twin: forward, and backward with the gradients of inputs and weights.
pub(super) fn layer(args: BenchLayerArgs) -> Result<()> {
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
    let up = Param::trainable("up", normal(3, 2 * width * h, 0.02), &[2 * width, h])?;
    let down = Param::trainable("down", normal(4, width * h, 0.02), &[h, width])?;
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
            Param::trainable("gate_up", normal(6, experts * 2 * i * h, 0.02), &[experts, 2 * i, h])?,
            Param::trainable("down", normal(7, experts * i * h, 0.02), &[experts, h, i])?,
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
    let peaks = alternate(&mut cases, args.runs)?;
    let dense = median(&cases[0].seconds);
    let timings: Vec<Timing> = cases.iter().map(|case| case.timing(&peaks, dense)).collect();
    if args.common.json {
        return print_json(&serde_json::json!({
            "tokens": t, "hidden": h, "intermediate": i, "top_k": k, "runs": args.runs,
            "threads": rayon::current_num_threads(), "simd": Level::current().name(),
            "peak_f32_gflops": peaks.flops() / 1e9, "peak_read_gbs": median(&peaks.bandwidth) / 1e9,
            "cases": timings,
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
    print(&out)
}

/// Steps of a whole model and of its dense twin: forward, backward, clipping and AdamW.
pub(super) fn train(args: BenchTrainArgs) -> Result<()> {
    let sizes = [
        ("--hidden", args.hidden),
        ("--layers", args.layers),
        ("--heads", args.heads),
        ("--vocab", args.vocab),
        ("--experts", args.experts),
        ("--top-k", args.top_k),
        ("--intermediate", args.intermediate),
        ("--batch", args.batch),
        ("--sequence", args.sequence),
        ("--runs", args.runs),
    ];
    refuse_zero(&sizes)?;
    if !args.hidden.is_multiple_of(args.heads) {
        return Err(Failure::mistake(format!(
            "--hidden {} is no multiple of --heads {}",
            args.hidden, args.heads
        )));
    }
    let mlp = |intermediate| MlpSpec::gated(intermediate);
    let moe = FfnSpec::Moe(MoeSpec {
        router: RouterConfig { kind: "topk_post".into(), ..RouterConfig::default() },
        ..MoeSpec::plain(args.experts, args.top_k, mlp(args.intermediate))
    });
    let width = dense_twin_width(args.experts as f64, args.top_k, args.intermediate, 0, true);
    let attention = AttentionSpec::plain(args.heads, args.heads, args.hidden / args.heads);
    let spec = |ffn: FfnSpec| ModelSpec {
        max_positions: args.sequence,
        norm_eps: 1e-5,
        ..ModelSpec::plain(args.vocab, args.hidden, attention.clone(), vec![ffn; args.layers])
    };
    let tokens = args.batch * args.sequence;
    let mut cases = Vec::new();
    for (name, experts, spec) in [
        (format!("dense, I {width}"), 0, spec(FfnSpec::Dense(mlp(width)))),
        (format!("{} experts, top-{}", args.experts, args.top_k), args.experts, spec(moe)),
    ] {
        let decoder = Decoder::new(&spec, initial_values(&spec, 0), true)?;
        let mut adamw = AdamW::new(&decoder);
        let (batch, vocab, width) = (args.batch, args.vocab as f32, args.sequence + 1);
        let (mut balancing, optimizer) = (Balancing::new(&RunConfig::default()), OptimizerConfig::default());
        let mut number = 0;
        cases.push(Case {
            name,
            experts,
            flops: 3.0 * footprint(&spec, args.sequence).flops_per_token as f64 * tokens as f64,
            load_cv: None,
            work: Box::new(move || {
                number += 1;
                let stream = Stream::new(&[number]);
                let draw = |i| ((stream.uniform(i) * vocab) as u32).min(vocab as u32 - 1);
                let tokens: Vec<u32> = (0..(batch * width) as u64).map(draw).collect();
                let mut next = |_| Ok(MicroBatch { tokens: tokens.clone(), batch });
                step(&decoder, &mut adamw, &mut balancing, &optimizer, number, 3e-4, 0, 1, &mut next, "")?;
                Ok(())
            }),
            seconds: Vec::new(),
        });
    }
    let peaks = alternate(&mut cases, args.runs)?;
    let dense = median(&cases[0].seconds);
    let timings: Vec<Timing> = cases.iter().map(|case| case.timing(&peaks, dense)).collect();
    let speed = |case: &Timing| 1e3 * tokens as f64 / case.milliseconds;
    if args.common.json {
        return print_json(&serde_json::json!({
            "tokens_per_second": speed(&timings[1]), "dense_tokens_per_second": speed(&timings[0]),
            "threads": rayon::current_num_threads(), "simd": Level::current().name(),
            "peak_f32_gflops": peaks.flops() / 1e9, "peak_read_gbs": median(&peaks.bandwidth) / 1e9,
            "cases": timings,
        }));
    }
    let mut out = peaks.words();
    let _ = writeln!(
        out,
        "\nH {}, {} layers, {} heads, V {}, {} sequences of {}; forward, backward, clipping, AdamW; {} steps each\n\n\
         {:<24} {:>9}  {:>9}  {:>17}  {:>8}  {:>7}  {:>8}",
        args.hidden,
        args.layers,
        args.heads,
        args.vocab,
        args.batch,
        args.sequence,
        args.runs,
        "",
        "tokens/s",
        "median ms",
        "lowest to highest",
        "GFLOP/s",
        "of peak",
        "to dense"
    );
    for case in &timings {
        let range = format!("{:.1} to {:.1}", case.lowest, case.highest);
        let _ = writeln!(
            out,
            "{:<24} {:>9.0}  {:>9.2}  {range:>17}  {:>8.1}  {:>5.1} %  {:>8.3}",
            case.name,
            speed(case),
            case.milliseconds,
            case.gflops,
            100.0 * case.of_peak,
            case.to_dense
        );
    }
    print(&out)
}
