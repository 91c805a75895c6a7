"""What other systems compute for the routing menu: cases for make_routing.py, which says what a case is.

The functions and modules of the installed packages are called as they are. A router module gets an identity matrix for its
weight, so that its input is its logits. Where a system draws, its sampler is replaced for the call by one that returns the
case's draws. torch.topk does not say which of equal values it takes, and two drop rules hang on that: `first_of_ties`.
"""

import importlib.metadata
import os
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")

import torch
from torch.nn import functional as F

import fairscale.nn.moe.top2gate as fairscale_gate
from deepspeed.moe import sharded_moe
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from mixture_of_experts.mixture_of_experts import Top2Gating
from soft_moe_pytorch import SoftMoE
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers import modeling_switch_transformers as switch_transformers

from routing_plain import Unfit, capacity_of, config, draw_logits

CASES = {}


def version(package):
    return f"{package} {importlib.metadata.version(package)}"


def case(name):
    def add(function):
        CASES[name] = function
        return function

    return add


@contextmanager
def replaced(owner, name, value):
    """`owner.name` is `value` for a while."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def first_of_ties():
    """torch.topk that takes the lowest index of equal values."""

    def topk(x, k, dim=-1, largest=True, sorted=True):
        values, index = torch.sort(x, dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, int(k)), index.narrow(dim, 0, int(k))))

    return replaced(torch, "topk", topk)


TIES = """The rule is written with torch.topk over zeros and ones, which leaves open which of the equal ones it takes (on a CPU
not the first); the call had a topk that takes the lowest index, which is what "position" says."""


def ones(index, experts):
    """[T, E] bool of indices [T, K]."""
    return torch.zeros(len(index), experts, dtype=torch.bool).scatter(1, index.long(), True)


# DeepSpeed


def deepspeed(g, kind, k, function, tokens=32, experts=8, note="", factor=0.0, spread=1.5, noise=None, mask=False, **keys):
    """`function(inputs, logits, drop)` calls a gate; without drop it says what is picked."""
    router = {"capacity": factor} if factor else {}
    inputs = {"logits": draw_logits(g, tokens, experts, spread)}
    if noise is not None:
        inputs["noise"] = noise(g, tokens, experts)
    if mask:
        inputs["mask"] = (torch.rand(tokens, generator=g) < 0.8).to(torch.uint8)

    def compute(x):
        z = x["logits"]
        aux, combine, dispatch, counts = function(x, z.clone(), bool(factor))
        _, free, _, _ = function(x, z.detach().clone(), False)
        picked = free.sum(2) > 0
        assert torch.equal(picked.sum(0), counts)
        order = z.detach().softmax(1)
        if "noise" in x and kind == "gshard":  # the first is still the first
            order = order * ones(order.argmax(1, keepdim=True), experts) + picked * 1e-2 * (
                1 + torch.sigmoid(z.detach() + x["noise"])
            )
        out = {"weights": combine.sum(2), "picked": picked, "kept": dispatch.any(2), "order": order}
        if not mask:  # it counts padding there
            out["losses"] = {"aux": aux}
        return out

    balance = {} if mask else {"aux": 0.01, "convention": "deepspeed"}
    return {
        "config": config(experts, k, kind, router | keys, balance),
        "oracle": f"{version('deepspeed')}, sharded_moe.top{k if kind != 'topk_pre' else 'k'}gating",
        "note": note,
        "train": True,
        "inputs": inputs,
        "noise": ["noise"] if noise else [],
        "compute": compute,
    }


def gumbel(g, tokens, experts):
    return -(-(torch.rand(tokens, experts, generator=g).clamp(1e-6, 1 - 1e-6)).log()).log()


def uniform(g, tokens, experts):
    return torch.rand(tokens, experts, generator=g)


def sampler(table, noise):
    """DeepSpeed and fairscale keep their samplers in a dict by device."""
    return {**table, torch.device("cpu"): lambda shape: noise}


def top1(factor, least, rts):
    def call(x, z, drop):
        with replaced(sharded_moe, "exp_selection_uniform_map", sampler({}, x.get("noise"))), first_of_ties():
            used = x["mask"].to(z.dtype) if "mask" in x else None
            if used is not None:
                used = x["mask"].long()
            return sharded_moe.top1gating(z, factor if drop else 100.0, least, used_token=used, use_rts=rts and drop)

    return call


@case("deepspeed-top1")
def _(g):
    def call(x, z, drop):
        return sharded_moe.top1gating(z, 1.0, 1, drop_tokens=False, use_rts=False)

    return deepspeed(g, "switch", 1, call)


@case("deepspeed-top1-position")
def _(g):
    return deepspeed(g, "switch", 1, top1(0.75, 1, False), factor=0.75, drop="position", note=TIES)


@case("deepspeed-top1-random")
def _(g):
    note = "capacity_factor 0.5 would give C = 2, min_capacity makes it 3. noise: the uniform draws of random token selection."
    call = top1(0.5, 3, True)
    return deepspeed(g, "switch", 1, call, factor=0.5, noise=uniform, drop="random", min_capacity=3, note=note)


@case("deepspeed-top1-mask")
def _(g):
    note = f"""{TIES} used_token is the mask. No aux: DeepSpeed's counts padding (P and the fractions are over all tokens). Its
    capacity counts padding too; the draw is one where ceil comes to the same."""
    spec = deepspeed(g, "switch", 1, top1(0.7, 1, False), factor=0.7, mask=True, drop="position", note=note)
    live = int(spec["inputs"]["mask"].sum())

    def check(inputs, results):
        if capacity_of(0.7, 1, live, 8) != capacity_of(0.7, 1, 32, 8):
            raise Unfit("capacity with and without padding")

    return spec | {"check": check}


def top2(factor, least, sampling):
    def call(x, z, drop):
        with replaced(sharded_moe, "gumbel_map", sampler({}, x.get("noise"))):
            return sharded_moe.top2gating(z, factor, least, drop_tokens=drop, top2_2nd_expert_sampling=sampling)

    return call


TOP2 = "g is divided by the sum after dropping: a token that lost one expert has weight 1 for the other."


@case("deepspeed-top2")
def _(g):
    note = "GShard's random second is not there: the second is the next one, always kept."
    return deepspeed(g, "gshard", 2, top2(1.0, 1, False), second="greedy", normalize_after_drop=True, note=note)


@case("deepspeed-top2-capacity")
def _(g):
    call = top2(0.8, 1, False)
    return deepspeed(g, "gshard", 2, call, factor=0.8, second="greedy", drop="position", normalize_after_drop=True, note=TOP2)


@case("deepspeed-top2-gumbel")
def _(g):
    note = """The second is drawn by Gumbel-max over all but the first (in evaluation too); its weight is that of the logits
    without noise."""
    call = top2(1.0, 1, True)
    return deepspeed(g, "gshard", 2, call, noise=gumbel, second="gumbel", normalize_after_drop=True, note=note)


@case("deepspeed-top2-gumbel-capacity")
def _(g):
    call = top2(0.5, 5, True)
    keys = {"second": "gumbel", "drop": "position", "normalize_after_drop": True, "min_capacity": 5}
    return deepspeed(g, "gshard", 2, call, factor=0.5, noise=gumbel, note=TOP2 + " min_capacity is what counts.", **keys)


def topk(k, factor, policy):
    def call(x, z, drop):
        return sharded_moe.topkgating(z, k, factor, 1, drop_tokens=drop, drop_policy=policy)

    return call


TOKEN = """drop = "token" is a proposal: each expert keeps its first C tokens, whatever choice of the token it was, while
"position" has all first choices before any second."""

for _k in (2, 3):

    def _plain(g, k=_k):
        note = (
            "called with k = 2 here; DeepSpeed's gate takes top2gating for that, whose aux counts first choices only."
            if k == 2
            else ""
        )
        spec = deepspeed(g, "topk_pre", k, topk(k, 1.0, "probs"), normalize=True, note=note)
        if k == 2:
            spec["config"]["balance"]["convention"] = "senmon"
        return spec

    def _gate(g, k=_k):
        note = "Each expert keeps its largest p, not yet divided by the sum; the division comes after dropping."
        keys = {"drop": "gate", "normalize": True, "normalize_after_drop": True}
        spec = deepspeed(g, "topk_pre", k, topk(k, 0.75, "probs"), factor=0.75, note=note, **keys)
        if k == 2:
            spec["config"]["balance"]["convention"] = "senmon"
        return spec

    def _token(g, k=_k):
        keys = {"drop": "token", "normalize": True, "normalize_after_drop": True}
        spec = deepspeed(g, "topk_pre", k, topk(k, 0.75, "position"), factor=0.75, note=TOKEN, **keys)
        if k == 2:
            spec["config"]["balance"]["convention"] = "senmon"
        return spec

    CASES[f"deepspeed-topk{_k}"] = _plain
    CASES[f"deepspeed-topk{_k}-probs"] = _gate
    CASES[f"deepspeed-topk{_k}-token"] = _token


# Megatron-Core


def megatron(
    g,
    kind,
    k,
    tokens=32,
    experts=8,
    note="",
    bias=False,
    score="softmax",
    pre=False,
    scale=None,
    groups=None,
    spread=1.5,
    drop=None,
    factor=0.0,
    losses=(),
    sequences=1,
    mask=False,
    **keys,
):
    inputs = {"logits": draw_logits(g, tokens, experts, spread)}
    if bias:
        inputs["bias"] = 0.3 * torch.randn(experts, generator=g)
    if mask:
        inputs["mask"] = (torch.rand(tokens, generator=g) < 0.75).to(torch.uint8)
    if sequences > 1:
        inputs["sequences"] = torch.tensor([sequences])
    rank = SimpleNamespace(size=lambda: 1)

    def compute(x):
        z = x["logits"]
        num, top = groups or (None, None)
        probs, picked = moe_utils.topk_routing_with_score_function(
            z,
            k,
            use_pre_softmax=pre,
            num_groups=num,
            group_topk=top,
            scaling_factor=scale,
            score_function=score,
            expert_bias=x.get("bias"),
        )
        kept = picked
        if factor:
            with first_of_ties():
                probs, kept = moe_utils.apply_router_token_dropping(probs, picked, k, factor, drop)
        found = {}
        padding = ~x["mask"].bool() if mask else None
        if "aux" in losses or "sequence" in losses:
            # [S, B] are Megatron's tokens, ours are [B, S]
            layout = z.view(sequences, tokens // sequences, experts).transpose(0, 1).reshape(tokens, experts)
            routing, scores = moe_utils.compute_routing_scores_for_aux_loss(layout, k, score, padding_mask=padding)
            self = SimpleNamespace(
                get_aux_loss_coeff=lambda name: 1.0,
                tp_cp_group=rank,
                topk=k,
                layer_number=1,
                config=SimpleNamespace(num_moe_experts=experts, moe_router_fusion=False, num_layers=1, mtp_num_layers=None),
                attach_and_log_load_balancing_loss=lambda probs, coeff, loss, *_, **__: found.update(loss=loss),
            )
            with replaced(moe_utils, "reduce_from_tensor_model_parallel_region", lambda t, group: t):
                if "sequence" in losses:
                    TopKRouter._apply_seq_aux_loss(self, probs, scores, routing, tokens // sequences, sequences)
                    found["sequence"] = found.pop("loss")
                if "aux" in losses:
                    TopKRouter._apply_aux_loss(self, probs, scores, routing, with_padding_mask=mask)
                    found["aux"] = found.pop("loss")
        if "z" in losses:
            found["z"] = moe_utils.z_loss_func(z, 1.0, padding_mask=padding)
        s = z.detach() if score == "softmax" else z.detach().sigmoid()
        if pre:
            s = s.softmax(1)
        order = s + x["bias"] if bias else s
        if mask:  # Megatron routes padding too; here it has no place
            live = x["mask"].bool()[:, None]
            probs, picked, kept = probs * live, picked & live, kept & live
        return {"weights": probs, "picked": picked, "kept": kept, "order": order, "losses": found}

    router = keys
    if scale:
        router["scale"] = scale
    if groups:
        router |= {"groups": groups[0], "top_groups": groups[1]}
    if factor:
        router["capacity"] = factor
    balance = {}
    if "aux" in losses:
        balance |= {"aux": 0.01, "convention": "megatron"}
    if "sequence" in losses:
        balance["sequence"] = 1e-4
    if bias and balance:
        balance["aux_counts"] = "unbiased"
    if "z" in losses:
        balance["z"] = 1e-3
    return {
        "config": config(experts, k, kind, router, balance),
        "oracle": f"{version('megatron-core')}, moe_utils.topk_routing_with_score_function"
        + (" and apply_router_token_dropping" if factor else "")
        + (", router.TopKRouter's losses with coefficient 1" if losses else ""),
        "note": note,
        "train": True,
        "inputs": inputs,
        "compute": compute,
    }


PRE = "Megatron does not divide by the sum when the softmax comes first."


@case("megatron-pre-k1")
def _(g):
    return megatron(g, "topk_pre", 1, pre=True, normalize=False, losses=("aux", "z"), note=PRE)


@case("megatron-pre-k2-scale")
def _(g):
    return megatron(g, "topk_pre", 2, pre=True, normalize=False, scale=2.5, losses=("aux", "z"), note=PRE)


@case("megatron-pre-k4")
def _(g):
    return megatron(g, "topk_pre", 4, experts=16, pre=True, normalize=False, losses=("aux",), note=PRE)


@case("megatron-pre-groups")
def _(g):
    note = f"{PRE} A group's score is the sum of its top_k // top_groups = 3 // 2 = 1 best: its greatest."
    return megatron(g, "topk_pre", 3, experts=16, pre=True, normalize=False, groups=(4, 2), note=note)


@case("megatron-post-k1")
def _(g):
    return megatron(g, "topk_post", 1, note="The weight is always 1: no gradient.")


for _k in (2, 4):
    CASES[f"megatron-post-k{_k}"] = lambda g, k=_k: megatron(g, "topk_post", k, experts=16, losses=("aux", "z"))


@case("megatron-post-k2-scale")
def _(g):
    return megatron(g, "topk_post", 2, scale=1.7)


@case("megatron-sigmoid-k1")
def _(g):
    return megatron(
        g, "sigmoid_bias", 1, score="sigmoid", bias=True, normalize=False, note="Megatron does not normalise one weight."
    )


@case("megatron-sigmoid-bias")
def _(g):
    note = "aux: f counts the top-k of the sigmoids without bias, P is s over its sum."
    return megatron(g, "sigmoid_bias", 4, experts=16, score="sigmoid", bias=True, scale=2.5, losses=("aux", "z"), note=note)


@case("megatron-sigmoid-bias-groups")
def _(g):
    note = """A group's score is the sum of its top_k / top_groups = 2 best. aux counts the top-k over all experts, groups and
    bias aside."""
    keys = {"score": "sigmoid", "bias": True, "groups": (4, 2), "scale": 2.5, "losses": ("aux",)}
    return megatron(g, "sigmoid_bias", 4, experts=16, note=note, **keys)


SEQUENCE = "Megatron's tokens are [sequence, batch]; here they are one sequence after the other."


@case("megatron-sequence-softmax")
def _(g):
    return megatron(g, "topk_post", 2, tokens=64, losses=("sequence", "aux"), sequences=4, note=SEQUENCE)


@case("megatron-sequence-sigmoid")
def _(g):
    note = SEQUENCE + " f counts the top-k of the sigmoids without bias."
    return megatron(g, "sigmoid_bias", 2, tokens=64, score="sigmoid", bias=True, losses=("sequence",), sequences=4, note=note)


@case("megatron-mask")
def _(g):
    note = "Megatron routes padding like other tokens and leaves it out of its losses only; here padding picks nothing."
    return megatron(g, "topk_post", 2, tokens=48, losses=("aux", "z"), mask=True, note=note)


AFTER = "Weights stay as they were when a token loses an expert. aux counts before drops."


@case("megatron-capacity-probs-post")
def _(g):
    note = f"{AFTER} The largest weights stay, as divided by the sum."
    return megatron(g, "topk_post", 2, factor=0.75, drop="probs", losses=("aux",), note=note)


@case("megatron-capacity-probs-pre")
def _(g):
    return megatron(g, "topk_pre", 2, pre=True, normalize=False, factor=0.75, drop="probs", losses=("aux",), note=AFTER)


@case("megatron-capacity-position-k1")
def _(g):
    return megatron(
        g, "topk_pre", 1, pre=True, normalize=False, factor=0.75, drop="position", losses=("aux",), note=f"{AFTER} {TIES}"
    )


@case("megatron-capacity-token-k2")
def _(g):
    return megatron(g, "topk_post", 2, factor=0.75, drop="position", losses=("aux",), note=f"{AFTER} {TIES} {TOKEN}")


def _drops(name, value):
    """Megatron's drop rule is an argument of `megatron`; the config has our name for it."""
    inner = CASES[name]

    def wrapped(g):
        spec = inner(g)
        spec["config"]["router"]["drop"] = value
        return spec

    CASES[name] = wrapped


