//! The parameters of a layer, and how one is put together from them.

use super::{MoeConfig, MoeLayer, RunningMeans};
use crate::config::{Noise, RouterConfig};
use crate::error::{MoeError, Result};
use crate::param::Param;
use crate::router;
use candle_core::DType;
use candle_nn::{Init, VarBuilder};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The parameters of a layer.
#[derive(Clone, Debug)]
pub struct MoeParams {
    /// \[columns, H\]: a row for each logit, mostly one for each expert.
    pub router: Param,
    /// Added to the logits: \[columns\].
    pub router_bias: Option<Param>,
    /// Added to the scores for the selection, by the kinds that have one: \[E\].
    pub selection_bias: Option<SelectionBias>,
    /// The experts of each token id, by the kinds that go by them: \[V, K\].
    pub table: Option<SelectionBias>,
    /// \[E, P, H\]: each expert's gate rows, then its up rows.
    pub gate_up: Param,
    /// \[E, H, I\].
    pub down: Param,
    /// Biases of the experts: \[E, P\] and \[E, H\].
    pub expert_biases: Option<(Param, Param)>,
    /// \[P', H\] and \[H, I'\] of the shared experts together.
    pub shared: Option<(Param, Param)>,
    /// Biases of the shared experts, \[P'\] and \[H\]; with them a layer runs, it does not train.
    pub shared_biases: Option<(Param, Param)>,
    /// \[1, H\].
    pub shared_gate: Option<Param>,
    /// Those of [`extra_defs`], by name.
    pub extras: BTreeMap<&'static str, Param>,
}

impl MoeParams {
    /// A router and experts, \[E, H\], \[E, P, H\] and \[E, H, I\], with nothing beside them.
    pub fn new(router: Param, gate_up: Param, down: Param) -> Self {
        Self {
            router,
            router_bias: None,
            selection_bias: None,
            table: None,
            gate_up,
            down,
            expert_biases: None,
            shared: None,
            shared_biases: None,
            shared_gate: None,
            extras: BTreeMap::new(),
        }
    }

    /// A parameter of [`extra_defs`].
    pub(super) fn extra(&self, name: &str) -> Option<&Param> {
        self.extras.get(name)
    }
}

/// Numbers that are saved with a model but get no gradient: the selection bias, or the table of `hash`.
#[derive(Clone, Debug)]
pub struct SelectionBias(Arc<Mutex<Arc<[f32]>>>);

impl SelectionBias {
    /// State that starts from these values.
    pub fn new(values: Vec<f32>) -> Self {
        Self(Arc::new(Mutex::new(values.into())))
    }

    /// The values as they are now; a pass that holds them does not see a later change.
    pub fn values(&self) -> Arc<[f32]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the values.
    pub fn update(&self, change: impl FnOnce(&mut [f32])) {
        let mut values = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = values.to_vec();
        change(&mut changed);
        *values = changed.into();
    }
}

/// A parameter that only some configurations have.
#[derive(Clone, Debug, PartialEq)]
pub struct ExtraDef {
    /// Its name within the layer.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it starts from.
    pub init: ExtraInit,
}

/// What a parameter starts from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExtraInit {
    /// A normal distribution of this many times the model's standard deviation.
    Normal(f64),
    /// 0.
    Zeros,
    /// 1.
    Ones,
}

/// The parameters of a layer beyond router, experts, shared experts and biases, by the name they have in [`MoeParams::extras`].
pub fn extra_defs(config: &MoeConfig) -> Vec<ExtraDef> {
    use ExtraInit::{Normal, Ones, Zeros};
    let (h, x) = (config.hidden, &config.extras);
    let mut defs = Vec::new();
    let mut add = |name, shape: &[usize], init| defs.push(ExtraDef { name, shape: shape.to_vec(), init });
    let r = &config.router;
    match r.kind.as_str() {
        // From 0: noise of softplus(0) at first, the same for all (Shazeer 2017).
        "noisy_topk" if r.noise == Noise::Learned => add("router_noise", &[config.choices(), h], Zeros),
        "depth" if r.predictor => add("router_predictor", &[1, h], Normal(1.0)),
        "soft" => add("router_scale", &[1], Ones),
        _ => {}
    }
    if x.latent > 0 {
        add("latent.down", &[x.latent, h], Normal(1.0));
        add("latent.up", &[h, x.latent], Normal(1.0));
    }
    if x.residual {
        let shape = config.residual_shape();
        add("residual.gate_up", &[shape.pre(), h], Normal(1.0));
        add("residual.down", &[h, shape.intermediate], Normal(1.0));
        add("residual.mix", &[2, h], Normal(1.0));
        add("residual.mix_bias", &[2], Zeros);
    }
    if x.constant > 0 {
        add("constant.values", &[h, x.constant], Normal(1.0));
        add("constant.mix", &[x.constant.saturating_mul(2), h], Normal(1.0));
    }
    defs
}

