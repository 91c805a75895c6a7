"""Every technique of the routing menu, trained at equal cost on the same text: the preset nano, 1 M tokens, three seeds. Every finished run is a line of
--results, an unfinished one is gone on with: the script can be ended and called again at any time. At the end the table in docs/routing.md is written anew.

Products with weights are in bf16 (routers are not), which is faster where the machine has the instructions, and alike for all.

Equal cost: as many experts per token of the same width, or where a technique has another number of them, a width such that a token costs as much.

Needs nothing but Python; the binary is target/release/senmon, or --senmon.
"""

import statistics

from runs import ROOT, arguments, of_one_processor, put_table, read, train_all, unknown

PAGE = ROOT / "docs/routing.md"
TOKENS = 1_000_000
SEEDS = [0, 1, 2]


def sets(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


# One expert a token is twice as wide, sixteen are an eighth.
WIDE = "experts.intermediate=256"
NONCAUSAL = "router.allow_noncausal=true"
TECHNIQUES = {
    "dense model": sets("model.ffn=dense"),
    "topk_pre, no balancing": sets("balance.aux=0", "balance.z=0"),
    "topk_pre, aux": [],
    "topk_pre, aux, not normalised": sets("router.normalize=false"),
    "topk_pre, aux, scope global": sets("train.batch=4", "train.accumulate=4", "balance.scope=global"),
    "topk_pre, aux by sequence": sets("balance.aux=0", "balance.sequence=0.01"),
    "topk_pre, jitter": sets("router.jitter=0.01"),
    "topk_pre, capacity 1.25, position": sets("router.capacity=1.25"),
    "topk_pre, capacity 1.25, priority": sets("router.capacity=1.25", "router.drop=priority"),
    "topk_pre, capacity 1.25, gate": sets("router.capacity=1.25", "router.drop=gate"),
    "topk_pre, capacity 1.25, random": sets("router.capacity=1.25", "router.drop=random"),
    "topk_post, aux": sets("router.kind=topk_post"),
    "switch": sets("router.kind=switch", WIDE),
    "switch, capacity 1.25, jitter": sets("router.kind=switch", WIDE, "router.capacity=1.25", "router.jitter=0.01", "router.init_scale=0.1"),
    "noisy_topk": sets("router.kind=noisy_topk"),
    "noisy_topk, fixed": sets("router.kind=noisy_topk", "router.noise=fixed"),
    "gshard": sets("router.kind=gshard", "router.capacity=2.0"),
    "gshard, second by Gumbel": sets("router.kind=gshard", "router.second=gumbel", "router.capacity=1.0", "router.normalize_after_drop=true"),
    "sigmoid_bias": sets("router.kind=sigmoid_bias"),
    "sigmoid_bias, groups": sets("router.kind=sigmoid_bias", "router.groups=4", "router.top_groups=2"),
    "sigmoid_bias, quantile": sets("router.kind=sigmoid_bias", "balance.quantile=true"),
    "softmax_bias": sets("router.kind=softmax_bias"),
    "sqrt_softplus": sets("router.kind=sqrt_softplus"),
    "sigmoid_input": sets("router.kind=sigmoid_input"),
    "sparsemixer": sets("router.kind=sparsemixer"),
    "top_p": sets("router.kind=top_p"),
    "relu": sets("router.kind=relu"),
    "hierarchical": sets("router.kind=hierarchical"),
    "hash": sets("router.kind=hash"),
    "random": sets("router.kind=random"),
    "random, consistency": sets("router.kind=random", "balance.distill=1.0"),
    "base": sets("router.kind=base", WIDE),
    "sinkhorn": sets("router.kind=sinkhorn"),
    "expert_choice (not causal)": sets("router.kind=expert_choice", NONCAUSAL),
    "soft (not causal)": sets("router.kind=soft", NONCAUSAL, WIDE),
    "depth, predictor": sets("router.kind=depth", "router.predictor=true", "router.capacity=0.5", "experts.intermediate=512"),
    "all experts": sets("router.kind=dense", "experts.intermediate=32"),
    "dense gradient": sets("balance.dense_gradient=straight_through"),
    "running means": sets("balance.dense_gradient=ema"),
    "distillation": sets("balance.distill=0.1"),
    "shared expert": sets("experts.shared=1", "experts.top_k=1", "router.normalize=false"),
    "shared expert, gate": sets("experts.shared=1", "experts.shared_gate=true", "experts.top_k=1", "router.normalize=false"),
    "residual": sets("experts.residual=true", "experts.top_k=1", "router.normalize=false"),
    "pyramid": sets("experts.count=[4, 8, 8, 12]"),
    "identity and zero experts": sets("experts.zero=1", "experts.identity=1", "experts.constant=2"),
    "fine-grained, 32 of half the width, 4": sets("experts.count=32", "experts.top_k=4", "experts.intermediate=64"),
    "latent width 64": sets("experts.latent=64", "experts.intermediate=192"),
    "ensemble of 2 members": sets("experts.members=2", "experts.top_k=1", "experts.intermediate=128", "router.normalize=false"),
}


# What all others are held against, seed by seed: seeds differ more than techniques do, and a technique's runs share theirs with these.
BASE = "topk_pre, aux"
# Student's t at 95 %, both sides, for one and two degrees of freedom.
T = {2: 12.71, 3: 4.303}


def against(runs, base):
    """The mean difference from the base over seeds that both have, and half of its 95 % interval."""
    own = [run["bits_per_byte"] - base[run["seed"]] for run in runs if run["seed"] in base]
    if not own or runs[0]["technique"] == BASE:
        return ""
    half = f" ± {T[len(own)] * statistics.stdev(own) / len(own) ** 0.5:.3f}" if len(own) in T else ""
    return f"{statistics.mean(own):+.3f}{half}"


def effects(done):
    """What each technique that has all seeds adds to the mean of all such, and the standard deviation of what neither technique nor
    seed explains, with its degrees of freedom."""
    bits = {}
    for run in done:
        bits.setdefault(run["technique"], {})[run["seed"]] = run["bits_per_byte"]
    bits = {name: own for name, own in bits.items() if name in TECHNIQUES and all(seed in own for seed in SEEDS)}
    if len(bits) < 2:
        return {}, None
    of_seed = {seed: statistics.mean(own[seed] for own in bits.values()) for seed in SEEDS}
    mean = statistics.mean(of_seed.values())
    found = {name: statistics.mean(own[seed] for seed in SEEDS) - mean for name, own in bits.items()}
    left = [own[seed] - of_seed[seed] - found[name] for name, own in bits.items() for seed in SEEDS]
    freedom = (len(bits) - 1) * (len(SEEDS) - 1)
    return found, ((sum(x * x for x in left) / freedom) ** 0.5, freedom)


def by_chance(deviation, freedom, tests):
    """How far from 0 the effect of one of `tests` techniques without any lies in one experiment of twenty (Bonferroni)."""
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / tests)
    # Student's t from the normal quantile, good to three digits from ten degrees of freedom on.
    return (z + (z**3 + z) / (4 * freedom)) * deviation / len(SEEDS) ** 0.5


