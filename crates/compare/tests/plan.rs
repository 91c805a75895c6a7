//! What is planned is equal in what it should be.

#![allow(clippy::unwrap_used)]

use senmon_compare::plan::{ARMS, Arm, Ask, Equality, Plan, evaluations, hash_of};
use senmon_compare::sizes::{EQUAL, measure};
use senmon_train::presets::preset;
use senmon_train::{Layers, RunConfig};

fn base(name: &str, more: &[&str]) -> RunConfig {
    let layers = Layers::new().preset(name).set_value("data.paths", vec!["text".to_owned()]).unwrap();
    more.iter().fold(layers, |layers, set| layers.set(set).unwrap()).resolve().unwrap()
}

fn ask(base: RunConfig) -> Ask {
    Ask {
        layers: Layers::over(base.clone()),
        base,
        tokens: 8_000_000,
        seeds: 3,
        arms: ARMS.iter().map(|(_, arm)| arm.clone()).collect(),
        routers: vec!["sigmoid_bias".into(), "switch".into(), "top_p".into()],
        equal: Equality::ALL.to_vec(),
        members: 2,
    }
}

#[test]
fn every_arm_is_equal_within_a_hundredth() {
    let odd = [
        "experts.count=16",
        "experts.top_k=4",
        "experts.intermediate=96",
        "experts.first_dense=1",
        "experts.shared=1",
    ];
    for (name, more) in [("nano", &[][..]), ("tiny", &[]), ("small", &[]), ("nano", &odd)] {
        let config = base(name, more);
        let plan = Plan::new(&ask(config.clone())).unwrap();
        let r = measure(&config).unwrap();
        assert_eq!(plan.reference, r);
        let all = r.flops_per_token as f64 * plan.tokens as f64;
        for place in &plan.places {
            let model = &plan.models[place.model];
            // Counted again, from the configuration alone.
            let one = measure(&model.config).unwrap();
            let m = model.members as f64;
            let tokens = model.config.train.tokens.unwrap();
            let ratio = match place.equality {
                Equality::Flops | Equality::Time => m * one.flops_per_token as f64 * tokens as f64 / all,
                Equality::Active => m * one.active as f64 / r.active as f64,
                Equality::Total => m * one.total as f64 / r.total as f64,
            };
            assert!((ratio - 1.0).abs() <= EQUAL, "{name}: {} at {:?}: {ratio}", place.arm, place.equality);
            if place.equality != Equality::Time {
                assert!((place.ratio / ratio - 1.0).abs() < 1e-9, "{} {:?}", place.arm, place.equality);
            }
            if matches!(place.equality, Equality::Active | Equality::Total) {
                assert_eq!(tokens, plan.tokens, "{} {:?}", place.arm, place.equality);
            }
            assert_eq!(tokens % model.config.tokens_per_step(), 0);
        }
        let mut names: Vec<&str> = plan.models.iter().map(|m| m.name.as_str()).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|w| w[0] != w[1] && !w[1].ends_with("again")), "{names:?}");
        for equality in Equality::ALL {
            for arm in [Arm::Moe, Arm::Dense, Arm::Ensemble] {
                let at = plan.places.iter().any(|p| p.arm == arm && p.equality == equality);
                assert!(at, "{name}: {arm} at {equality:?}: {:?}", plan.missing);
            }
        }
    }
}

#[test]
fn a_model_that_serves_two_equalities_is_trained_once() {
    let plan =
        Plan::new(&Ask { arms: vec![Arm::Moe, Arm::Dense], routers: vec![], ..ask(base("nano", &[])) })
            .unwrap();
    let names: Vec<&str> = plan.models.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["moe", "dense-flops-active-time", "dense-total"]);
    assert_eq!(plan.places.len(), 8);
    let jobs = plan.jobs().unwrap();
    assert_eq!(jobs.len(), 9);
    let mut hashes: Vec<&str> = jobs.iter().map(|j| j.hash.as_str()).collect();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), 9);
    // One seed for all arms: the same data in the same order.
    assert!(jobs[..3].iter().all(|j| j.config.train.seed == 0) && jobs[3].config.train.seed == 1);
    assert_eq!(plan.pairs().len(), 4);
    let mut threads = jobs[0].config.clone();
    threads.train.threads = 2;
    assert_eq!(hash_of(&threads).unwrap(), jobs[0].hash);
}

#[test]
fn members_are_several_and_smaller() {
    let plan = Plan::new(&Ask { members: 3, routers: vec![], ..ask(base("nano", &[])) }).unwrap();
    let ensemble = plan.models.iter().find(|m| m.arm == Arm::Ensemble).unwrap();
    assert_eq!((ensemble.members, ensemble.tokens), (3, plan.tokens));
    assert!(ensemble.config.model.hidden < 128);
    let seeds: Vec<u64> = plan
        .jobs()
        .unwrap()
        .iter()
        .filter(|j| j.name.starts_with("ensemble"))
        .map(|j| j.config.train.seed)
        .collect();
    assert!(seeds.windows(2).all(|w| w[0] != w[1]));
    // Eight experts are not in three parts of equal size.
    assert!(plan.missing.iter().any(|m| m.arm == Arm::EfficientEnsemble && m.why.contains("members")));
}

#[test]
fn experts_in_members_have_as_many_parameters_and_fewer_tokens() {
    let plan = Plan::new(&ask(base("nano", &[]))).unwrap();
    let of = |e| {
        let place = plan.places.iter().find(|p| p.arm == Arm::EfficientEnsemble && p.equality == e).unwrap();
        &plan.models[place.model]
    };
    assert_eq!(of(Equality::Total).config.experts.top_k, 1);
    assert!(!of(Equality::Total).config.router.normalize);
    assert_eq!(of(Equality::Active).name, of(Equality::Total).name);
    assert!(of(Equality::Flops).tokens < plan.tokens);
}

#[test]
fn evaluations_are_few_beside_the_training() {
    let mut config = base("nano", &[]);
    config.train.tokens = Some(8_000_000);
    let at = evaluations(&config);
    assert_eq!((at.len(), *at.last().unwrap()), (24, 8_000_000u64.div_ceil(4096)));
    config.train.tokens = Some(300_000);
    assert_eq!(evaluations(&config).len(), 5);
    config.train.tokens = Some(8192);
    assert_eq!(evaluations(&config), [1, 2]);
}

#[test]
fn mistakes_are_one_line_each() {
    let nano = || ask(base("nano", &[]));
    let cases = [
        Ask { arms: vec![Arm::Moe], routers: vec![], ..nano() },
        Ask { seeds: 0, ..nano() },
        Ask { equal: vec![], ..nano() },
        Ask { base: base("nano", &["model.ffn=dense"]), ..nano() },
        Ask { base: base("nano", &["data.holdout=0"]), ..nano() },
        Ask { routers: vec!["no_such".into()], ..nano() },
    ];
    for case in cases {
        let error = Plan::new(&case).unwrap_err();
        assert!(error.is_users_mistake() && !error.to_string().contains('\n'), "{error}");
    }
    for wrong in ["mo", ""] {
        assert!(wrong.parse::<Arm>().is_err() && wrong.parse::<Equality>().is_err());
    }
    assert_eq!("router-switch".parse::<Arm>().unwrap().to_string(), "router-switch");
    assert!(preset("huge").is_err());
}
