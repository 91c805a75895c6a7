"""Loads a folder that Senmon wrote in transformers, and compares its logits with `senmon logits`.

Every tensor must be taken: a missing, unexpected or misshapen one is an error. Prints one line; exit 0 if the largest
difference is at most 1e-4 of the largest logit, 1 otherwise.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

import families
import senmon


def load(folder):
    """The folder's model in f32, eager, with nothing missing or left over."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise SystemExit(f"{folder}: transformers does not load it: {e}")
    wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if wrong:
        raise SystemExit(f"{folder}: transformers loads it in part: {wrong}")
    return model.eval()


def draw(folder, vocab, count, seed):
    """`count` token ids from the tokenizer's vocabulary, or the model's where there is no tokenizer."""
    if (Path(folder) / "tokenizer.json").exists():
        from tokenizers import Tokenizer
        vocab = min(vocab, Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).get_vocab_size())
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or any model in Hugging Face layout")
    parser.add_argument("--tokens", help="ids, separated by commas [256 from the vocabulary]")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    senmon.add_binary(parser)
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    if not args.run.is_dir():
        raise SystemExit(f"{args.run} is not a folder")
    model = load(args.run)
    if args.tokens:
        tokens = torch.tensor([int(t) for t in args.tokens.split(",")])
    else:
        count = min(args.count, model.config.max_position_embeddings)
        tokens = draw(args.run, model.config.vocab_size, count, args.seed)
    reference, routing = families.forward(model, tokens)
    off = senmon.difference(senmon.logits(args.senmon, args.run, tokens), reference)
    good = off <= senmon.BOUND
    gap = "" if good else f"; the closest choice of experts was decided by {families.margins(model, routing)[0]:.1e}"
    print(f"{'ok' if good else 'FAILED'}: {args.run} as {model.config.model_type}, {len(tokens)} tokens: largest difference "
          f"{off:.1e} of the largest logit {reference.abs().max():.3f} (bound {senmon.BOUND:.0e}){gap}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
