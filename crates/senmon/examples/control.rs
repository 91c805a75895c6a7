//! One policy learns four tasks of a small grid world, with an MoE layer and as its dense twin.
//!
//! On a board of 7×7 cells the agent is to go to a flag (`reach`), to go to another flag beside which every
//! move goes the other way (`mirror`), to take a key to a door (`fetch`), or not to be caught (`flee`).
//! Nothing tells the policy its task but what it sees on the board. A flag, or key and door together, give 1
//! and each move costs 1/28; each move without being caught gives 1/28. After 28 moves it is over.
//!
//! The policy is a linear layer, an MoE layer of 4 experts, 2 for each board, and a linear layer for the
//! moves and the expected return; the dense twin has an MLP of equal operations. Both learn by PPO.
//!
//! ```text
//! cargo run --release -p senmon --example control
//! ```
//!
//! It trains both, in a minute and a quarter on two busy cores (Xeon with AVX-512, 2026-11-26), and prints
//! the same numbers at each run there, for any number of threads, but for the seconds:
//!
//! ```text
//!     moves      MoE    dense   mean return of the four tasks
//!         0   -0.519   -0.522
//!     81920   -0.251    0.262
//!    163840    0.302    0.486
//!       ...
//!    573440    0.822    0.836
//!
//! return     parameters    reach   mirror    fetch     flee     mean
//! MoE             55365    0.848    0.832    0.623    0.987    0.822
//! dense           30533    0.849    0.835    0.669    0.992    0.836
//! random              -   -0.428   -0.572   -0.850    0.203   -0.412
//!
//! percentage of each task's moves at each expert (load CV 0.39)
//!   task         e0     e1     e2     e3
//!   reach     47.4*   9.7    8.5   34.4
//!   mirror    15.6   22.5   40.6*  21.3
//!   fetch     28.4   44.3*  10.8   16.5
//!   flee      47.7*   3.3   19.3   29.8
//! ```
//!
//! The dense twin learns faster here, and both end close to each other; what is left between them is `fetch`.
//! With 2 experts for each board, 50 is the most that an expert can have. A line of words for each expert
//! follows. K and the learning rate were chosen with these returns in view: with one expert for each board
//! (`switch`) `fetch` stayed below 0 in the same time.

mod common;

use candle_core::{D, Device, Tensor};
use candle_nn::ops::{log_softmax, silu};
use candle_nn::{AdamW, LayerNorm, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_nn::{layer_norm_no_bias, linear, loss};
use common::{FeedForward, Served};
use senmon::moe::rng::Stream;
use senmon::moe::{BalanceConfig, Ctx, MoeConfig, Result, Routing};
use std::time::Instant;

const SIDE: i32 = 7; // cells
const LIMIT: usize = 28; // moves of an episode
const HUNTER_MOVES: f32 = 0.7; // chance of each move
const MOVES: [(i32, i32); 4] = [(0, -1), (0, 1), (-1, 0), (1, 0)];

const HIDDEN: usize = 64;
const EXPERTS: usize = 4;
const TOP_K: usize = 2;
const INTERMEDIATE: usize = 64;

const BOARDS: usize = 128; // played at once, as many of each task
const ROLLOUT: usize = 16; // moves on each board between two updates
const ROUNDS: usize = 280;
const REPORTS: usize = 7;
const EPOCHS: usize = 3;
// So many that no tensor of an update has 65,536 elements: from there on candle waits for its threads at each
// operation.
const MINI_BATCHES: usize = 4;
const LEARNING_RATE: f64 = 7e-3;
const DISCOUNT: f32 = 0.97;
const TRACE: f32 = 0.95; // λ of the advantages
const CLIP: f64 = 0.2;
const ENTROPY: f64 = 0.01;
const EPISODES: usize = 100; // of each task in an evaluation
const SEED: u64 = 1;

/// Random numbers, one after another.
struct Dice(Stream, u64);

impl Dice {
    fn new(coordinates: &[u64]) -> Self {
        Self(Stream::new(coordinates), 0)
    }

    /// From 0 to 1.
    fn uniform(&mut self) -> f32 {
        self.1 += 1;
        self.0.uniform(self.1)
    }

    fn below(&mut self, end: usize) -> usize {
        ((self.uniform() * end as f32) as usize).min(end - 1)
    }
}

/// What is to be done on a board. Nothing says which but the things on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Go to the flag.
    Reach,
    /// Go to the other flag, beside which every move goes the other way.
    Mirror,
    /// Take the key, then go to the door.
    Fetch,
    /// Do not let the hunter get you.
    Flee,
}