_drops("megatron-capacity-probs-post", "gate")
_drops("megatron-capacity-probs-pre", "gate")
_drops("megatron-capacity-position-k1", "position")
_drops("megatron-capacity-token-k2", "token")


def _sinkhorn(g, k, train):
    inputs = {"logits": draw_logits(g, 32, 8)}

    def compute(x):
        z = x["logits"]
        self = SimpleNamespace(topk=k, training=train, config=SimpleNamespace(moe_aux_loss_coeff=0))
        scores, picked = TopKRouter.sinkhorn_load_balancing(self, z)
        with torch.no_grad():
            order = moe_utils.sinkhorn(z.detach()).mul(len(z)) if train else z.detach().softmax(1)
        return {"weights": scores, "picked": picked, "kept": picked, "order": order}

    def check(inputs, results):
        if train and torch.equal(results["experts"], inputs["logits"].topk(k).indices.int()):
            raise Unfit("balancing changes nothing")

    return {
        "config": config(8, k, "sinkhorn", {"normalize": False}, {}),
        "oracle": f"{version('megatron-core')}, router.TopKRouter.sinkhorn_load_balancing",
        "note": """Megatron takes exp(z) as it is, without the row's greatest; the result is the same but for its eps of 1e-8.
        In training slots are by falling balanced score.""",
        "train": train,
        "inputs": inputs,
        "compute": compute,
        "check": check,
    }


