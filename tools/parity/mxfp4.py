"""MXFP4, in which gpt_oss is published: 32 values share a power of two, each is one of sixteen.

`quantise(weights)` rounds [..., 32 n] to (blocks [..., n, 16] u8, scales [..., n] u8); `dequantise` is its inverse. A byte has
two values, the first in its low half; a scale of 127 is one.
"""

import torch

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def quantise(weights):
    """The nearest values, under the power of two that brings the largest of a block to between 4 and 8."""
    groups = weights.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    scaled = groups / exponent.exp2()[..., None]
    codes = (scaled[..., None] - VALUES).abs().argmin(-1)
    pairs = codes.unflatten(-1, (16, 2))
    blocks = pairs[..., 0] | pairs[..., 1] << 4
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8)


def dequantise(blocks, scales):
    """f32 [..., 32 n]."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    return (VALUES[codes] * (scales.float() - 127).exp2()[..., None]).flatten(-2)


def packed(experts):
    """{name: tensor} for the fused weights [E, in, out] of a gpt_oss `experts` module, as published: [E, out, in / 32, ...]."""
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = quantise(getattr(experts, name).transpose(1, 2))
        found[f"{name}_blocks"], found[f"{name}_scales"] = blocks.contiguous(), scales.contiguous()
    return found


@torch.no_grad()
def round_experts(model):
    """Makes the expert weights of a gpt_oss model such that `packed` loses nothing."""
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            for name in ("gate_up_proj", "down_proj"):
                weights = getattr(module, name)
                weights.copy_(dequantise(*quantise(weights.transpose(1, 2))).transpose(1, 2))