impl MoeLayer {
    /// A layer with parameters from `vb`: `router.weight`, `experts.gate_up`, `experts.down`, and where the configuration has
    /// them `router.bias` (of the selection), `router.logits_bias`, `experts.gate_up_bias`, `experts.down_bias`, `shared.gate_up`,
    /// `shared.down`, `shared.gate`, and those of [`extra_defs`]. Fresh ones are drawn with standard deviation 0.02, biases are 0. A layer that goes
    /// by token ids cannot be made so: it needs a table ([`MoeLayer::from_params`]).
    pub fn new(config: MoeConfig, vb: VarBuilder) -> Result<Self> {
        let (e, h, i) = (config.experts, config.hidden, config.intermediate);
        let (p, inner) = (config.expert_shape().pre(), config.inner());
        // A configuration that does not hold together is refused before any parameter is made.
        router::build(&config.router, config.choices(), config.top_k)?;
        let columns = router::columns(&config.router, config.choices());
        let normal = |stdev: f64| Init::Randn { mean: 0.0, stdev };
        let get = |name: &str, shape: &[usize], init: Init| -> Result<Param> {
            Ok(Param::new(name, vb.get_with_hints(shape, name, init)?))
        };
        let selection_bias = if router::kind(&config.router.kind)?.selection_bias {
            let bias = vb.get_with_hints(config.choices(), "router.bias", Init::Const(0.0))?;
            Some(SelectionBias::new(bias.to_dtype(DType::F32)?.to_vec1()?))
        } else {
            None
        };
        let std = normal(0.02);
        let shared = match config.shared_shape() {
            s if s.intermediate == 0 => None,
            s => Some((
                get("shared.gate_up", &[s.pre(), h], std)?,
                get("shared.down", &[h, s.intermediate], std)?,
            )),
        };
        let bias = |name: &str, shape: &[usize]| get(name, shape, Init::Const(0.0));
        let gated = config.shared_gate && shared.is_some();
        let extras = extra_defs(&config)
            .into_iter()
            .map(|def| {
                let init = match def.init {
                    ExtraInit::Normal(times) => normal(0.02 * times),
                    ExtraInit::Zeros => Init::Const(0.0),
                    ExtraInit::Ones => Init::Const(1.0),
                };
                Ok((def.name, get(def.name, &def.shape, init)?))
            })
            .collect::<Result<_>>()?;
        let params = MoeParams {
            router: get("router.weight", &[columns, h], normal(0.02 * config.router.init_scale))?,
            router_bias: config.router_bias.then(|| bias("router.logits_bias", &[columns])).transpose()?,
            expert_biases: match config.expert_bias {
                false => None,
                true => {
                    Some((bias("experts.gate_up_bias", &[e, p])?, bias("experts.down_bias", &[e, inner])?))
                }
            },
            shared_gate: gated.then(|| get("shared.gate", &[1, h], std)).transpose()?,
            selection_bias,
            table: None,
            shared_biases: None,
            gate_up: get("experts.gate_up", &[e, p, inner], std)?,
            down: get("experts.down", &[e, inner, i], std)?,
            shared,
            extras,
        };
        Self::from_params(config, params)
    }