for _k in (1, 2):
    for _t in (True, False):
        CASES[f"megatron-sinkhorn-k{_k}-{'train' if _t else 'eval'}"] = lambda g, k=_k, t=_t: _sinkhorn(g, k, t)


@case("megatron-bias-rate")
def _(g):
    load = torch.randint(0, 40, (8,), generator=g)
    bias = 0.1 * torch.randn(8, generator=g)

    def compute(x):
        with (
            replaced(torch.distributed, "all_reduce", lambda *_, **__: None),
            replaced(moe_utils.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None),
        ):
            return {"tensors": {"bias_out": moe_utils.get_updated_expert_bias(load.float(), bias, 1e-3)}}

    return {
        "config": config(8, 2, "sigmoid_bias", {}, {"bias_rate": 1e-3}),
        "oracle": f"{version('megatron-core')}, moe_utils.get_updated_expert_bias",
        "note": "bias [E] and picked_load [E] in, bias_out [E] after one step. The mean is not moved back.",
        "train": True,
        "inputs": {"bias": bias, "picked_load": load},
        "compute": compute,
    }


# fairscale


@case("fairscale-top2")
def _(g):
    inputs = {"logits": draw_logits(g, 32, 8), "noise": gumbel(g, 32, 8)}

    def compute(x):
        z = x["logits"]
        with replaced(fairscale_gate, "gumbel_map", sampler({}, x["noise"])):
            aux, combine, dispatch = fairscale_gate.top2gating(z)
        first = ones(z.detach().argmax(1, keepdim=True), 8)
        second = ones((z.detach() + x["noise"]).masked_fill(first, float("-inf")).argmax(1, keepdim=True), 8)
        order = first + 0.5 * second + 0.01 * z.detach().softmax(1)
        return {
            "weights": combine.sum(2),
            "picked": first | second,
            "kept": dispatch.any(2),
            "order": order,
            "losses": {"aux": aux},
        }

    router = {"second": "gumbel", "normalize_after_drop": True, "capacity": 1.0, "drop": "position"}
    return {
        "config": config(8, 2, "gshard", router, {"aux": 0.01, "convention": "fairscale"}),
        "oracle": f"{version('fairscale')}, top2gate.top2gating",
        "note": """aux is mean(me · ce) with ce of first choices, before drops. Capacity is always 2T/E (rounded down, T a
        multiple of E), in evaluation too. Otherwise as DeepSpeed's top2gating.""",
        "train": True,
        "inputs": inputs,
        "noise": ["noise"],
        "compute": compute,
    }


