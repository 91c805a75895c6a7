"""Random models of every family that Senmon reads and writes, in two sizes, and the odd configurations of each.

A case is a family and what is odd about its configuration. `config(case, size)` gives the transformers configuration,
`build(config, seed)` the model with weights that hide nothing: matrices of standard deviation 0.2 or more, norm weights
around one, biases away from zero.
"""

import re
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

logging.disable_progress_bar()

# Keys of the configuration, by size. "golden" fits a repository, "import" is what check_import.py compares.
# `wide` and `narrow` are the widths of a dense MLP and of an expert.
SIZES = {
    "golden": {"vocab": 96, "hidden": 24, "layers": 2, "heads": 4, "kv": 2, "head_dim": 10, "wide": 20, "narrow": 8},
    "import": {"vocab": 512, "hidden": 128, "layers": 3, "heads": 8, "kv": 4, "head_dim": 24, "wide": 192, "narrow": 64},
}


def _base(z):
    return {
        "vocab_size": z["vocab"], "hidden_size": z["hidden"], "num_hidden_layers": z["layers"],
        "num_attention_heads": z["heads"], "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }


def _rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# case -> (family, keys by size). The case's name begins with its family.
CASES = {
    "mixtral-top2": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_key_value_heads": z["kv"], **_rope(20000.0)},
    "mixtral-top1-head-dim": lambda z: {
        "intermediate_size": 2 * z["narrow"], "num_local_experts": 4, "num_experts_per_tok": 1,
        "num_key_value_heads": 1, "head_dim": z["head_dim"], "rms_norm_eps": 1e-3},
    "mixtral-window-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 5, "num_experts_per_tok": 3,
        "num_key_value_heads": z["heads"], "sliding_window": 7, "tie_word_embeddings": True},
    "olmoe-raw": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
        "num_key_value_heads": z["kv"]},
    "olmoe-normalised-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "num_key_value_heads": z["heads"], "tie_word_embeddings": True, **_rope(500.0)},
    "olmoe-bias": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "num_key_value_heads": z["kv"], "attention_bias": True},
    "qwen3_moe-normalised": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "num_experts": 8,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "num_key_value_heads": z["kv"],
        "head_dim": z["head_dim"], **_rope(1000000.0)},
    "qwen3_moe-raw-dense-first": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "num_experts": 8,
        "num_experts_per_tok": 3, "norm_topk_prob": False, "num_key_value_heads": z["heads"],
        "mlp_only_layers": [0]},
    "qwen3_moe-sparse-step-tied-bias": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "num_experts": 7,
        "num_experts_per_tok": 1, "norm_topk_prob": False, "num_key_value_heads": 1, "head_dim": z["head_dim"],
        "decoder_sparse_step": 2, "tie_word_embeddings": True, "attention_bias": True},
    "dots1-groups": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_key_value_heads": z["kv"],
        "sliding_window": None, "head_dim": z["head_dim"]},
    "dots1-raw-shared2": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 6,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 0,
        "routed_scaling_factor": 0.7, "norm_topk_prob": False, "num_key_value_heads": z["heads"],
        "sliding_window": None, "attention_bias": True, "tie_word_embeddings": True},
    "dots1-half-groups": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0, "norm_topk_prob": True, "num_key_value_heads": 1, "sliding_window": None},
    "llama-plain": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["heads"]},
    "llama-bias-tied-head-dim": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["kv"], "head_dim": z["head_dim"],
        "attention_bias": True, "tie_word_embeddings": True, **_rope(500000.0)},
    "qwen3-plain": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["kv"], "head_dim": z["hidden"] // z["heads"]},
    "qwen3-bias-tied-head-dim": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": 1, "head_dim": z["head_dim"],
        "attention_bias": True, "tie_word_embeddings": True, **_rope(50.0)},
}


def family(case):
    """The `model_type` of a case."""
    return case.split("-")[0]


def config(case, size):
    """The transformers configuration of a case in one of the SIZES."""
    z = SIZES[size]
    return AutoConfig.for_model(family(case), **{**_base(z), **CASES[case](z)})


def build(cfg, seed, std=0.2):
    """A model in f32 with eager attention and experts, its weights drawn anew from `seed`."""
    cfg = type(cfg).from_dict(cfg.to_dict())
    model = AutoModelForCausalLM.from_config(
        cfg, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    randomize(model, seed, std)
    return model.eval()


@torch.no_grad()
def randomize(model, seed, std=0.2):
    """Matrices ~ N(0, std), biases and score corrections ~ N(0, 0.2), norm weights ~ N(1, 0.2)."""
    g = torch.Generator().manual_seed(seed)
    seen = set()
    named = list(model.named_parameters()) + [
        (name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, tensor in named:
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=g)
        if tensor.dim() >= 2:
            tensor.copy_(noise * std)
        elif name.endswith("bias"):
            tensor.copy_(noise * 0.2)
        else:
            assert "norm" in name, name
            tensor.copy_(1 + noise * 0.2)


def routers(model):
    """[(layer, router module)] of the MoE layers, bottom to top."""
    found = []
    for name, module in model.named_modules():
        if re.search(r"TopKRouter$", type(module).__name__, re.IGNORECASE):
            found.append((int(re.search(r"layers\.(\d+)\.", name).group(1)), module))
    return found


@contextmanager
def recorded(model):
    """Records, for each MoE layer, (logits [T, E], weights [T, K], experts [T, K]) of every forward pass inside."""
    seen, hooks = {}, []
    for layer, module in routers(model):
        hook = lambda _m, _i, out, layer=layer: seen.__setitem__(layer, tuple(t.detach() for t in out))
        hooks.append(module.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def forward(model, tokens):
    """Logits [S, V] of one sequence and the routing by layer (see `recorded`)."""
    with recorded(model) as seen:
        logits = model(input_ids=tokens[None].long(), use_cache=False).logits[0]
    return logits, dict(seen)


def margins(model, routing):
    """The smallest gap by which any token's selection, and the order of its picks, was decided."""
    pick, order = float("inf"), float("inf")
    for layer, module in routers(model):
        logits, weights, experts = routing[layer]
        k, e = experts.shape[-1], logits.shape[-1]
        if hasattr(module, "e_score_correction_bias"):  # dots1: sigmoid scores, picked with a bias within the best groups
            choice = logits.sigmoid() + module.e_score_correction_bias
            groups, best = module.num_group, module.topk_group
            by_group = choice.view(-1, groups, e // groups)
            if best < groups:
                ranked = by_group.topk(2, dim=-1)[0].sum(-1).sort(descending=True)
                pick = min(pick, (ranked[0][:, best - 1] - ranked[0][:, best]).min().item())
                mask = torch.zeros_like(by_group[..., 0]).scatter_(1, ranked[1][:, :best], 1.0)
                choice = by_group.masked_fill(mask[..., None] == 0, float("-inf")).view(-1, e)
        else:
            choice = logits.softmax(-1)
        ranked = choice.sort(descending=True)[0]
        if k < e:
            gap = ranked[:, k - 1] - ranked[:, k]
            pick = min(pick, gap[gap.isfinite()].min().item() if gap.isfinite().any() else pick)
        ordered = weights.sort(descending=True)[0]
        if k > 1:
            order = min(order, (ordered[:, :-1] - ordered[:, 1:]).min().item())
    return pick, order


def unused(routing):
    """How many experts no token went to, over all layers."""
    return sum(logits.shape[-1] - experts.unique().numel() for logits, _, experts in routing.values())