    /// A layer with these parameters.
    pub fn from_params(config: MoeConfig, params: MoeParams) -> Result<Self> {
        let (e, h, inner) = (config.experts, config.hidden, config.inner());
        let expect = |what, found: &[usize], shape: &[usize]| {
            if found == shape {
                return Ok(());
            }
            Err(MoeError::Shape { what, found: found.to_vec(), expected: format!("{shape:?}") })
        };
        let s = config.expert_shape();
        let columns = router::columns(&config.router, config.choices());
        expect("the router", params.router.dims(), &[columns, h])?;
        expect("experts.gate_up", params.gate_up.dims(), &[e, s.pre(), inner])?;
        expect("experts.down", params.down.dims(), &[e, inner, s.intermediate])?;
        if let Some((up, down)) = &params.shared {
            let s = config.shared_shape();
            expect("shared.gate_up", up.dims(), &[s.pre(), h])?;
            expect("shared.down", down.dims(), &[h, s.intermediate])?;
        }
        if let Some(bias) = &params.router_bias {
            expect("router.logits_bias", bias.dims(), &[columns])?;
        }
        if let Some((up, down)) = &params.expert_biases {
            expect("experts.gate_up_bias", up.dims(), &[e, s.pre()])?;
            expect("experts.down_bias", down.dims(), &[e, inner])?;
        }
        if let Some((up, down)) = &params.shared_biases {
            expect("shared.gate_up_bias", up.dims(), &[config.shared_shape().pre()])?;
            expect("shared.down_bias", down.dims(), &[h])?;
        }
        if let Some(gate) = &params.shared_gate {
            expect("shared.gate", gate.dims(), &[1, h])?;
        }
        if let Some(bias) = &params.selection_bias {
            expect("the selection bias", &[bias.values().len()], &[config.choices()])?;
        }
        let defs = extra_defs(&config);
        for def in &defs {
            let found = params.extras.get(def.name).map_or(&[][..], Param::dims);
            expect(def.name, found, &def.shape)?;
        }
        if let Some(name) = params.extras.keys().find(|name| !defs.iter().any(|def| def.name == **name)) {
            return Err(MoeError::Config { what: format!("the layer has no use for a parameter {name}") });
        }
        check_together(&config)?;
        let by_id = router::kind(&config.router.kind)?.by_token_id;
        match &params.table {
            None if by_id => {
                let what = format!("router.kind = \"{}\" needs a table of token ids", config.router.kind);
                return Err(MoeError::Config { what });
            }
            Some(table) if !table.values().len().is_multiple_of(config.top_k) => {
                let found = vec![table.values().len()];
                let expected = format!("[V, {}]", config.top_k);
                return Err(MoeError::Shape { what: "the table of token ids", found, expected });
            }
            _ => {}
        }
        let router = router::build(&config.router, config.choices(), config.top_k)?;
        Ok(Self { config, router, params, running: RunningMeans::default() })
    }
}

/// Refuses parts of a configuration that do not go together.
pub fn check_together(config: &MoeConfig) -> Result<()> {
    let (r, x): (&RouterConfig, _) = (&config.router, &config.extras);
    let refuse = |what: String| Err(MoeError::Config { what });
    let kind = r.kind.as_str();
    if x.special() > 0 && ["soft", "depth", "random", "hash", "base", "hierarchical"].contains(&kind) {
        return refuse(format!(
            "experts.zero, identity and constant do not go with router.kind = \"{kind}\": it does not weigh experts by what \
             tokens look like one by one"
        ));
    }
    if x.special() > 0 && kind == "sigmoid_input" {
        return refuse(
            "experts.zero, identity and constant do not go with router.kind = \"sigmoid_input\"".into(),
        );
    }
    if x.members > 1 {
        if !config.experts.is_multiple_of(x.members) || config.experts / x.members < config.top_k {
            return refuse(format!(
                "experts.members = {} does not divide {} experts into parts of top_k = {} or more",
                x.members, config.experts, config.top_k
            ));
        }
        if !["topk_pre", "topk_post"].contains(&kind) || x.special() > 0 {
            return refuse(format!(
                "experts.members does not go with router.kind = \"{kind}\" or special experts"
            ));
        }
        if r.groups > 1 {
            return refuse("experts.members and router.groups do not go together".into());
        }
    }
    let by_itself = router::kind(kind)?.own_capacity;
    if r.eval_capacity > 0.0 && (by_itself || kind == "random")
        || kind == "dense" && r.capacity + r.eval_capacity > 0.0
    {
        return refuse(format!(
            "router.capacity = {} and router.eval_capacity = {} do not both mean something for router.kind = \"{kind}\": {}",
            r.capacity,
            r.eval_capacity,
            if by_itself { "what its experts take is router.capacity" } else { "it uses all experts" }
        ));
    }
    if config.expert_bias && x.latent > 0 {
        return refuse("experts with biases do not go with experts.latent".into());
    }
    Ok(())
}
