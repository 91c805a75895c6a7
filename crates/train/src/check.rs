//! Which configurations make sense: what is refused, and what is only warned of.

use senmon_moe::router;

use senmon_moe::config::{AuxCounts, DenseGradient};

use crate::config::{Count, Ffn, RunConfig, families};
use crate::error::{Result, TrainError};
use crate::schedule::ScheduleKind;

/// Greatest width, count or length: keeps every product of two or three of them within 64 bits.
const MAX_SIZE: usize = 1 << 20;

impl RunConfig {
    /// Refuses what cannot be trained, naming key, value and what is accepted. `[data]` is checked by whoever opens
    /// it, since an exact replay needs none.
    pub fn check(&self) -> Result<()> {
        self.check_model()?;
        self.check_experts()?;
        if !(0.0..=0.5).contains(&self.data.holdout) {
            return Err(TrainError::bad("data.holdout", self.data.holdout, "must be from 0 to 0.5"));
        }
        self.check_training()
    }

    fn check_model(&self) -> Result<()> {
        let m = &self.model;
        if !families().any(|name| name == m.family) {
            return Err(TrainError::bad(
                "model.family",
                format!("{:?}", m.family),
                format!("must be one of {}", families().collect::<Vec<_>>().join(", ")),
            ));
        }
        for (key, value, most) in [
            ("layers", m.layers, 1024),
            ("hidden", m.hidden, 1 << 17),
            ("heads", m.heads, 1 << 12),
            ("kv_heads", m.kv_heads, 1 << 12),
            ("head_dim", m.head_dim, 1 << 12),
            ("vocab", m.vocab.unwrap_or(1), 1 << 24),
            ("max_positions", m.max_positions, 1 << 30),
            ("window", m.window.unwrap_or(1), 1 << 30),
            ("intermediate", m.intermediate.unwrap_or(1), MAX_SIZE),
        ] {
            in_range(&format!("model.{key}"), value, 1, most)?;
        }
        if !m.heads.is_multiple_of(m.kv_heads) {
            return Err(TrainError::Conflict(format!(
                "model.heads = {} is not a multiple of model.kv_heads = {}",
                m.heads, m.kv_heads
            )));
        }
        if !m.head_dim.is_multiple_of(2) {
            return Err(TrainError::bad("model.head_dim", m.head_dim, "must be even, for rotary positions"));
        }
        positive("model.norm_eps", m.norm_eps)?;
        m.init_std.map_or(Ok(()), |std| positive("model.init_std", std))?;
        positive("model.rope_theta", m.rope_theta)?;
        if let (None, Some(vocab)) = (&self.data.tokenizer, m.vocab)
            && self.data.vocab > vocab
        {
            return Err(TrainError::Conflict(format!(
                "data.vocab = {} does not fit model.vocab = {vocab}: the model needs a row for every token",
                self.data.vocab
            )));
        }
        Ok(())
    }

