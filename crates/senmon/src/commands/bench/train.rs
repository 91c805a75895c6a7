//! `bench train`: steps of a whole model and of its dense twin.

use super::{Case, Timing, alternate, profile, profiled, refuse_zero};
use crate::cli::BenchTrainArgs;
use crate::commands::{print, print_json};
use crate::failure::{Failure, Result};
use crate::ui::median;
use senmon_kernels::simd::Level;
use senmon_models::decoder::Decoder;
use senmon_models::params::initial_values;
use senmon_models::spec::{AttentionSpec, FfnSpec, MlpSpec, ModelSpec, MoeSpec};
use senmon_moe::RouterConfig;
use senmon_moe::rng::Stream;
use senmon_train::balancing::Balancing;
use senmon_train::config::{OptimizerConfig, RunConfig};
use senmon_train::presets::{dense_twin_width, footprint};
use senmon_train::step::{AdamW, MicroBatch, step};
use std::fmt::Write;

/// Steps of a whole model and of its dense twin: forward, backward, clipping and AdamW.
pub(in crate::commands) fn train(args: BenchTrainArgs) -> Result<()> {
    senmon_kernels::process::keep_freed_memory();
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
        let decoder = Decoder::train_in(&spec, initial_values(&spec, 0), args.precision.into())?;
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
    let peaks = alternate(&mut cases, args.runs, args.precision)?;
    let profiles = profiled(&mut cases, &args.profile)?;
    let dense = median(&cases[0].seconds);
    let timings: Vec<Timing> = cases.iter().map(|case| case.timing(&peaks, dense)).collect();
    let speed = |case: &Timing| 1e3 * tokens as f64 / case.milliseconds;
    if args.common.json {
        return print_json(&serde_json::json!({
            "tokens_per_second": speed(&timings[1]), "dense_tokens_per_second": speed(&timings[0]),
            "threads": rayon::current_num_threads(), "simd": Level::current().name(),
            "precision": args.precision.name(), "peak_gflops": peaks.flops() / 1e9, "peak_read_gbs": median(&peaks.bandwidth) / 1e9,
            "cases": timings, "profiles": profile::json(&profiles),
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
    out.push_str(&profile::words(&profiles, rayon::current_num_threads()));
    print(&out)
}
