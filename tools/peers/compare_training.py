"""Training speed of Senmon beside transformers on the same machine, in one run.

The model: hidden 256, 4 layers, 4 heads, sequences of 256, vocabulary 4096, batch 8; 8 experts of 512, top-2, with the load-balancing
loss; AdamW, f32 (Senmon with products in bf16 as well). The dense twin (llama, intermediate 1024) has equal operations per token. transformers does a whole step, forward,
backward and optimiser, with each of its implementations of experts. Clipping is left out unless --clip says so, in its favour.

The sides alternate (A B C A B C ...), so that a machine that slows down slows all; what is shown is the median over rounds
and the ratio to the fastest MoE of transformers. Prints a markdown table; --json adds the raw numbers as a file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

BATCH, SEQUENCE, VOCAB = 8, 256, 4096
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": SEQUENCE, "bos_token_id": 0, "eos_token_id": 1,
}
MOE = {
    "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}


class Transformers:
    """A model of transformers that trains, kept warm between rounds."""

    def __init__(self, kind, attention, clip):
        torch.manual_seed(0)
        if kind == "dense":
            config = AutoConfig.for_model("llama", intermediate_size=1024, **SHAPE)
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        else:
            config = AutoConfig.for_model("mixtral", **SHAPE, **MOE)
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, experts_implementation=kind)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.clip = clip
        self.batches = torch.randint(0, VOCAB, (8, BATCH, SEQUENCE))
        self.name = f"transformers, {kind}"
        self.moe = kind != "dense"
        for n in range(3):
            self.step(n)

    def step(self, n):
        """One optimiser step."""
        tokens = self.batches[n % len(self.batches)]
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, steps):
        """Tokens per second: the median step of a few, after one that does not count."""
        times = []
        for n in range(steps + 1):
            start = time.perf_counter()
            self.step(n)
            times.append(time.perf_counter() - start)
        return BATCH * SEQUENCE / statistics.median(times[1:])


class Senmon:
    """`senmon bench train`, which prints the machine's own peaks as well."""

    moe = True

    def __init__(self, binary, threads, precision):
        self.name = f"senmon, {precision}"
        self.command = [str(binary), "bench", "train", "--json", "--threads", str(threads), "--precision", precision]
        self.said = []

    def measure(self, steps):
        """Tokens per second, as senmon says it."""
        try:
            done = subprocess.run([*self.command, "--runs", str(steps)], capture_output=True, text=True)
        except OSError as e:
            raise SystemExit(f"{self.command[0]}: {e.strerror}; build it with cargo build --release, or say --senmon PATH")
        if done.returncode:
            raise SystemExit(f"{' '.join(self.command)}: exit {done.returncode}: {done.stderr.strip()}")
        self.said.append(json.loads(done.stdout))
        return self.said[-1]["tokens_per_second"]


def processor():
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(speeds, sides):
    """Markdown: median, range and ratio to the fastest MoE of transformers."""
    medians = {side.name: statistics.median(speeds[side.name]) for side in sides}
    best = max(medians[side.name] for side in sides if side.moe and isinstance(side, Transformers))
    rows = ["| | tokens/s (median) | lowest to highest | ratio |", "|---|---|---|---|"]
    for side in sides:
        s = speeds[side.name]
        rows.append(f"| {side.name} | {medians[side.name]:,.0f} | {min(s):,.0f} to {max(s):,.0f} | {medians[side.name] / best:.2f} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--senmon", type=Path, default=root / "target/release/senmon", help="the binary [%(default)s]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each side in a round")
    parser.add_argument("--kinds", default="eager,grouped_mm,dense", help="of transformers [%(default)s]")
    parser.add_argument("--precisions", default="f32,bf16", help="of Senmon [%(default)s]")
    parser.add_argument("--attention", default="sdpa", help="of transformers [%(default)s]")
    parser.add_argument("--clip", type=float, default=0.0, help="clip the gradients of transformers [do not]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = [Senmon(args.senmon, args.threads, precision) for precision in args.precisions.split(",")]
    sides = ours + [Transformers(kind, args.attention, args.clip) for kind in args.kinds.split(",")]
    if not any(side.moe for side in sides[len(ours):]):
        raise SystemExit("--kinds needs one that is not dense, to compare with")
    speeds = {side.name: [] for side in sides}
    for n in range(args.rounds):
        for side in sides:
            speeds[side.name].append(side.measure(args.steps))
            print(f"round {n + 1}: {side.name} {speeds[side.name][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    print(f"{processor()}, {args.threads} of {os.cpu_count()} threads, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, {args.rounds} rounds of {args.steps} steps\n")
    print(table(speeds, sides))
    for side in ours:
        peaks = [f"{key} {value}" for key, value in side.said[-1].items() if key.startswith("peak")]
        if peaks:
            print(f"\nThe machine by `bench train` ({side.name}): {', '.join(peaks)}")
    if args.json:
        said = {side.name: side.said for side in ours}
        args.json.write_text(json.dumps({"speeds": speeds, "senmon": said}, indent=2) + "\n")


if __name__ == "__main__":
    main()
