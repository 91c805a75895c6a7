//! What the examples `vision` and `control` share: a feed-forward that is dense or MoE, weights drawn by a
//! seed, and a table of which experts serve whom.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder, VarMap};
use senmon::kernels::dispatch::EMPTY;
use senmon::kernels::expert_mlp::Shape;
use senmon::moe::rng::Stream;
use senmon::moe::{BalanceConfig, Ctx, MoeConfig, MoeLayer, Param, Result, Routing, balance, ops};

/// The feed-forward of a block.
pub enum FeedForward {
    /// One MLP for all tokens: its weights \[P, H\] and \[H, I\].
    Dense(Param, Param, Shape),
    /// Experts behind a router.
    Moe(Box<MoeLayer>),
}

impl FeedForward {
    /// The MoE layer of `config`.
    pub fn moe(config: MoeConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self::Moe(Box::new(MoeLayer::new(config, vb)?)))
    }

    /// An MLP as wide as the K experts that a token passes in the MoE layer of `config`: equal operations.
    pub fn dense_twin(config: &MoeConfig, vb: VarBuilder) -> Result<Self> {
        let MoeConfig { hidden, activation, gated, .. } = *config;
        let shape = Shape { hidden, intermediate: config.top_k * config.intermediate, activation, gated };
        let get = |name: &str, rows: usize, columns: usize| -> Result<Param> {
            Ok(Param::new(name, vb.get_with_hints((rows, columns), name, Init::Const(0.0))?))
        };
        let (up, down) = (get("up", shape.pre(), hidden)?, get("down", hidden, shape.intermediate)?);
        Ok(Self::Dense(up, down, shape))
    }

    /// `y` of the shape of `x` \[.., H\], and what the router did, if there is one.
    pub fn forward(&self, x: &Tensor, ctx: &mut Ctx) -> Result<(Tensor, Option<Routing>)> {
        match self {
            Self::Dense(up, down, shape) => Ok((ops::mlp(x, up, down, *shape)?, None)),
            Self::Moe(layer) => {
                let (y, routing) = layer.forward(x, ctx)?;
                Ok((y, Some(routing)))
            }
        }
    }
}

/// `loss` and the balance terms of the layers' routings.
pub fn with_balance(loss: &Tensor, routings: &[Routing], config: &BalanceConfig) -> Result<Tensor> {
    let terms = balance::losses(routings, config)?;
    Ok(terms.iter().try_fold(loss.clone(), |sum, term| sum + (&term.value * term.coefficient)?)?)
}

/// Draws all weights anew by a seed, which candle's generator for CPUs does not take: matrices from a normal
/// distribution of variance 1 / inputs, biases 0. Scales (1, as they are made) are left alone.
pub fn draw_weights(vars: &VarMap, seed: u64) -> candle_core::Result<()> {
    let data = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut names: Vec<&String> = data.keys().collect();
    names.sort(); // a HashMap has no order of its own
    for (number, name) in names.into_iter().enumerate() {
        let var = &data[name];
        let stream = Stream::new(&[seed, number as u64]);
        if name.ends_with("bias") {
            var.set(&var.zeros_like()?)?;
        } else if let [.., _, inputs] = *var.dims() {
            let deviation = 1.0 / (inputs as f64).sqrt();
            let values: Vec<f32> =
                (0..var.elem_count() as u64).map(|i| (deviation * stream.normal(i)) as f32).collect();
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?;
        }
    }
    Ok(())
}

/// Fresh variables, and the builder that fills them.
pub fn variables() -> (VarMap, VarBuilder<'static>) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    (vars, vb)
}

/// Numbers in the model's variables.
pub fn parameters(vars: &VarMap) -> usize {
    vars.all_vars().iter().map(|var| var.elem_count()).sum()
}

/// How much of each group of tokens (a class, a task) each expert served.
pub struct Served {
    names: Vec<String>,
    /// Slots, or weight, of each expert by group: \[groups, E\].
    amounts: Vec<Vec<f64>>,
}