const TASKS: [(Task, &str); 4] =
    [(Task::Reach, "reach"), (Task::Mirror, "mirror"), (Task::Fetch, "fetch"), (Task::Flee, "flee")];

type Cell = (i32, i32);

/// Where things are on a board, those that there are.
#[derive(Clone, Copy, Default)]
struct Things {
    agent: Cell,
    flag: Option<Cell>,
    mirror_flag: Option<Cell>,
    key: Option<Cell>,
    door: Option<Cell>,
    hunter: Option<Cell>,
}

/// Row and column of each kind of thing, one-hot, and the time that has passed.
const INPUTS: usize = 6 * 2 * SIDE as usize + 1;

struct Board {
    task: usize,
    things: Things,
    moves: usize,
    /// Sum of the rewards so far.
    gained: f32,
}

impl Board {
    fn new(task: usize, dice: &mut Dice) -> Self {
        let mut cells: Vec<Cell> = Vec::new();
        while cells.len() < 3 {
            let cell = (dice.below(SIDE as usize) as i32, dice.below(SIDE as usize) as i32);
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
        let (agent, one, other) = (cells[0], Some(cells[1]), Some(cells[2]));
        let things = match TASKS[task].0 {
            Task::Reach => Things { agent, flag: one, ..Things::default() },
            Task::Mirror => Things { agent, mirror_flag: one, ..Things::default() },
            Task::Fetch => Things { agent, key: one, door: other, ..Things::default() },
            Task::Flee => Things { agent, hunter: one, ..Things::default() },
        };
        Self { task, things, moves: 0, gained: 0.0 }
    }

    /// What the policy sees.
    fn observe(&self, inputs: &mut Vec<f32>) {
        let Things { agent, flag, mirror_flag, key, door, hunter } = self.things;
        for thing in [Some(agent), flag, mirror_flag, key, door, hunter] {
            for at in 0..SIDE {
                inputs.push(thing.is_some_and(|(x, _)| x == at).into());
            }
            for at in 0..SIDE {
                inputs.push(thing.is_some_and(|(_, y)| y == at).into());
            }
        }
        inputs.push(self.moves as f32 / LIMIT as f32);
    }

    /// Makes a move; the reward, and whether the episode is over.
    fn step(&mut self, action: usize, dice: &mut Dice) -> (f32, bool) {
        let task = TASKS[self.task].0;
        let (x, y) = self.things.agent;
        let (dx, dy) = MOVES[action];
        let sign = if task == Task::Mirror { -1 } else { 1 };
        let agent = ((x + sign * dx).clamp(0, SIDE - 1), (y + sign * dy).clamp(0, SIDE - 1));
        self.things.agent = agent;
        self.moves += 1;
        let (at, a_move) = (Some(agent), 1.0 / LIMIT as f32);
        let (reward, done) = match task {
            Task::Reach if at == self.things.flag => (1.0 - a_move, true),
            Task::Mirror if at == self.things.mirror_flag => (1.0 - a_move, true),
            Task::Fetch if at == self.things.key => {
                self.things.key = None;
                (0.5 - a_move, false)
            }
            Task::Fetch if at == self.things.door && self.things.key.is_none() => (0.5 - a_move, true),
            Task::Flee => {
                let caught = at == self.things.hunter || self.hunt(dice);
                (if caught { 0.0 } else { a_move }, caught)
            }
            _ => (-a_move, false),
        };
        self.gained += reward;
        (reward, done || self.moves == LIMIT)
    }

    /// The hunter comes a cell nearer, mostly; whether it has the agent.
    fn hunt(&mut self, dice: &mut Dice) -> bool {
        let (agent, Some(hunter)) = (self.things.agent, &mut self.things.hunter) else { return false };
        if dice.uniform() < HUNTER_MOVES {
            let (dx, dy) = (agent.0 - hunter.0, agent.1 - hunter.1);
            if dx.abs() > dy.abs() {
                hunter.0 += dx.signum();
            } else {
                hunter.1 += dy.signum();
            }
        }
        *hunter == agent
    }
}

/// What N boards show: \[N, inputs\].
fn observe<'a>(boards: impl Iterator<Item = &'a Board>) -> candle_core::Result<Tensor> {
    let mut inputs = Vec::new();
    boards.for_each(|board| board.observe(&mut inputs));
    let count = inputs.len() / INPUTS;
    Tensor::from_vec(inputs, (count, INPUTS), &Device::Cpu)
}

