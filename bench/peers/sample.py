"""Whole pictures in PyTorch: every step, the decoder's work for latents, and the bytes on the host.

Started by `bench-sample --peer`; see peer.py. The models are those of step.py: diffusers' transformer and autoencoder, the
pixel model of tests/fixtures. The caption's features are there already, and nothing is written to disk: the benchmark compares
with its own time for the same parts. Attention is cuDNN's; pictures are made compiled too where that was asked for.
"""

from __future__ import annotations

import torch

from peer import Context, Way, serve
from step import Decoder, drawing

#: As bench/src/sample.rs has it; it changes no time.
SHIFT = 4.0


def sigmas(steps: int) -> list[float]:
    """From noise to image, both ends included."""
    uniform = [1 - step / steps for step in range(steps)] + [0.0]
    return [SHIFT * u / (1 + (SHIFT - 1) * u) for u in uniform]


def make(case: dict, context: Context) -> dict[str, Way]:
    drawn = drawing(case, context)
    decoder = Decoder(case, context) if case["model"].startswith("latent") else None
    noise, schedule = drawn.image, sigmas(case["steps"])
    times = [torch.tensor([1 - sigma], device=context.device) for sigma in schedule]

    def picture(_: int) -> torch.Tensor:
        image = noise.clone()
        for time, sigma, following in zip(times, schedule, schedule[1:]):
            image.add_(drawn.velocity(image.to(context.dtype), time).float(), alpha=following - sigma)
        if decoder:
            image = decoder(image.to(context.dtype))
        pixels = ((image.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu()

    return {name: way for name, way in drawn.ways(picture).items() if name.endswith("cudnn")}


if __name__ == "__main__":
    serve(make)
