"""Does a router collapse without balancing, and what cures it? One expert a token of sixteen (`switch`, the preset nano with experts of twice the width), 400 k tokens, three
seeds, for each method. A run has collapsed where a layer's load CV over the last steps is above 1, or a quarter of all experts had next to nothing (less than a
thousandth of an even share). Every finished run is a line of --results, an unfinished one is gone on with. At the end the table in docs/routing.md is written anew.

Needs nothing but Python; the binary is target/release/senmon, or --senmon.
"""

import statistics

from runs import ROOT, arguments, put_table, read, train_all, unknown

PAGE = ROOT / "docs/routing.md"
TOKENS = 400_000
SEEDS = [0, 1, 2]
# The deviation that weights begin with is said: what a router does early depends on it.
SETTING = ["router.kind=switch", "experts.count=16", "experts.intermediate=256", "balance.aux=0", "balance.z=0", "model.init_std=0.02"]
SIGMOID = ["router.kind=sigmoid_bias", "router.normalize=false"]
METHODS = {
    "nothing": [],
    "jitter 0.01": ["router.jitter=0.01"],
    "router started at a tenth": ["router.init_scale=0.1"],
    "z 0.001": ["balance.z=0.001"],
    "capacity 1.25": ["router.capacity=1.25"],
    "importance 0.01": ["balance.importance=0.01"],
    "aux 0.001": ["balance.aux=0.001"],
    "aux 0.01": ["balance.aux=0.01"],
    "sequence 0.01": ["balance.sequence=0.01"],
    "sigmoid_bias, rate 0.001": [*SIGMOID, "balance.bias_rate=0.001"],
    "sigmoid_bias, rate 0.01": [*SIGMOID, "balance.bias_rate=0.01"],
    "sigmoid_bias, quantile": [*SIGMOID, "balance.quantile=true", "balance.bias_rate=0"],
    "sinkhorn": ["router.kind=sinkhorn"],
    "base": ["router.kind=base"],
}


def collapsed(run):
    """By the load, by the dead."""
    return max(run["load_cv"]) > 1, sum(run["dead"]) >= run["experts"] / 4


def table(done):
    """Markdown: a row for each method."""
    rows = ["| what is done | seeds whose load CV ends above 1 | seeds with a quarter of the experts dead | worst layer's load CV, by seed | dead of 64, by seed "
            "| held-out bits per byte, mean |",
            "|---|---|---|---|---|---|"]
    for name in METHODS:
        runs = sorted((run for run in done if run["method"] == name), key=lambda run: run["seed"])
        if not runs:
            continue
        by_load, by_dead = zip(*map(collapsed, runs))
        worst = ", ".join(f"{max(run['load_cv']):.2f}" for run in runs)
        dead = ", ".join(str(sum(run["dead"])) for run in runs)
        bits = statistics.mean(run["bits_per_byte"] for run in runs)
        rows.append(f"| {name} | {sum(by_load)} of {len(runs)} | {sum(by_dead)} of {len(runs)} | {worst} | {dead} | {bits:.3f} |")
    return "\n".join(rows)


def main():
    parser = arguments(__doc__, "collapse.jsonl", "collapse")
    parser.add_argument("method", nargs="*", help="[all]")
    args = parser.parse_args()
    unknown(parser, "method", args.method, METHODS)
    if not args.table:
        wanted = []
        for seed in SEEDS:
            for name in args.method or METHODS:
                what = {"method": name, "seed": seed, "tokens": TOKENS, "experts": 64}
                settings = ["--tokens", str(TOKENS), "--seed", str(seed)]
                keys = ["train.eval_every=0", "train.keep=1", "data.holdout=0.002", *SETTING, *METHODS[name]]
                settings += [part for key in keys for part in ("--set", key)]
                folder = "".join(c if c.isalnum() else "-" for c in name)
                wanted.append((f"{folder}-seed{seed}", what, settings))
        train_all(args, wanted)
    put_table(PAGE, "collapse", table(read(args.results)))


if __name__ == "__main__":
    main()