    fn check_experts(&self) -> Result<()> {
        let (e, r, b) = (&self.experts, &self.router, &self.balance);
        in_range("experts.top_k", e.top_k, 1, 1 << 12)?;
        in_range("experts.intermediate", e.intermediate, 1, MAX_SIZE)?;
        in_range("experts.shared", e.shared, 0, 1 << 10)?;
        in_range("experts.every", e.every, 1, 1024)?;
        for (key, value) in
            [("latent", e.latent), ("zero", e.zero), ("identity", e.identity), ("constant", e.constant)]
        {
            in_range(&format!("experts.{key}"), value, 0, 1 << 14)?;
        }
        in_range("experts.members", e.members, 1, 1 << 10)?;
        let listed = match &e.count {
            Count::Same(count) => vec![*count],
            Count::PerLayer(counts) => counts.clone(),
        };
        if listed.is_empty() {
            return Err(TrainError::bad("experts.count", "[]", "must have one number for each MoE layer"));
        }
        for &count in &listed {
            in_range("experts.count", count, 1, 1 << 14)?;
            if e.top_k > count {
                return Err(TrainError::Conflict(format!(
                    "experts.top_k = {} is more than experts.count = {count}: a token cannot use more experts than there are",
                    e.top_k
                )));
            }
        }
        if self.model.ffn == Ffn::Moe && self.expert_counts()?.is_empty() {
            return Err(TrainError::Conflict(format!(
                "no layer has experts: experts.first_dense = {} and experts.every = {} leave none of {} layers (for a \
                 dense model say model.ffn = \"dense\")",
                e.first_dense, e.every, self.model.layers
            )));
        }

        if router::kind(&r.kind).is_err() {
            let known = router::KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ");
            return Err(TrainError::bad(
                "router.kind",
                format!("{:?}", r.kind),
                format!("must be one of {known}"),
            ));
        }
        let kind = router::kind(&r.kind)?;
        if let Some(why) = kind.noncausal
            && self.model.ffn == Ffn::Moe
            && !r.allow_noncausal
            && !(kind.name == "depth" && r.predictor)
        {
            return Err(TrainError::Conflict(format!(
                "router.kind = \"{}\" is not causal: {why}, so a model trained with it to predict the next token cannot generate text as it \
                 was trained; set router.allow_noncausal = true if that is meant",
                kind.name
            )));
        }
        positive("router.least_sum", r.least_sum)?;
        positive("router.second_threshold", r.second_threshold)?;
        for (key, value) in [
            ("sparsemixer_eps", r.sparsemixer_eps),
            ("target_sparsity", r.target_sparsity),
            ("expert_dropout", r.expert_dropout),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(TrainError::bad(
                    &format!("router.{key}"),
                    value,
                    "must be at least 0 and below 1",
                ));
            }
        }
        if !(r.p > 0.0 && r.p <= 1.0) {
            return Err(TrainError::bad("router.p", r.p, "must be above 0 and at most 1"));
        }
        for (key, value) in
            [("noise_std", r.noise_std), ("capacity", r.capacity), ("eval_capacity", r.eval_capacity)]
        {
            not_negative(&format!("router.{key}"), value)?;
        }
        in_range("router.min_capacity", r.min_capacity, 0, MAX_SIZE)?;
        in_range("router.group_size", r.group_size, 0, MAX_SIZE)?;
        in_range("router.slots", r.slots, 0, MAX_SIZE)?;
        in_range("router.groups", r.groups, 1, 1 << 14)?;
        in_range("router.top_groups", r.top_groups, 1, r.groups)?;
        for &count in &listed {
            if !count.is_multiple_of(r.groups) {
                return Err(TrainError::Conflict(format!(
                    "experts.count = {count} does not divide into router.groups = {} groups of equal size",
                    r.groups
                )));
            }
            let reachable = count / r.groups * r.top_groups;
            if reachable < e.top_k {
                return Err(TrainError::Conflict(format!(
                    "router.top_groups = {} leaves a token {reachable} experts, and experts.top_k = {}",
                    r.top_groups, e.top_k
                )));
            }
            // What else a kind has to say.
            let layer = self.moe_spec(count).layer(self.model.hidden);
            let conflict = |e: senmon_moe::MoeError| TrainError::Conflict(e.to_string());
            router::build(r, layer.choices(), e.top_k).map_err(conflict)?;
            senmon_moe::layer::check_together(&layer).map_err(conflict)?;
            if e.latent > 0 && e.latent >= self.model.hidden {
                return Err(TrainError::Conflict(format!(
                    "experts.latent = {} is no narrower than model.hidden = {}",
                    e.latent, self.model.hidden
                )));
            }
        }
        positive("router.scale", r.scale)?;
        positive("router.init_scale", r.init_scale)?;
        if !(0.0..1.0).contains(&r.jitter) {
            return Err(TrainError::bad("router.jitter", r.jitter, "must be at least 0 and below 1"));
        }
        for (key, value) in [
            ("aux", b.aux),
            ("sequence", b.sequence),
            ("importance", b.importance),
            ("load", b.load),
            ("z", b.z),
            ("entropy", b.entropy),
            ("distill", b.distill),
            ("bias_rate", b.bias_rate),
        ] {
            not_negative(&format!("balance.{key}"), value)?;
        }
        if !(0.0..1.0).contains(&b.ema_decay) {
            return Err(TrainError::bad("balance.ema_decay", b.ema_decay, "must be at least 0 and below 1"));
        }
        self.check_balance(kind)
    }

    /// Refuses balancing that its router has no place for.
    fn check_balance(&self, kind: &router::Kind) -> Result<()> {
        let (e, r, b) = (&self.experts, &self.router, &self.balance);
        let refuse = |what: String| Err(TrainError::Conflict(what));
        let with_bias = || {
            let kinds = router::KINDS.iter().filter(|kind| kind.selection_bias).map(|kind| kind.name);
            kinds.collect::<Vec<_>>().join(", ")
        };
        if b.quantile && !kind.selection_bias {
            return refuse(format!(
                "balance.quantile moves the selection bias, and router.kind = \"{}\" has none: take one of {}",
                kind.name,
                with_bias()
            ));
        }
        if b.quantile && b.bias_rate > 0.0 {
            return refuse(
                "balance.quantile and balance.bias_rate both move the selection bias: set one of them".into(),
            );
        }
        if b.load > 0.0 && kind.name != "noisy_topk" {
            return refuse(format!(
                "balance.load is the smooth load of router.kind = \"noisy_topk\", and the kind is \"{}\"",
                kind.name
            ));
        }
        if b.aux_counts == AuxCounts::Unbiased && !kind.selection_bias {
            return refuse(format!(
                "balance.aux_counts = \"unbiased\" counts picks without the selection bias, and router.kind = \"{}\" has none: take one of {}",
                kind.name,
                with_bias()
            ));
        }
        if b.distill > 0.0 && e.top_k == 1 && kind.name != "random" {
            return refuse("balance.distill compares the experts of a token, and experts.top_k = 1".into());
        }
        let by_sigmoid = kind.name == "base" || kind.name == "sinkhorn" && e.top_k == 1;
        if b.dense_gradient != DenseGradient::None && by_sigmoid {
            return refuse(format!(
                "balance.dense_gradient is a gradient of the softmax, and router.kind = \"{}\" weighs one expert by its sigmoid",
                kind.name
            ));
        }
        if kind.name == "soft"
            && r.group_size > 0
            && !(self.train.batch * self.train.sequence).is_multiple_of(r.group_size)
        {
            return refuse(format!(
                "router.group_size = {} does not divide the {} tokens of a micro-batch, which router.kind = \"soft\" mixes in groups",
                r.group_size,
                self.train.batch * self.train.sequence
            ));
        }
        let slots_differ = ["soft", "depth"].contains(&kind.name);
        if (b.distill > 0.0 || b.dense_gradient != DenseGradient::None)
            && (slots_differ || kind.name == "dense")
        {
            return refuse(format!(
                "balance.distill and balance.dense_gradient are for tokens with several experts out of more, and router.kind = \"{}\"",
                kind.name
            ));
        }
        if b.dense_gradient != DenseGradient::None
            && ["random", "hash", "relu", "sigmoid_input"].contains(&kind.name)
        {
            return refuse(format!(
                "balance.dense_gradient is a gradient of scores, by which router.kind = \"{}\" does not weigh",
                kind.name
            ));
        }
        if b.dense_gradient == DenseGradient::StraightThrough && r.expert_dropout > 0.0 {
            return refuse(
                "balance.dense_gradient = \"straight_through\" does not go with router.expert_dropout".into(),
            );
        }
        Ok(())
    }

    fn check_training(&self) -> Result<()> {
        let (o, s, t) = (&self.optimizer, &self.schedule, &self.train);
        positive("optimizer.lr", o.lr)?;
        positive("optimizer.eps", o.eps)?;
        not_negative("optimizer.weight_decay", o.weight_decay)?;
        not_negative("optimizer.clip", o.clip)?;
        for beta in o.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(TrainError::bad("optimizer.betas", beta, "must be at least 0 and below 1"));
            }
        }
        not_negative("schedule.warmup", s.warmup)?;
        if s.warmup >= 1.0 && s.warmup.fract() != 0.0 {
            return Err(TrainError::bad(
                "schedule.warmup",
                s.warmup,
                "must be a whole number of steps, or a fraction of the run below 1",
            ));
        }
        if let Some(min) = s.min_lr {
            not_negative("schedule.min_lr", min)?;
            if min > o.lr {
                return Err(TrainError::Conflict(format!(
                    "schedule.min_lr = {min} is above optimizer.lr = {}",
                    o.lr
                )));
            }
        }
        if !(s.decay > 0.0 && s.decay <= 1.0) {
            return Err(TrainError::bad("schedule.decay", s.decay, "must be above 0 and at most 1"));
        }
        in_range("train.batch", t.batch, 1, MAX_SIZE)?;
        in_range("train.sequence", t.sequence, 1, MAX_SIZE)?;
        in_range("train.accumulate", t.accumulate, 1, MAX_SIZE)?;
        in_range("train.threads", t.threads, 0, 4096)?;
        in_range("train.keep", t.keep, 1, 1 << 20)?;
        if i64::try_from(t.seed).is_err() {
            return Err(TrainError::bad("train.seed", t.seed, format!("must be at most {}", i64::MAX)));
        }
        if t.sequence > self.model.max_positions {
            return Err(TrainError::Conflict(format!(
                "train.sequence = {} is longer than model.max_positions = {}",
                t.sequence, self.model.max_positions
            )));
        }
        if t.trace_every > 0 && (t.batches.is_some() || t.init.is_none() && self.model.ffn == Ffn::Dense) {
            return Err(TrainError::Conflict(
                "train.trace_every asks for the routing of held-out text, and there are no experts or no such text".into(),
            ));
        }
        if t.steps.is_none() && t.tokens.is_none() && t.minutes.is_none() && t.batches.is_none() {
            return Err(TrainError::Conflict(
                "the run has no end: set train.steps, train.tokens or train.minutes".into(),
            ));
        }
        for (key, value) in [("train.steps", t.steps), ("train.tokens", t.tokens)] {
            if value == Some(0) {
                return Err(TrainError::bad(key, 0, "must be at least 1"));
            }
        }
        if let Some(minutes) = t.minutes {
            positive("train.minutes", minutes)?;
        }
        Ok(())
    }

    /// What is legal and yet probably not meant, one line each.
    pub fn warnings(&self) -> Vec<String> {
        let (e, r, b, t) = (&self.experts, &self.router, &self.balance, &self.train);
        let mut found = Vec::new();
        if self.model.ffn == Ffn::Moe {
            let counts = self.expert_counts().unwrap_or_default();
            let has_bias = router::kind(&r.kind).is_ok_and(|kind| kind.selection_bias);
            let by_loss =
                [b.aux, b.sequence, b.importance, b.load].iter().any(|coefficient| *coefficient > 0.0);
            let by_bias = has_bias && (b.bias_rate > 0.0 || b.quantile);
            let even_by_kind = router::kind(&r.kind).is_ok_and(|kind| kind.even);
            let balanced = by_loss || by_bias || even_by_kind;
            let constant_weight = e.top_k == 1
                && match r.kind.as_str() {
                    "topk_post" | "noisy_topk" => true,
                    "topk_pre" | "sigmoid_bias" | "softmax_bias" | "sqrt_softplus" | "hierarchical"
                    | "top_p" => r.normalize,
                    _ => false,
                };
            if r.kind == "sinkhorn" && b.aux > 0.0 {
                found.push(
                    "router.kind = \"sinkhorn\" evens its choice out by itself: an auxiliary loss (balance.aux) works against its weights; set \
                     balance.aux = 0"
                        .into(),
                );
            }
            if constant_weight && !balanced && r.jitter == 0.0 && r.kind != "noisy_topk" {
                found.push(format!(
                    "experts.top_k = 1 with normalised weights (router.kind = \"{}\"): the weight is always 1, so the \
                     router learns nothing from the task, and there is neither noise nor balancing: set \
                     router.normalize = false with \"topk_pre\", or router.kind = \"switch\"",
                    r.kind
                ));
            } else if constant_weight {
                found.push(format!(
                    "experts.top_k = 1 with normalised weights (router.kind = \"{}\"): the weight is always 1, so the \
                     router learns from balancing alone, nothing from the task",
                    r.kind
                ));
            }
            if !balanced && counts.iter().any(|&count| count > e.top_k) {
                found.push(
                    "nothing keeps the load even (no loss and no bias): experts may die; try balance.aux = 0.01"
                        .into(),
                );
            }
            if counts.contains(&e.top_k) && !["dense", "depth", "soft"].contains(&r.kind.as_str()) {
                found.push(format!(
                    "experts.top_k = {} uses every expert for every token: nothing is sparse",
                    e.top_k
                ));
            }
            if b.bias_rate > 0.0 && !has_bias {
                found.push(format!(
                    "balance.bias_rate = {} has no effect: router.kind = \"{}\" has no bias",
                    b.bias_rate, r.kind
                ));
            }
        }
        let schedule = self.schedule();
        if let (crate::schedule::Warmup::Steps(n), Some(total)) =
            (schedule.warmup, self.limits().total_steps(self.tokens_per_step()))
            && n >= total
        {
            found.push(format!(
                "schedule.warmup = {n} steps is the whole run ({total} steps): the learning rate only rises"
            ));
        }
        if self.schedule.kind != ScheduleKind::Constant
            && t.minutes.is_some()
            && (t.steps.is_some() || t.tokens.is_some())
        {
            found.push(
                "the run ends by time and by length: the schedule follows whichever is further on".into(),
            );
        }
        if self.optimizer.clip == 0.0 {
            found.push("optimizer.clip = 0: gradients are not clipped".into());
        }
        found
    }
}

fn in_range(key: &str, value: usize, least: usize, most: usize) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(TrainError::bad(key, value, format!("must be between {least} and {most}")))
}

fn positive(key: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(TrainError::bad(key, value, "must be a number above 0"))
}

fn not_negative(key: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(TrainError::bad(key, value, "must be a number, 0 or above"))
}
