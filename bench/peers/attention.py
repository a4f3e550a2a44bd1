"""scaled_dot_product_attention, by cuDNN and by flash. Started by `bench-attention --peer`; see peer.py."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from peer import Context, Way, serve


def make(case: dict, context: Context) -> dict[str, Way]:
    shape = (1, case["heads"], case["tokens"], case["head_dim"])
    inputs = [[context.normal(*shape) for _ in range(3)] for _ in range(case["sets"])]

    def call(index: int):
        return F.scaled_dot_product_attention(*inputs[index])

    backends = ["cudnn", "flash"] if context.cuda else ["default"]
    return {name: Way(call, case["sets"], partial(context.attention, name)) for name in backends}


if __name__ == "__main__":
    serve(make)
