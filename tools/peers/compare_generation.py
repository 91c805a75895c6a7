"""Speed of running models in Senmon beside transformers and llama.cpp (or ik_llama.cpp) on the same machine, in one run.

Random checkpoints of a few layers in the shapes of known models are made once in --work: a Hugging Face folder in bf16, and GGUF files
of it by `senmon convert`. Each side reads a prompt of 512 tokens at once and makes 64 tokens one by one from an empty context, as
llama-bench does. The sides alternate (A B C A B C ...); what is shown is the median over rounds, beside the read bandwidth and the peak
that `senmon bench` measured between them.

transformers (bf16) is run where it is installed; llama-bench of llama.cpp or ik_llama.cpp where --bench names it:

    --bench llama.cpp=/path/to/llama-bench --bench "ik_llama.cpp -rtr=/path/to/ik/llama-bench -rtr 1"
"""

import argparse
import json
import shlex
import statistics
import subprocess
import time
from pathlib import Path

from compare_training import processor

PROMPT, TOKENS, VOCAB = 512, 64, 4096
COMMON = {"vocab_size": VOCAB, "hidden_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
    "olmoe4": ("olmoe", {"intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
                         "num_experts_per_tok": 8, "norm_topk_prob": False, "pad_token_id": 1}),
    "mixtral4": ("mixtral", {"intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
                             "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3moe4": ("qwen3_moe", {"moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
                                "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}),
}


def run(command):
    """What a command prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


class Senmon:
    """`senmon bench generate` on a model."""

    def __init__(self, args, model, kind):
        self.name, self.limits = f"senmon, {kind}", []
        self.command = [args.senmon, "bench", "generate", model, "--json", "--threads", args.threads, "--runs", 1]

    def measure(self):
        said = json.loads(run(self.command))
        self.limits.append((said["read_gbs"], said["peak_gflops"], said["active_bytes_per_token"]))
        return tuple(case["tokens_per_second"] for case in said["cases"])


class Bench:
    """llama-bench on a GGUF file."""

    def __init__(self, args, name, command, model, kind):
        self.name = f"{name}, {kind}"
        self.command = [*shlex.split(command), "-m", model, "-t", args.threads, "-p", PROMPT, "-n", TOKENS, "-r", 1, "-o", "json"]

    def measure(self):
        said = json.loads(run(self.command))
        speed = {test["n_prompt"] > 0: test["avg_ts"] for test in said}
        return speed[True], speed[False]


class Transformers:
    """A model of transformers, kept warm between rounds."""

    def __init__(self, args, folder, kind, model=None):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(args.threads)
        self.name, self.kind, self.torch = f"transformers, bf16, {kind}", kind, torch
        self.model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.ids = torch.randint(2, VOCAB, (1, PROMPT))

    def measure(self):
        from transformers import DynamicCache

        self.model.set_experts_implementation(self.kind)
        with self.torch.inference_mode():
            self.model(input_ids=self.ids[:, :32])
            start = time.perf_counter()
            self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
            prompt = time.perf_counter() - start
            cache = DynamicCache(config=self.model.config)
            start = time.perf_counter()
            for i in range(TOKENS):
                cache = self.model(input_ids=self.ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
            return PROMPT / prompt, TOKENS / (time.perf_counter() - start)


def checkpoint(args, shape):
    """The folder of a shape, made if it is not there."""
    folder = args.work / shape
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        kind, own = SHAPES[shape]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **own), dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def gguf(args, folder, kind):
    """The GGUF file of a folder in a type, made if it is not there."""
    file = args.work / f"{folder.name}-{kind}.gguf"
    if not file.exists():
        run([args.senmon, "convert", folder, file, "--type", kind])
    return file


def table(shape, sides, speeds):
    """Markdown: medians of a shape's sides."""
    rows = []
    for side in sides:
        pairs = speeds[side.name]
        (prompt, low, high), (decode, slow, fast) = [
            (statistics.median(column), min(column), max(column)) for column in zip(*pairs)]
        limit = ""
        if isinstance(side, Senmon):
            bandwidth, peak, active = (statistics.median(column) for column in zip(*side.limits))
            limit = f"{100 * decode * active / 1e9 / bandwidth:.0f} % of {bandwidth:.1f} GB/s; peak {peak:.0f} GOP/s"
        rows.append(f"| {shape} | {side.name} | {prompt:,.0f} ({low:,.0f} to {high:,.0f}) | {decode:,.1f} ({slow:,.1f} to {fast:,.1f}) | {limit} |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("shape", nargs="*", help=f"of {', '.join(SHAPES)} [all]")
    parser.add_argument("--senmon", type=Path, default=root / "target/release/senmon", help="the binary [%(default)s]")
    parser.add_argument("--work", type=Path, default=root / "runs/peers", help="where checkpoints are, about 4 GB a shape [%(default)s]")
    parser.add_argument("--types", default="bf16,q8_0,q4_k", help="[%(default)s]")
    parser.add_argument("--bench", action="append", default=[], metavar="NAME=COMMAND", help="a llama-bench and its flags")
    parser.add_argument("--kinds", default="eager,grouped_mm", help="experts of transformers; empty for none [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    unknown = [shape for shape in args.shape if shape not in SHAPES]
    if unknown:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape in args.shape or SHAPES:
        folder = checkpoint(args, shape)
        sides = []
        for kind in args.types.split(","):
            model = folder if kind == "bf16" else gguf(args, folder, kind)
            sides.append(Senmon(args, model, kind))
            for bench in args.bench:
                name, command = bench.split("=", 1)
                sides.append(Bench(args, name, command, gguf(args, folder, kind), kind))
            if kind == "bf16":
                model = None
                for experts in filter(None, args.kinds.split(",")):
                    sides.append(Transformers(args, folder, experts, model))
                    model = sides[-1].model
        speeds = {side.name: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                speeds[side.name].append(side.measure())
        rows += table(shape, sides, speeds)
        print("\n".join(rows[-len(sides):]), flush=True)
    print(f"\n{processor()}, {args.threads} threads, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}\n")
    print("| shape | | prompt of 512, tokens/s | one by one, tokens/s | of the limit |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
