"""Linear layers. Started by `bench-gemm --peer`; see peer.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peer import Context, Way, serve


def make(case: dict, context: Context) -> dict[str, Way]:
    m, n, k, sets = case["m"], case["n"], case["k"], case["sets"]
    inputs = [(context.normal(m, k), context.normal(n, k), context.normal(n) if case["bias"] else None) for _ in range(sets)]

    def linear(index: int):
        return F.linear(*inputs[index])

    def mm(index: int):
        x, weight, bias = inputs[index]
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    return {"linear": Way(linear, sets), "mm": Way(mm, sets)}


if __name__ == "__main__":
    serve(make)
