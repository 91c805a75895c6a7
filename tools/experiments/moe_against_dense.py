"""Does a mixture of experts pay on this text? MoE against its dense twin of equal operations per token (the router counted), on the
same batches for the same number of steps.

Each arm's learning rate is chosen from the same small grid: runs of a quarter of the tokens with seed 0 give the best rate of each arm;
both arms are then trained to the end at both rates with seed 0 and keep the better, at which the other seeds follow. Products with weights are in bf16 in both
(routers are not), which is faster where the machine has the instructions. Every finished run is a line of --results, an unfinished one is gone on with from its
folder in --work: the script can be ended and called again at any time. Without arguments it does all of it; with --table it only prints.

Needs nothing but Python; the binary is target/release/senmon, or --senmon.
"""

import statistics

from runs import arguments, find, of_one_processor, read, train_all

ARMS = {"moe": [], "dense": ["--set", "model.ffn=dense"]}
# In steps of two, the best not at an end.
PRESETS = {
    "nano": {"tokens": 8_000_000, "rates": [7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2]},
    "tiny": {"tokens": 4_000_000, "rates": [1e-3, 2e-3, 4e-3, 8e-3]},
}
SEEDS = [0, 1, 2]


def one(preset, arm, rate, seed, tokens):
    """One run as `train_all` wants it."""
    what = {"preset": preset, "arm": arm, "lr": rate, "seed": seed, "tokens": tokens}
    settings = ["--preset", preset, "--tokens", str(tokens), "--seed", str(seed), "--precision", "bf16"]
    settings += ["--set", f"optimizer.lr={rate}", "--set", "train.eval_every=0", "--set", "train.keep=1", *ARMS[arm]]
    return f"{preset}-{arm}-lr{rate}-seed{seed}-{tokens // 1000}k", what, settings


def best(runs):
    """The rate of the best run of each arm."""
    return {arm: min((run for run in runs if run["arm"] == arm), key=lambda run: run["eval_loss"])["lr"] for arm in ARMS}


def experiment(args, preset):
    """Both arms of a preset: the grid, then the seeds."""
    tokens, rates = PRESETS[preset]["tokens"], PRESETS[preset]["rates"]
    grid = best(train_all(args, [one(preset, arm, rate, SEEDS[0], tokens // 4) for rate in rates for arm in ARMS]))
    candidates = sorted(set(grid.values()))
    rate = best(train_all(args, [one(preset, arm, rate, SEEDS[0], tokens) for rate in candidates for arm in ARMS]))
    train_all(args, [one(preset, arm, rate[arm], seed, tokens) for seed in SEEDS[1:] for arm in ARMS])


def table(done):
    """Markdown: what each arm reached, and the paired difference."""
    rows = ["| preset | arm | learning rate | held-out bits per byte, by seed | mean | parameters, active | minutes a run | peak memory | tokens per parameter |",
            "|---|---|---|---|---|---|---|---|---|"]
    verdicts, others = [], []
    for preset, shape in PRESETS.items():
        reached = {}
        for arm in ARMS:
            whole = [r for r in done if (r["preset"], r["arm"], r["tokens"]) == (preset, arm, shape["tokens"])]
            if not whole:
                continue
            rate = min((r for r in whole if r["seed"] == SEEDS[0]), key=lambda r: r["eval_loss"])["lr"]
            runs = sorted((r for r in whole if r["lr"] == rate), key=lambda r: r["seed"])
            others += [r for r in whole if r["lr"] != rate]
            reached[arm] = {r["seed"]: r["bits_per_byte"] for r in runs}
            bits = [r["bits_per_byte"] for r in runs]
            first = runs[0]
            rows.append(
                f"| {preset} | {arm} | {first['lr']:g} | {', '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} "
                f"| {first['parameters'] / 1e6:.2f} M, {first['active_parameters'] / 1e6:.2f} M | {statistics.median(r['tokens'] / r['tokens_per_second'] for r in of_one_processor(runs)) / 60:.1f} "
                f"| {first['peak_memory_bytes'] / 1e9:.2f} GB | {shape['tokens'] / first['parameters']:.2f} |")
        if len(reached) == 2:
            seeds = sorted(set(reached["moe"]) & set(reached["dense"]))
            gaps = [reached["moe"][seed] - reached["dense"][seed] for seed in seeds]
            verdicts.append(f"{preset}: MoE minus dense, by seed: {', '.join(f'{gap:+.4f}' for gap in gaps)} bits per byte.")
    grids = []
    for preset, shape in PRESETS.items():
        for arm in ARMS:
            runs = [find(done, preset=preset, arm=arm, lr=rate, seed=SEEDS[0], tokens=shape["tokens"] // 4) for rate in shape["rates"]]
            if any(runs):
                shown = ", ".join(f"{r['lr']:g}: {r['bits_per_byte']:.4f}" for r in runs if r)
                grids.append(f"{preset}, {arm}, {shape['tokens'] // 4_000_000} M tokens, seed {SEEDS[0]}: {shown}.")
    grids += [f"{r['preset']}, {r['arm']}, {r['tokens'] // 1_000_000} M tokens, seed {r['seed']}: {r['lr']:g}: {r['bits_per_byte']:.4f}."
              for r in others]
    return "\n".join([*rows, "", *verdicts, "", "The grid:", "", *(f"- {grid}" for grid in grids)])


def main():
    parser = arguments(__doc__, "moe_against_dense.jsonl", "moe_against_dense")
    parser.add_argument("preset", nargs="*", help=f"of {', '.join(PRESETS)} [all]")
    args = parser.parse_args()
    unknown = [name for name in args.preset if name not in PRESETS]
    if unknown:
        parser.error(f"no preset {unknown[0]}; there are {', '.join(PRESETS)}")
    if not args.table:
        for preset in args.preset or PRESETS:
            experiment(args, preset)
    print(table(read(args.results)))


if __name__ == "__main__":
    main()