def table(done):
    """Markdown: a row for each technique, means over seeds."""
    found, rest = effects(done)
    rows = [f"| technique | held-out bits per byte, mean (by seed) | less the mean of all | less {BASE}, paired | load CV | dead of all experts | drops | tokens/s | MFLOP per token |",
            "|---|---|---|---|---|---|---|---|---|"]
    ranked = []
    timed = of_one_processor(done)
    base = {run["seed"]: run["bits_per_byte"] for run in done if run["technique"] == BASE}
    for name in TECHNIQUES:
        runs = sorted((run for run in done if run["technique"] == name), key=lambda run: run["seed"])
        if not runs:
            continue
        bits = [run["bits_per_byte"] for run in runs]
        cv = statistics.mean(max(run["load_cv"], default=0) for run in runs)
        dead = sum(sum(run["dead"]) for run in runs)
        drops = statistics.mean(statistics.mean(run["drops"]) if run["drops"] else 0 for run in runs)
        by_seed = ", ".join(f"{b:.3f}" for b in bits)
        speeds = [run["tokens_per_second"] for run in timed if run["technique"] == name]
        speed = f"{statistics.median(speeds) / 1000:.1f} k" if speeds else ""
        ranked.append((statistics.mean(bits), f"| {name} | {statistics.mean(bits):.3f} ({by_seed}) | {f'{found[name]:+.3f}' if name in found else ''} | {against(runs, base)} | {cv:.2f} | {dead} "
                       f"| {drops:.0f} | {speed} | {runs[0]['flops_per_token'] / 1e6:.2f} |"))
    rows += [row for _, row in sorted(ranked)]
    if rest:
        one, any_of = (by_chance(*rest, tests) for tests in (1, len(found)))
        rows += ["", f"What neither technique nor seed explains has a standard deviation of {rest[0]:.3f} ({rest[1]} degrees of freedom). So a technique "
                 f"that changes nothing lies up to {one:.3f} from the mean of all in 19 of 20 experiments, and of {len(found)} such the furthest up to {any_of:.3f}."]
    return "\n".join(rows)


def main():
    parser = arguments(__doc__, "routing.jsonl", "routing_table")
    parser.add_argument("technique", nargs="*", help="[all]")
    args = parser.parse_args()
    unknown(parser, "technique", args.technique, TECHNIQUES)
    if not args.table:
        wanted = []
        for seed in SEEDS:
            for name in args.technique or TECHNIQUES:
                what = {"technique": name, "seed": seed, "tokens": TOKENS}
                settings = ["--tokens", str(TOKENS), "--seed", str(seed), "--precision", "bf16", "--set", "train.eval_every=0", "--set", "train.keep=1"]
                folder = "".join(c if c.isalnum() else "-" for c in name)
                wanted.append((f"{folder}-seed{seed}", what, settings + TECHNIQUES[name]))
        train_all(args, wanted)
    put_table(PAGE, "table", table(read(args.results)))


if __name__ == "__main__":
    main()