impl Served {
    /// Nothing yet, for groups of these names.
    pub fn new(names: Vec<String>, experts: usize) -> Self {
        let amounts = vec![vec![0.0; experts]; names.len()];
        Self { names, amounts }
    }

    /// Counts a pass whose token t is of group `group(t)`. A soft layer has no picks, only means of all
    /// tokens: there the weight counts with which a token takes from an expert.
    pub fn add(&mut self, routing: &Routing, soft: bool, group: impl Fn(usize) -> usize) -> Result<()> {
        if soft {
            for (t, row) in routing.scores.to_vec2::<f32>()?.into_iter().enumerate() {
                for (expert, weight) in row.into_iter().enumerate() {
                    self.amounts[group(t)][expert] += f64::from(weight);
                }
            }
        } else {
            let slots = routing.top_k.max(1);
            for (slot, expert) in routing.experts.iter().enumerate().filter(|(_, expert)| **expert != EMPTY) {
                self.amounts[group(slot / slots)][*expert as usize] += 1.0;
            }
        }
        Ok(())
    }

    /// The coefficient of variation of the experts' load: 0 is even, √(E - 1) is one expert for all.
    pub fn load_cv(&self) -> f64 {
        let load: Vec<f64> =
            (0..self.experts()).map(|e| self.amounts.iter().map(|row| row[e]).sum()).collect();
        let mean = load.iter().sum::<f64>() / load.len() as f64;
        let variance = load.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / load.len() as f64;
        variance.sqrt() / mean
    }

    /// A row a group: what percentage of it each expert served, the greatest marked. Then a line of words an
    /// expert.
    pub fn print(&self, group: &str) {
        let shares: Vec<Vec<f64>> = self.amounts.iter().map(|row| parts(row)).collect(); // [groups, E]
        let width = self.names.iter().map(String::len).max().unwrap_or(0).max(group.len()) + 2;
        print!("  {group:<width$}");
        (0..self.experts()).for_each(|e| print!("{:>7}", format!("e{e}")));
        println!();
        for (name, row) in self.names.iter().zip(&shares) {
            print!("  {name:<width$}");
            let greatest = row.iter().copied().fold(0.0, f64::max);
            for share in row {
                print!("{:>6.1}{}", 100.0 * share, if *share == greatest { '*' } else { ' ' });
            }
            println!();
        }
        for expert in 0..self.experts() {
            println!("  expert {expert} {}", self.words(&shares, expert, group));
        }
    }

    /// Whom an expert serves, each group counted as if it were as large as the others.
    fn words(&self, shares: &[Vec<f64>], expert: usize, group: &str) -> String {
        let column: Vec<f64> = shares.iter().map(|row| row[expert]).collect();
        if column.iter().sum::<f64>() == 0.0 {
            return "serves nobody".into();
        }
        let mut of_expert: Vec<(f64, &String)> = parts(&column).into_iter().zip(&self.names).collect();
        of_expert.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Who has clearly more of this expert than an even part.
        let even = 1.0 / self.names.len() as f64;
        let most: Vec<String> = of_expert
            .iter()
            .take_while(|(part, _)| *part > 1.25 * even)
            .take(3)
            .map(|(part, name)| format!("{name} ({:.0} % of its work)", 100.0 * part))
            .collect();
        match most.as_slice() {
            [] => format!(
                "serves every {group} alike, {} most ({:.0} %)",
                of_expert[0].1,
                100.0 * of_expert[0].0
            ),
            most => format!("serves most of all {}", most.join(", ")),
        }
    }

    fn experts(&self) -> usize {
        self.amounts.first().map_or(0, Vec::len)
    }
}

/// Each value as a part of their sum.
fn parts(values: &[f64]) -> Vec<f64> {
    let sum = values.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    values.iter().map(|value| value / sum).collect()
}