/// Actor and critic in one.
struct Policy {
    enter: Linear,
    norm: LayerNorm,
    ffn: FeedForward,
    leave_norm: LayerNorm,
    leave: Linear,
}

/// What a policy thinks of N boards.
struct Thought {
    /// Logarithms of the probabilities of the moves: \[N, 4\].
    log_p: Tensor,
    /// What it expects to gain from here on: \[N\].
    value: Tensor,
    routing: Option<Routing>,
}

impl Policy {
    fn new(moe: bool, vb: VarBuilder) -> Result<Self> {
        let config = MoeConfig::new(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K);
        let ffn = match moe {
            true => FeedForward::moe(config, vb.pp("ffn"))?,
            false => FeedForward::dense_twin(&config, vb.pp("ffn"))?,
        };
        // With a bias, candle's LayerNorm is an op that has no gradient.
        Ok(Self {
            enter: linear(INPUTS, HIDDEN, vb.pp("enter"))?,
            norm: layer_norm_no_bias(HIDDEN, 1e-5, vb.pp("norm"))?,
            ffn,
            leave_norm: layer_norm_no_bias(HIDDEN, 1e-5, vb.pp("leave_norm"))?,
            leave: linear(HIDDEN, MOVES.len() + 1, vb.pp("leave"))?,
        })
    }

    /// `inputs` \[N, inputs\].
    fn think(&self, inputs: &Tensor, train: bool, step: u64) -> Result<Thought> {
        let h = silu(&self.enter.forward(inputs)?)?; // [N, H]
        let mut ctx = Ctx { train, seed: SEED, step, ..Ctx::default() };
        let (y, routing) = self.ffn.forward(&self.norm.forward(&h)?, &mut ctx)?;
        let out = self.leave.forward(&self.leave_norm.forward(&(h + y)?)?)?; // [N, 4 + 1]
        let log_p = log_softmax(&out.narrow(1, 0, MOVES.len())?, D::Minus1)?;
        Ok(Thought { log_p, value: out.narrow(1, MOVES.len(), 1)?.squeeze(1)?, routing })
    }
}

/// Draws a move from the logarithms of the moves' probabilities.
fn draw(log_p: &[f32], dice: &mut Dice) -> usize {
    let mut left = dice.uniform();
    for (action, log_p) in log_p.iter().enumerate() {
        left -= log_p.exp();
        if left < 0.0 {
            return action;
        }
    }
    log_p.len() - 1
}

/// A policy, and how it learns: by PPO (1707.06347), from the boards that it plays on.
struct Learner {
    policy: Policy,
    vars: VarMap,
    adamw: AdamW,
    boards: Vec<Board>,
    dice: Dice,
    updates: u64,
}

