"""The operations of `bench-elementwise`, eager and compiled. Started by `bench-elementwise --peer`; see peer.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peer import Context, Way, serve

HEAD_DIM = 128
EPSILON = 1e-5


def norm(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON) * (1 + table[:, 0:1])


def qk_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor):
    heads = qkv.unflatten(-1, (3, -1, HEAD_DIM))

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, (HEAD_DIM,), weight, EPSILON).float().unflatten(-1, (-1, 2))
        a, b = x.unbind(-1)
        cos, sin = table.unsqueeze(2).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(qkv.dtype)

    return rotated(heads[:, :, 0], q_weight), rotated(heads[:, :, 1], k_weight)


def gated_residual_rms_norm(x: Tensor, y: Tensor, weight: Tensor, next_weight: Tensor, table: Tensor):
    x = x + table[:, 1:2].tanh() * F.rms_norm(y, y.shape[-1:], weight, EPSILON)
    return x, norm(x, next_weight, table)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def layer_norm_modulate(x: Tensor, table: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + table[:, 0:1])


def concat_tokens(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat((x, y), 1)


def patch_embed(image: Tensor, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    grid = image.shape[1] // patch
    patches = image.view(1, grid, patch, grid, patch, 3).transpose(2, 3).reshape(1, grid * grid, -1)
    return F.linear(patches, weight, bias)


def patch_embed_16(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return patch_embed(image, weight, bias, 16)


def patch_embed_64(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return patch_embed(image, weight, bias, 64)


def cast(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def guided_euler_step(x: Tensor, velocity: Tensor, factors: Tensor) -> Tensor:
    return x.mul_(factors[0]).add_(velocity * factors[1])


def to_rgb8(x: Tensor) -> Tensor:
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))


def unpatchify(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return -tokens.view(1, side, side, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(1, 16, 2 * side, 2 * side).float()


def inputs(case: dict, context: Context) -> list[Tensor]:
    """Random inputs, of the shapes that bench/src/elementwise.rs names."""
    op, normal = case["op"], context.normal
    if "tokens" in case:
        tokens, dim = case["tokens"], case["heads"] * HEAD_DIM

        # Modulation in the activations' type, as the published pipeline has it.
        def table() -> Tensor:
            return normal(1, 4, dim)

        return {
            "qk_norm_rope": lambda: [
                normal(1, tokens, 3 * dim),
                normal(HEAD_DIM),
                normal(HEAD_DIM),
                normal(1, tokens, HEAD_DIM // 2, 2, dtype=torch.float32),
            ],
            "rms_norm_modulate": lambda: [normal(1, tokens, dim), normal(dim), table()],
            "gated_residual_rms_norm": lambda: [
                normal(1, tokens, dim), normal(1, tokens, dim), normal(dim), normal(dim), table(),
            ],
            "swiglu": lambda: [normal(1, tokens, 2 * case["ffn"])],
            "layer_norm_modulate": lambda: [normal(1, tokens, dim), table()],
            "concat_tokens": lambda: [normal(1, tokens, dim), normal(1, 96, dim)],
        }[op]()  # fmt: skip
    side, dim = case["image"], case["dim"]

    def picture(side: int = side, dtype: torch.dtype | None = torch.float32) -> Tensor:
        return normal(1, side, side, 3, dtype=dtype)

    def embedding(patch: int, side: int) -> list[Tensor]:
        return [picture(side, None), normal(dim, patch * patch * 3), normal(dim)]

    return {
        "patch_embed_16": lambda: embedding(16, side // 4),
        "patch_embed_64": lambda: embedding(64, side),
        "cast": lambda: [picture()],
        "guided_euler_step": lambda: [picture(), picture(), normal(2, dtype=torch.float32)],
        "to_rgb8": lambda: [picture()],
        "group_norm": lambda: [
            normal(1, max(side // 8, 8), max(side // 8, 8), 256).permute(0, 3, 1, 2), normal(256), normal(256),
        ],
        "unpatchify": lambda: [normal(1, (side // 16) ** 2, 64)],
    }[op]()  # fmt: skip


def make(case: dict, context: Context) -> dict[str, Way]:
    function: Callable = globals()[case["op"]]
    sets = [inputs(case, context) for _ in range(case["sets"])]
    ways = {"eager": Way(lambda index: function(*sets[index]), len(sets))}
    if context.compile:
        compiled = context.compiled(function)
        ways["compiled"] = Way(lambda index: compiled(*sets[index]), len(sets))
    return ways


if __name__ == "__main__":
    serve(make)
