"""Writes the golden tokenizers in GGUF that the Rust tests compare with: crates/models/tests/golden/gguf/tokenizers.

    spm.gguf      a BPE of SentencePiece with bytes to fall back on, trained here, its scores as llama.cpp's converter writes them
    bytes.gguf    a byte-level BPE trained by the package `tokenizers`, with Qwen's cuts and a begin-of-text
    NAME.json     texts and their ids, with what is put around them: by SentencePiece, or by the package `tokenizers`; the same as llama.cpp's

Texts on which SentencePiece or `tokenizers` and llama.cpp disagree are refused: the golden files hold what both say.
"""

import argparse
import ctypes
import io
import json
from pathlib import Path

import gguf
import llama_cpp
import sentencepiece
import tokenizers

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "crates/models/tests/golden/gguf/tokenizers"
TEXTS = [
    "Hello world", "  two spaces  and\ttabs\n\nnew lines ", "fn main() { println!(\"{}\", 1234567); }", "naïve façade — Ærø, 日本語 and 🦀!",
    "it's don't we'll I'M", "a", " ", "", "<|end|>in the middle<|end|>", "\r\n\r\n  x\u00a0y", "…and so on, 3.14159 of them",
]


def text():
    """What is learnt from: the project's own documents."""
    return "\n".join((ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"))


def writer(path, model, pre, tokens, kinds):
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_tokenizer_model(model)
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    return w


def finish(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def spm(path):
    """(ids of a text, by SentencePiece)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        character_coverage=0.999, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=["<|end|>"], num_threads=1, minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens, scores, kinds = [], [], []
    for i in range(sp.vocab_size()):
        tokens.append(sp.id_to_piece(i))
        scores.append(sp.get_score(i))
        kind = gguf.TokenType.NORMAL
        if sp.is_unknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif sp.is_control(i):
            kind = gguf.TokenType.CONTROL
        elif sp.is_byte(i):
            kind = gguf.TokenType.BYTE
        elif tokens[-1] == "<|end|>":
            kind = gguf.TokenType.USER_DEFINED
        kinds.append(kind)
    w = writer(path, "llama", "default", tokens, kinds)
    w.add_token_scores(scores)
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_unk_token_id(sp.unk_id())
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    finish(w)
    return lambda s: [sp.bos_id()] + sp.encode(s)


def byte_level(path):
    """(ids of a text, by `tokenizers`)."""
    cut = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(cut), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    t.train_from_iterator(text().splitlines(keepends=True), trainer)
    t.post_processor = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    model = json.loads(t.to_str())["model"]
    tokens = [None] * len(model["vocab"])
    for token, i in model["vocab"].items():
        tokens[i] = token
    kinds = [gguf.TokenType.CONTROL if i < 2 else gguf.TokenType.NORMAL for i in range(len(tokens))]
    w = writer(path, "gpt2", "qwen2", tokens, kinds)
    w.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model["merges"]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(True)
    finish(w)
    return lambda s: t.encode(s).ids


@llama_cpp.llama_log_callback
def quiet(_level, _text, _data):
    pass


def of_llama_cpp(path):
    """ids of a text, by llama.cpp."""
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"{path}: llama.cpp does not load it")
    vocab = llama_cpp.llama_model_get_vocab(model)

    def ids(s):
        raw = s.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), out, len(out), True, True)
        return list(out[:n])

    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in (("spm", spm), ("bytes", byte_level)):
        path = args.out / f"{name}.gguf"
        own = make(path)
        other = of_llama_cpp(path)
        lines = [line for line in text().splitlines() if line.strip()][:: 40]
        kept = []
        for s in TEXTS + lines:
            a, b = own(s), other(s)
            if a != b:
                print(f"{name}: {s!r}: {a} here, {b} by llama.cpp: left out")
                continue
            kept.append({"text": s, "ids": a})
        (args.out / f"{name}.json").write_text(json.dumps(kept, ensure_ascii=False, indent=0) + "\n")
        print(f"{name}: {len(kept)} texts, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
