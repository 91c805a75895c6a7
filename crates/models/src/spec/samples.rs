//! Specifications for tests.

use super::*;

/// A small specification with something different in every corner, by seed.
pub(crate) fn test_spec(seed: u64) -> ModelSpec {
    let stream = senmon_moe::rng::Stream::new(&[seed]);
    let pick = |i: u64, n: u64| (stream.bits(i) % n) as usize;
    let mlp = |i: u64| MlpSpec {
        intermediate: 1 + pick(i, 9),
        activation: Activation::Silu,
        gated: pick(i + 1, 2) == 0,
        bias: false,
    };
    let kv_heads = 1 + pick(0, 3);
    ModelSpec {
        vocab: 5 + pick(1, 20),
        hidden: 4 + pick(2, 12),
        max_positions: 64,
        norm_eps: 1e-6,
        norm: NormKind::Rms,
        norm_place: NormPlace::Before,
        tie_embeddings: pick(3, 2) == 0,
        head_bias: false,
        scales: Scales::default(),
        init_std: 0.02,
        attention: AttentionSpec {
            qkv_bias: pick(6, 2) == 0,
            out_bias: pick(7, 2) == 0,
            qk_norm: [QkNorm::None, QkNorm::Head, QkNorm::Full][pick(8, 3)],
            ..AttentionSpec::plain(kv_heads * (1 + pick(4, 3)), kv_heads, 2 * (1 + pick(5, 4)))
        },
        layers: (0..3)
            .map(|l| match pick(20 + 20 * l, 2) {
                0 => FfnSpec::Dense(mlp(21 + 20 * l)),
                _ => {
                    let experts = 1 + pick(23 + 20 * l, 5);
                    let top_k = 1 + pick(24 + 20 * l, experts as u64);
                    FfnSpec::Moe(MoeSpec {
                        shared_intermediate: pick(27 + 20 * l, 4),
                        router: RouterConfig {
                            kind: ["topk_pre", "topk_post", "sigmoid_bias"][pick(28 + 20 * l, 3)].into(),
                            ..RouterConfig::default()
                        },
                        ..MoeSpec::plain(experts, top_k, mlp(25 + 20 * l))
                    })
                }
            })
            .collect(),
        tokens: SpecialTokens::default(),
    }
}

/// As [`test_spec`], and with what only some families have: latent attention, sinks, biases of experts, norms of another
/// kind and place, factors.
pub(crate) fn odd_spec(seed: u64) -> ModelSpec {
    let mut spec = test_spec(seed);
    let stream = senmon_moe::rng::Stream::new(&[seed, 1]);
    let pick = |i: u64, n: u64| (stream.bits(i) % n) as usize;
    spec.norm = [NormKind::Rms, NormKind::Layer][pick(0, 2)];
    spec.norm_place = [NormPlace::Before, NormPlace::After][pick(1, 2)];
    spec.head_bias = pick(2, 2) == 0;
    spec.scales = Scales { embedding: 3.0, residual: 0.5, logits: 0.25 };
    let a = &mut spec.attention;
    if pick(3, 2) == 0 {
        let (nope, rope) = (1 + pick(4, 5), 2 + 2 * pick(5, 2));
        let q_rank = (pick(6, 2) == 0).then_some(3);
        let (kv_rank, value) = (2 + pick(7, 4), 1 + pick(8, 6));
        let latent = LatentSpec { q_rank, kv_rank, nope, rope, value, norm_eps: 1e-5 };
        *a = AttentionSpec { latent: Some(latent), ..AttentionSpec::plain(a.heads, a.heads, nope + rope) };
    } else {
        a.sinks = pick(9, 2) == 0;
        a.window = Some(3);
        a.window_layers = (pick(10, 2) == 0).then(|| vec![true, false, true]);
        a.rope.dims = (pick(11, 2) == 0).then_some(2);
        if pick(12, 3) == 0 {
            a.qk_norm = QkNorm::HeadAfter;
        }
    }
    a.rope.neighbours = pick(13, 2) == 0;
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        if let FfnSpec::Moe(moe) = layer {
            moe.shared_gate = pick(20 + l as u64, 2) == 0;
            moe.router_bias = pick(30 + l as u64, 2) == 0;
            moe.expert.bias = pick(40 + l as u64, 2) == 0;
            moe.shared_bias = pick(50 + l as u64, 2) == 0;
        }
    }
    spec
}

/// A model of each kind of router that is causal, and of each kind of special experts.
pub(crate) fn menu() -> Vec<ModelSpec> {
    use senmon_moe::router::KINDS;
    let with = |change: &dyn Fn(&mut MoeSpec)| {
        let mut spec = plain();
        spec.layers.iter_mut().for_each(|layer| {
            if let FfnSpec::Moe(moe) = layer {
                change(moe);
            }
        });
        spec.validate().unwrap();
        spec
    };
    let kinds = KINDS.iter().filter(|kind| kind.noncausal.is_none());
    let mut specs: Vec<_> = kinds
        .map(|kind| {
            with(&|moe| {
                moe.router.kind = kind.name.into();
                moe.router.groups = if kind.name == "hierarchical" { 2 } else { 1 };
                moe.top_k = if ["switch", "base"].contains(&kind.name) { 1 } else { 2 };
            })
        })
        .collect();
    specs.push(with(&|moe| {
        (moe.router.kind, moe.router.predictor) = ("depth".into(), true);
        (moe.experts, moe.top_k) = (1, 1);
    }));
    let extras = [
        Extras { zero: 1, identity: 1, constant: 2, ..Extras::default() },
        Extras { residual: true, ..Extras::default() },
        Extras { latent: 7, latent_norm: true, ..Extras::default() },
        Extras { members: 2, ..Extras::default() },
        Extras { members: 4, ..Extras::default() },
    ];
    specs.extend(extras.into_iter().map(|extras| with(&|moe| moe.extras = extras.clone())));
    specs
}

/// A specification that is valid and plain.
pub(crate) fn plain() -> ModelSpec {
    let mlp = MlpSpec::gated(12);
    let mut spec = test_spec(0);
    spec.vocab = 100;
    spec.hidden = 16;
    spec.tie_embeddings = false;
    spec.attention = AttentionSpec::plain(4, 2, 8);
    let moe = MoeSpec { shared_intermediate: 5, ..MoeSpec::plain(8, 2, mlp.clone()) };
    spec.layers = vec![FfnSpec::Dense(mlp), FfnSpec::Moe(moe)];
    spec
}