impl Learner {
    fn new(moe: bool) -> Result<Self> {
        let (vars, vb) = common::variables();
        let policy = Policy::new(moe, vb)?;
        common::draw_weights(&vars, SEED)?;
        let adamw = AdamW::new(vars.all_vars(), ParamsAdamW { weight_decay: 0.0, ..ParamsAdamW::default() })?;
        let mut dice = Dice::new(&[SEED, 1]);
        let boards = (0..BOARDS).map(|board| Board::new(board % TASKS.len(), &mut dice)).collect();
        Ok(Self { policy, vars, adamw, boards, dice, updates: 0 })
    }

    /// Plays [`ROLLOUT`] moves on each board and learns from them.
    fn round(&mut self, learning_rate: f64) -> Result<()> {
        // All of [ROLLOUT, BOARDS].
        let (mut inputs, mut actions, mut log_p, mut values) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut rewards, mut over) = (Vec::new(), Vec::new());
        for _ in 0..ROLLOUT {
            let seen = observe(self.boards.iter())?;
            let thought = self.policy.think(&seen, false, 0)?;
            inputs.push(seen);
            values.extend(thought.value.to_vec1::<f32>()?);
            for (board, moves) in self.boards.iter_mut().zip(thought.log_p.to_vec2::<f32>()?) {
                let action = draw(&moves, &mut self.dice);
                let (reward, done) = board.step(action, &mut self.dice);
                if done {
                    *board = Board::new(board.task, &mut self.dice);
                }
                actions.push(action as u32);
                log_p.push(moves[action]);
                rewards.push(reward);
                over.push(done);
            }
        }
        values.extend(self.policy.think(&observe(self.boards.iter())?, false, 0)?.value.to_vec1::<f32>()?);

        // Generalised advantages (1506.02438), from the last move to the first.
        let count = ROLLOUT * BOARDS;
        let mut advantages = vec![0.0f32; count + BOARDS];
        for at in (0..count).rev() {
            let goes_on = if over[at] { 0.0 } else { 1.0 };
            let surprise = rewards[at] + DISCOUNT * goes_on * values[at + BOARDS] - values[at];
            advantages[at] = surprise + DISCOUNT * TRACE * goes_on * advantages[at + BOARDS];
        }
        advantages.truncate(count);
        let targets: Vec<f32> = advantages.iter().zip(&values).map(|(a, v)| a + v).collect();
        let mean = advantages.iter().sum::<f32>() / count as f32;
        let deviation = (advantages.iter().map(|a| (a - mean).powi(2)).sum::<f32>() / count as f32).sqrt();
        advantages.iter_mut().for_each(|a| *a = (*a - mean) / (deviation + 1e-6));

        let one = |values: Vec<f32>| Tensor::from_vec(values, count, &Device::Cpu);
        let (inputs, actions) = (Tensor::cat(&inputs, 0)?, Tensor::from_vec(actions, count, &Device::Cpu)?);
        let (log_p, advantages, targets) = (one(log_p)?, one(advantages)?, one(targets)?);
        self.adamw.set_learning_rate(learning_rate);
        for _ in 0..EPOCHS {
            let mut order: Vec<u32> = (0..count as u32).collect();
            let key = Stream::new(&[SEED, 2, self.updates]);
            order.sort_by_key(|i| key.bits(u64::from(*i)));
            for chosen in order.chunks(count / MINI_BATCHES) {
                let chosen = Tensor::from_slice(chosen, chosen.len(), &Device::Cpu)?;
                let of = |all: &Tensor| all.index_select(&chosen, 0);
                let thought = self.policy.think(&of(&inputs)?, true, self.updates)?;
                let picked = thought.log_p.gather(&of(&actions)?.unsqueeze(1)?, 1)?.squeeze(1)?;
                let (ratio, advantages) = ((picked - of(&log_p)?)?.exp()?, of(&advantages)?);
                let clipped = ratio.clamp(1.0 - CLIP, 1.0 + CLIP)?;
                let gain = ratio.mul(&advantages)?.minimum(&clipped.mul(&advantages)?)?.mean_all()?;
                let entropy = thought.log_p.exp()?.mul(&thought.log_p)?.sum(1)?.mean_all()?.neg()?;
                let error = loss::mse(&thought.value, &of(&targets)?)?;
                let total = ((error * 0.5)? - gain - (entropy * ENTROPY)?)?;
                let routings: Vec<Routing> = thought.routing.into_iter().collect();
                let total = common::with_balance(&total, &routings, &BalanceConfig::default())?;
                self.adamw.backward_step(&total)?;
                self.updates += 1;
            }
        }
        Ok(())
    }
}

