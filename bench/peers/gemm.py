"""Linear layers, by themselves and with what follows them. Started by `bench-gemm --peer`; see peer.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from elementwise import HEAD_DIM, qk_norm_rope, swiglu
from peer import Context, Way, serve


def plain(case: dict, context: Context) -> dict[str, Way]:
    m, n, k, sets = case["m"], case["n"], case["k"], case["sets"]
    inputs = [(context.normal(m, k), context.normal(n, k), context.normal(n) if case["bias"] else None) for _ in range(sets)]

    def linear(index: int):
        return F.linear(*inputs[index])

    def mm(index: int):
        x, weight, bias = inputs[index]
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    return {"linear": Way(linear, sets), "mm": Way(mm, sets)}


def followed(case: dict, context: Context) -> dict[str, Way]:
    """A layer and the operation on its result."""
    m, n, k, sets = case["m"], case["n"], case["k"], case["sets"]
    norms = [context.normal(HEAD_DIM) for _ in range(2)]
    table = context.normal(1, m, HEAD_DIM // 2, 2, dtype=torch.float32)
    inputs = [(context.normal(1, m, k), context.normal(n, k)) for _ in range(sets)]
    then: dict[str, Callable[[Tensor], object]] = {"swiglu": swiglu, "qk_norm_rope": lambda qkv: qk_norm_rope(qkv, *norms, table)}

    def layer(x: Tensor, weight: Tensor):
        return then[case["then"]](F.linear(x, weight))

    ways = {"eager": Way(lambda index: layer(*inputs[index]), sets)}
    if context.compile:
        compiled = context.compiled(layer)
        ways["compiled"] = Way(lambda index: compiled(*inputs[index]), sets)
    return ways


def make(case: dict, context: Context) -> dict[str, Way]:
    return followed(case, context) if "then" in case else plain(case, context)


if __name__ == "__main__":
    serve(make)