# mixture-of-experts


def _lucid(g, batch, policy, factor=1.25):
    tokens, experts = 32, 8
    inputs = {"logits": draw_logits(g, batch * tokens, experts)}
    if policy == "random":
        inputs["noise"] = uniform(g, batch * tokens, experts)
    gate = Top2Gating(experts, experts, second_policy_train=policy, capacity_factor_train=factor).train()
    gate.w_gating = torch.nn.Parameter(torch.eye(experts))
    free = Top2Gating(experts, experts, second_policy_train=policy, capacity_factor_train=100.0).train()
    free.w_gating = gate.w_gating
    drawn = torch.Tensor.uniform_

    def compute(x):
        def uniform_(t, a=0.0, b=1.0, **_):
            return t.copy_(x["noise"][:, 0].view(t.shape)) if "noise" in x else drawn(t, a, b)

        with replaced(torch.Tensor, "uniform_", uniform_):
            dispatch, combine, aux = gate(x["logits"].view(batch, tokens, experts))
            picked, _, _ = free(x["logits"].detach().view(batch, tokens, experts))
        flat = lambda t: t.sum(3).view(batch * tokens, experts)
        return {
            "weights": flat(combine),
            "picked": flat(picked) > 0,
            "kept": flat(dispatch) > 0,
            "order": x["logits"].detach().softmax(1),
            "losses": {"aux": aux} if batch == 1 else {},
        }

    router = {"second": "threshold" if policy == "random" else "greedy", "capacity": factor / 2, "drop": "position"}
    if policy == "random":
        router["second_threshold"] = 0.2
    if batch > 1:
        router["group_size"] = tokens
    return {
        "config": config(experts, 2, "gshard", router, {"aux": 0.01, "convention": "deepspeed"} if batch == 1 else {}),
        "oracle": f"{version('mixture-of-experts')}, Top2Gating, second_policy {policy}",
        "note": """Mesh TF's gate. Its capacity factor is for one choice: C = int(T/E · 1.25), at least 4; ours is half of
        that. Weights are divided by the sum (+ 1e-9) before the second is left out and before drops. aux is DeepSpeed's: E ·
        sum of P and the fractions of first choices; for a batch of sequences it is that of each sequence, averaged. The
        package's own policy "threshold" compares without a draw.""",
        "train": True,
        "inputs": inputs,
        "noise": ["noise"] if policy == "random" else [],
        "compute": compute,
    }