/// How a policy does.
struct Report {
    /// Mean return of each task.
    returns: Vec<f64>,
    /// Which experts served which task.
    served: Served,
}

impl Report {
    fn mean(&self) -> f64 {
        self.returns.iter().sum::<f64>() / self.returns.len() as f64
    }
}

/// Plays [`EPISODES`] of each task, the same for all policies; none plays at random.
fn evaluate(policy: Option<&Policy>) -> Result<Report> {
    let mut dice = Dice::new(&[SEED, 3]);
    let mut boards: Vec<Board> =
        (0..EPISODES * TASKS.len()).map(|board| Board::new(board % TASKS.len(), &mut dice)).collect();
    let mut served = Served::new(TASKS.map(|(_, name)| name.to_string()).to_vec(), EXPERTS);
    let mut returns = vec![0.0; TASKS.len()];
    while !boards.is_empty() {
        let log_p = match policy {
            None => vec![vec![-(MOVES.len() as f32).ln(); MOVES.len()]; boards.len()],
            Some(policy) => {
                let thought = policy.think(&observe(boards.iter())?, false, 0)?;
                if let Some(routing) = &thought.routing {
                    served.add(routing, false, |board| boards[board].task)?;
                }
                thought.log_p.to_vec2::<f32>()?
            }
        };
        let mut moves = log_p.iter();
        boards.retain_mut(|board| {
            let Some(log_p) = moves.next() else { return false };
            let (_, done) = board.step(draw(log_p, &mut dice), &mut dice);
            if done {
                returns[board.task] += f64::from(board.gained) / EPISODES as f64;
            }
            !done
        });
    }
    Ok(Report { returns, served })
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let (mut moe, mut dense) = (Learner::new(true)?, Learner::new(false)?);
    println!("{:>9}{:>9}{:>9}   mean return of the four tasks", "moves", "MoE", "dense");
    for round in 0..=ROUNDS {
        if round % (ROUNDS / REPORTS) == 0 {
            let (moe, dense) = (evaluate(Some(&moe.policy))?, evaluate(Some(&dense.policy))?);
            println!("{:>9}{:>9.3}{:>9.3}", round * ROLLOUT * BOARDS, moe.mean(), dense.mean());
        }
        if round < ROUNDS {
            let learning_rate = LEARNING_RATE * (1.0 - round as f64 / ROUNDS as f64);
            moe.round(learning_rate)?;
            dense.round(learning_rate)?;
        }
    }
    println!("{:.0} s for both\n", start.elapsed().as_secs_f64());

    print!("{:<9}{:>12}", "return", "parameters");
    TASKS.iter().for_each(|(_, name)| print!("{name:>9}"));
    println!("{:>9}", "mean");
    let players = [("MoE", Some(&moe)), ("dense", Some(&dense)), ("random", None)];
    for (name, player) in players {
        let report = evaluate(player.map(|learner| &learner.policy))?;
        let size = player.map_or("-".into(), |learner| common::parameters(&learner.vars).to_string());
        print!("{name:<9}{size:>12}");
        report.returns.iter().for_each(|mean| print!("{mean:>9.3}"));
        println!("{:>9.3}", report.mean());
    }
    let served = evaluate(Some(&moe.policy))?.served;
    println!("\npercentage of each task's moves at each expert (load CV {:.2})", served.load_cv());
    served.print("task");
    Ok(())
}
