"""The Detailer Head in PyTorch, channels last, eager and compiled. Started by `bench-head --peer`; see peer.py."""

from __future__ import annotations

import torch

from peer import Context, Way, random_weights, serve, use_fixtures

use_fixtures()

from pixel_model import LAYOUTS, PUBLISHED_WIDTHS, DetailerHead  # noqa: E402


def make(case: dict, context: Context) -> dict[str, Way]:
    layout, side, sets = case["head"], case["side"], case["sets"]
    widths = (8,) * len(LAYOUTS[layout].stages) if case["tiny"] else PUBLISHED_WIDTHS[layout]
    with context.device:
        head = DetailerHead(layout, widths, 16 if case["tiny"] else 512, case["context"])
    head = random_weights(head.to(context.dtype), context).to(memory_format=torch.channels_last)
    cells = side // LAYOUTS[layout].patch
    inputs = []
    for _ in range(sets):
        image = context.normal(1, 3, side, side).contiguous(memory_format=torch.channels_last)
        # As the trunk's tokens give it.
        features = context.normal(1, cells, cells, case["context"]).permute(0, 3, 1, 2)
        inputs.append((image, features))

    ways = {"eager": Way(lambda index: head(*inputs[index]), sets)}
    if context.compile:
        compiled = context.compiled(head)
        ways["compiled"] = Way(lambda index: compiled(*inputs[index]), sets)
    return ways


if __name__ == "__main__":
    serve(make)