CASES["mixture_of_experts-threshold"] = lambda g: _lucid(g, 1, "random")
CASES["mixture_of_experts-threshold-groups"] = lambda g: _lucid(g, 2, "random")
CASES["mixture_of_experts-all"] = lambda g: _lucid(g, 1, "all")


# soft-moe-pytorch


class GatedMlp(torch.nn.Module):
    """down(silu(gate x) · up x), gate_up [2I, D]: Senmon's expert."""

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x):
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


def _soft(g, masked):
    batch, tokens, dim, experts, places, inner = 2, 12, 8, 4, 3, 6
    x = torch.randn(batch, tokens, dim, generator=g)
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    inputs = {
        "x": x,
        "phi": torch.randn(experts, places, dim, generator=g),
        "scale": torch.tensor([3.0]),
        "gate_up": 0.5 * torch.randn(experts, 2 * inner, dim, generator=g),
        "down": 0.5 * torch.randn(experts, dim, inner, generator=g),
    }
    if masked:
        inputs["mask"] = (torch.rand(batch, tokens, generator=g) < 0.7).to(torch.uint8)
    upstream = torch.randn(batch, tokens, dim, generator=g)

    def compute(given):
        module = SoftMoE(dim, num_experts=experts, num_slots=places)
        names = ("phi", "scale", "gate_up", "down")
        leaves = {n: given[n].clone().requires_grad_() for n in names}
        module.slot_embeds = None
        del module.slot_embeds
        module.slot_embeds = leaves["phi"]
        del module.slot_norm.gamma
        module.slot_norm.gamma = leaves["scale"] / dim * torch.ones(dim)
        module.experts.experts = torch.nn.ModuleList(GatedMlp(*p) for p in zip(leaves["gate_up"], leaves["down"]))
        seen = []

        def softmax(t, dim, plain=torch.Tensor.softmax):
            seen.append(plain(t, dim=dim))
            return seen[-1]

        live = given["mask"].bool() if masked else None
        with replaced(torch.Tensor, "softmax", softmax):
            y = module(given["x"], mask=live)
        dispatch, combine = seen
        weigh = upstream * live[..., None] if masked else upstream
        grads = torch.autograd.grad((weigh * y).sum(), list(leaves.values()))
        tensors = {"y": y, "dispatch": dispatch, "combine": combine.view(batch, tokens, experts, places), "upstream": weigh}
        tensors |= {f"grad.{n}": grad for n, grad in zip(names, grads)}
        return {"tensors": {n: t.detach().contiguous() for n, t in tensors.items()}}

    return {
        "config": config(experts, 1, "soft", {"allow_noncausal": True}, {}),
        "oracle": f"{version('soft-moe-pytorch')}, SoftMoE",
        "note": """x [B, N, D], phi [E, S, D] (S slots an expert), scale [1], gate_up [E, 2I, D] and down [E, D, I] (silu(gate)
        · up); dispatch and combine [B, N, E, S], y [B, N, D]; grad.* of sum(upstream · y). The package also feeds the
        normalised x to the experts, where the paper feeds x: rows of x here have root mean square 1, so both are the same. Its
        scale is by dimension, after RMS norms: here scale / D in all of them, which is the paper's. """
        + ("mask [B, N]: padding is out of every slot; y of padding is not defined, and its upstream is 0." if masked else ""),
        "train": True,
        "inputs": inputs,
        "compute": compute,
    }


CASES["soft_moe_pytorch"] = lambda g: _soft(g, False)
CASES["soft_moe_pytorch-mask"] = lambda g: _soft(g, True)


# transformers


def hf(
    g,
    module,
    cfg,
    kind,
    k,
    tokens=32,
    experts=8,
    bias=None,
    note="",
    router=None,
    order="softmax",
    spread=1.5,
    read=None,
    extra=None,
    train=False,
    **tables,
):
    """A router module of transformers that returns (logits, weights [T, K], indices [T, K])."""
    inputs = {"logits": draw_logits(g, tokens, experts, spread)}
    if bias is not None:
        inputs["bias"] = 0.3 * torch.randn(experts, generator=g)
    inputs |= extra(g) if extra else {}
    names = {"hidden_size": experts, "num_experts_per_tok": k, "num_experts": experts, "num_local_experts": experts}

    def compute(x):
        m = module(SimpleNamespace(**(names | cfg)))
        weight = m.classifier if hasattr(m, "classifier") else m
        weight.weight = torch.nn.Parameter(torch.eye(experts), requires_grad=False)
        if hasattr(m, "bias") and m.bias is not None:
            m.bias.data.zero_()
        if bias is not None:
            target = m.get_buffer(bias) if bias in dict(m.named_buffers()) else m.get_parameter(bias)
            target.data.copy_(x["bias"].view(target.shape))
        z = x["logits"]
        logits, weights, index = read(m, x) if read else m(z)
        assert torch.equal(logits, z)
        s = {"softmax": z.softmax(1), "sigmoid": z.sigmoid(), "sqrt_softplus": F.softplus(z).sqrt(), "logits": z}[
            order
        ].detach()
        picked = ones(index, experts)
        dense = torch.zeros_like(z).scatter(1, index.long(), weights)
        return {"weights": dense, "picked": picked, "kept": picked, "order": s + x.get("bias", 0)}

    special = tables.pop("special", {})
    spec = {
        "config": config(experts - sum(special.values()), k, kind, router or {}, tables, special),
        "oracle": f"{version('transformers')}, {module.__name__}",
        "note": note,
        "train": train,
        "inputs": inputs,
        "compute": compute,
    }
    return spec


@case("transformers-mixtral")
def _(g):
    return hf(g, MixtralTopKRouter, {}, "topk_post", 2, note="Written as softmax, top-k, division by the sum.")


@case("transformers-qwen3_moe")
def _(g):
    return hf(g, Qwen3MoeTopKRouter, {"norm_topk_prob": True}, "topk_pre", 4, experts=16, router={"normalize": True})


@case("transformers-olmoe")
def _(g):
    return hf(g, OlmoeTopKRouter, {"norm_topk_prob": False}, "topk_pre", 4, experts=16, router={"normalize": False})


@case("transformers-gpt_oss")
def _(g):
    return hf(g, GptOssTopKRouter, {}, "topk_post", 4, experts=16, order="logits", note="The router's own bias is 0 here.")


@case("transformers-deepseek_v2")
def _(g):
    cfg = {"routed_scaling_factor": 2.0, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    router = {"normalize": False, "scale": 2.0, "groups": 4, "top_groups": 2, "group_mask": "zero"}
    return hf(
        g, DeepseekV2TopkRouter, cfg, "topk_pre", 3, experts=16, router=router, note="Groups are ranked by their greatest p."
    )


def _v3(g, module, k, groups, top, norm, scale):
    cfg = {"routed_scaling_factor": scale, "n_group": groups, "topk_group": top, "norm_topk_prob": norm}
    router = {"normalize": norm, "scale": scale, "groups": groups, "top_groups": top}
    note = "Groups are ranked by the sum of their two greatest s + b, whatever top_k is."
    return hf(
        g, module, cfg, "sigmoid_bias", k, experts=16, bias="e_score_correction_bias", router=router, order="sigmoid", note=note
    )


CASES["transformers-deepseek_v3"] = lambda g: _v3(g, DeepseekV3TopkRouter, 4, 4, 2, True, 2.5)
CASES["transformers-dots1"] = lambda g: _v3(g, Dots1TopkRouter, 3, 2, 1, False, 1.5)


@case("transformers-ernie4_5_moe")
def _(g):
    note = "least_sum is moe_norm_min, here so great that it counts for some tokens; published checkpoints have 1e-12."
    bias = "moe_statics.e_score_correction_bias"
    router = {"least_sum": 0.5}
    return hf(g, Ernie4_5_MoeTopKRouter, {"moe_norm_min": 0.5}, "softmax_bias", 2, bias=bias, router=router, note=note)


@case("transformers-deepseek_v4")
def _(g):
    cfg = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}
    keys = {"bias": "e_score_correction_bias", "router": {"scale": 1.5}, "order": "sqrt_softplus"}
    return hf(g, DeepseekV4TopKRouter, cfg, "sqrt_softplus", 3, **keys)


@case("transformers-deepseek_v4-hash")
def _(g):
    vocab, k, experts = 20, 2, 8
    cfg = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "vocab_size": vocab}

    def extra(g):
        table = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(vocab)])
        return {"token_ids": torch.randint(0, vocab, (32,), generator=g), "table": table}

    def read(m, x):
        m.tid2eid.copy_(x["table"])
        return m(x["logits"], x["token_ids"])

    note = """table [V, K] gives the experts of a token id. DeepSeek-V4 weighs them by the router's scores, over their sum;
    Hash Layers (2106.04426) have weight 1."""
    keys = {"router": {"scale": 1.5, "hash_score": "sqrt_softplus"}, "order": "sqrt_softplus", "extra": extra, "read": read, "note": note}
    return hf(g, DeepseekV4HashRouter, cfg, "hash", k, **keys)


@case("transformers-longcat_flash")
def _(g):
    cfg = {"n_routed_experts": 8, "zero_expert_num": 4, "routed_scaling_factor": 1.5}
    note = "Expert ids from 8 are identity experts. The weights are not divided by their sum."
    keys = {"bias": "e_score_correction_bias", "router": {"normalize": False, "scale": 1.5}, "special": {"identity": 4}}
    return hf(g, LongcatFlashTopkRouter, cfg, "softmax_bias", 3, experts=12, note=note, **keys)


for _k in (1, 2):

    def _llama(g, k=_k):
        def read(m, x):
            scores, logits = m(x["logits"])
            index = logits.topk(k).indices
            assert torch.equal(scores > 0, ones(index, 8))
            return logits, scores.gather(1, index), index

        return hf(
            g, Llama4Router, {}, "sigmoid_input", k, order="logits", read=read, note="The weight multiplies the expert's input."
        )

    CASES[f"transformers-llama4-k{_k}"] = _llama


@case("transformers-switch_transformers")
def _(g):
    batch, length, experts, places = 3, 16, 4, 3
    inputs = {"logits": draw_logits(g, batch * length, experts)}
    cfg = SimpleNamespace(
        num_experts=experts,
        expert_capacity=places,
        hidden_size=experts,
        router_bias=False,
        router_jitter_noise=0.0,
        router_ignore_padding_tokens=False,
        router_dtype="float32",
    )
    m = switch_transformers.SwitchTransformersTop1Router(cfg).eval()
    m.classifier.weight = torch.nn.Parameter(torch.eye(experts), requires_grad=False)

    def compute(x):
        z = x["logits"]
        index, probs, _ = m(z.view(batch, length, experts))
        kept = index.view(-1, experts).bool()
        picked = ones(z.argmax(1, keepdim=True), experts)
        return {"weights": probs.view(-1, 1) * kept, "picked": picked, "kept": kept, "order": z.detach().softmax(1)}

    router = {"eval_capacity": 0.75, "group_size": length, "drop": "position"}
    return {
        "config": config(experts, 1, "switch", router, {}),
        "oracle": f"{version('transformers')}, SwitchTransformersTop1Router",
        "note": "expert_capacity is 3 for each sequence of 16, in training and evaluation: the same as a factor of 0.75.",
        "train": False,
        "inputs": inputs,
        "compute": compute,
    }


@case("transformers-switch_transformers-losses")
def _(g):
    inputs = {f"logits.{i}": draw_logits(g, 24, 4) for i in range(3)}

    def compute(x):
        leaves = [x[f"logits.{i}"] for i in range(3)]
        joined = torch.cat([z[None] for z in leaves], dim=1)
        losses = {
            "aux": switch_transformers.load_balancing_loss_func(joined.softmax(-1), joined.argmax(-1)),
            "z": switch_transformers.router_z_loss_func(joined),
        }
        return {"tensors": layered(losses, leaves)}

    return {
        "config": config(4, 1, "switch", {}, {"aux": 0.01, "z": 1e-3, "convention": "huggingface"}),
        "oracle": f"{version('transformers')}, switch_transformers load_balancing_loss_func and router_z_loss_func",
        "note": """Three layers of one sequence, joined as the model does; counts are before drops. For a batch, the model's
        aux is that of each sequence, averaged. Encoder and decoder each have a loss of their own; both are added.""",
        "train": True,
        "inputs": inputs,
        "compute": compute,
    }


def layered(losses, leaves):
    """Losses over layers and their gradients: grad.<name>.<layer>."""
    tensors = {}
    for name, loss in losses.items():
        tensors[f"loss.{name}"] = loss.detach().reshape(1).float()
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        tensors |= {f"grad.{name}.{i}": grad.float() for i, grad in enumerate(grads)}
    return tensors


def _balancing(g, masked):
    experts, k = 8, 2
    inputs = {f"logits.{i}": draw_logits(g, 32, experts) for i in range(3)}
    if masked:
        inputs["mask"] = (torch.rand(32, generator=g) < 0.75).to(torch.uint8)
        inputs["sequences"] = torch.tensor([2])

    def compute(x):
        leaves = [x[f"logits.{i}"] for i in range(3)]
        mask = x["mask"].view(2, 16) if masked else None
        return {"tensors": layered({"aux": load_balancing_loss_func(tuple(leaves), experts, k, mask)}, leaves)}

    return {
        "config": config(experts, k, "topk_post", {}, {"aux": 0.01, "convention": "huggingface"}),
        "oracle": f"{version('transformers')}, mixtral load_balancing_loss_func",
        "note": "Three layers: logits.N [T, E] of layer N, grad.aux.N. The tokens of all layers are joined, times k.",
        "train": True,
        "inputs": inputs,
        "compute": compute,
    }


CASES["transformers-load_balancing"] = lambda g: _balancing(g, False)
CASES["transformers-load_balancing-mask"] = lambda g: _balancing(g, True)


def _phimoe(g, train):
    tokens, experts, eps = 32, 8, 0.2
    inputs = {"logits": draw_logits(g, tokens, experts)}
    if train:
        exponential = lambda: -torch.rand(tokens, experts, generator=g).clamp(1e-6, 0.999).log()
        inputs |= {"noise": exponential(), "noise2": exponential(), "keep": torch.rand(tokens, 2, generator=g)}

    def compute(x):
        draws, keeps = [x.get("noise"), x.get("noise2")], [0, 1]

        def exponential_(t, *_, **__):
            return t.copy_(draws.pop(0))

        def rand_like(t, *_, **__):
            n = keeps.pop(0)
            return x["keep"][:, n : n + 1].clone()

        z = x["logits"]
        with (
            replaced(torch.Tensor, "exponential_", exponential_),
            replaced(torch, "rand_like", rand_like),
            replaced(torch.Tensor, "uniform_", lambda t, *_, **__: t),
        ):
            weights, index = sparsemixer(z, eps, train)
        dense = torch.zeros_like(z).scatter(1, index, weights)
        order = torch.zeros_like(z).scatter(1, index, torch.tensor([[2.0, 1.0]]).expand(tokens, 2))
        picked = ones(index, experts)
        return {"weights": dense, "picked": picked, "kept": picked, "order": order}

    note = f"Slots in the order of picking. eps is {eps}, so that the masks matter; published checkpoints have 0.01."
    if train:
        note += """ A pick is the argmax over the masked logits of z - log(draw): noise [T, E] are the exponential draws of the
        first pick, noise2 [T, E] of the second. keep [T, 2] are the uniform draws: the weight of a pick is p where it is the
        greatest of its softmax or keep > 0.75, else p times 0.3333; the gradient is d weight = p · d log p, as if not scaled
        (PhimoeMultiplier)."""

    def check(inputs, results):
        kept = (results["weights"] < 0.999).float().mean()
        if kept < 0.3:
            raise Unfit("weights of 1")
        if train and results["experts"].sort(1).values.equal(inputs["logits"].topk(2).indices.int().sort(1).values):
            raise Unfit("draws change nothing")
        if train and ((inputs["keep"] - 0.75).abs().min() < 1e-4 or inputs["keep"].max() < 0.8 or inputs["keep"].min() > 0.7):
            raise Unfit("keep near its threshold, or all on one side")

    return {
        "config": config(experts, 2, "sparsemixer", {"sparsemixer_eps": eps}, {}),
        "oracle": f"{version('transformers')}, phimoe sparsemixer, {'training' if train else 'evaluation'}",
        "note": note,
        "train": train,
        "inputs": inputs,
        "noise": ["noise", "noise2"] if train else [],
        "compute": compute,
        "check": check,
    }


CASES["transformers-phimoe-eval"] = lambda g: _phimoe(g, False)
CASES["transformers-phimoe-train"] = lambda g: _phimoe(g, True)


def nllb(g, policy, priority, before, places=5, masked=False, note=""):
    tokens, experts = 32, 8
    inputs = {"logits": draw_logits(g, tokens, experts)}
    if policy == "sampling":
        inputs["noise"] = gumbel(g, tokens, experts)
    if masked:
        inputs["mask"] = (torch.rand(tokens, generator=g) < 0.8).to(torch.uint8)

    def router(capacity):
        cfg = SimpleNamespace(
            num_experts=experts,
            expert_capacity=capacity,
            hidden_size=experts,
            router_bias=False,
            router_dtype="float32",
            router_ignore_padding_tokens=False,
            second_expert_policy=policy,
            normalize_router_prob_before_dropping=before,
            batch_prioritized_routing=priority,
            moe_eval_capacity_token_fraction=-1.0,
        )
        return NllbMoeTop2Router(cfg).train()

    def compute(x):
        z = x["logits"]
        padding = 1 - x["mask"].long() if masked else None
        with replaced(torch.distributions.gumbel.Gumbel, "rsample", lambda self, shape: x["noise"].view(shape)):
            _, weights = router(places).route_tokens(z.clone(), padding_mask=padding)
            _, free = router(10**6).route_tokens(z.detach().clone(), padding_mask=padding)
        first = z.detach().softmax(1)
        order = first + ones(first.argmax(1, keepdim=True), experts)
        return {"weights": weights, "picked": free > 0, "kept": weights > 0, "order": order}

    keys = {"second": "gumbel" if policy == "sampling" else "greedy", "capacity": places * experts / (2 * tokens)}
    keys |= {"drop": "priority" if priority else "position", "normalize_after_drop": not before}
    spec = {
        "config": config(experts, 2, "gshard", keys, {}),
        "oracle": f"{version('transformers')}, NllbMoeTop2Router.route_tokens",
        "note": f"expert_capacity is {places}. {note}",
        "train": True,
        "inputs": inputs,
        "noise": ["noise"] if policy == "sampling" else [],
        "compute": compute,
    }
    if masked:
        live = int(inputs["mask"].sum())

        def check(inputs, results):
            if capacity_of(keys["capacity"], 2, live, experts) != places:
                raise Unfit("capacity with and without padding")

        spec["check"] = check
    return spec


PRIORITY = """Batch-prioritised: all first choices before any second, and within each the tokens by falling greatest p (the
same in V-MoE's code)."""

CASES["transformers-nllb_moe-priority"] = lambda g: nllb(g, "all", True, False, note=PRIORITY)
CASES["transformers-nllb_moe-priority-before"] = lambda g: nllb(g, "all", True, True, note=PRIORITY)
CASES["transformers-nllb_moe-position"] = lambda g: nllb(g, "all", False, True)
CASES["transformers-nllb_moe-sampling"] = lambda g: nllb(g, "sampling", False, False)
CASES["transformers-nllb_moe-mask"] = lambda g: nllb(g, "all", False, True, masked=True, note="Padding takes no place.")
