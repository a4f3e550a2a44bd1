"""A set of pictures by diffusers' own pipeline: prompts in, PNG files out, as many at once as asked for.

    python bench/peers/synthesize.py --model DIR --prompts FILE.jsonl --out DIR --pictures N --batch N --side N --steps N

Started by `bench-synthesize --peer`. Files are written by as many threads as there are processors, while the next batch is drawn; the
first batch warms up and does not count. Prints one JSON object. Without guidance, which is `guidance_scale` 0 of this pipeline.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import torch
from diffusers import ZImagePipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("pictures", "batch", "side", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    pipeline = ZImagePipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.compile:
        pipeline.transformer.compile_repeated_blocks()
    prompts = [json.loads(line)["prompt"] for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
    arguments.out.mkdir(parents=True, exist_ok=True)

    def draw(first: int) -> list:
        chosen = [prompts[index % len(prompts)] for index in range(first, first + arguments.batch)]
        generators = [torch.Generator("cpu").manual_seed(index) for index in range(first, first + arguments.batch)]
        result = pipeline(
            prompt=chosen, height=arguments.side, width=arguments.side, num_inference_steps=arguments.steps, guidance_scale=0.0,
            generator=generators,
        )  # fmt: skip
        return result.images

    with ThreadPoolExecutor(os.cpu_count()) as writers:
        def write(first: int, pictures: list) -> list:
            places = [arguments.out / f"{first + index:06}.png" for index in range(len(pictures))]
            return [writers.submit(picture.save, place) for picture, place in zip(pictures, places)]

        for waiting in write(0, draw(0)):
            waiting.result()
        start, rest = time.perf_counter(), []
        for first in range(arguments.batch, arguments.pictures, arguments.batch):
            rest += write(first, draw(first))
        for waiting in rest:
            waiting.result()
        seconds = time.perf_counter() - start
    print(json.dumps({
        "pictures": len(rest), "seconds": seconds, "pictures_per_second": len(rest) / seconds, "batch": arguments.batch,
        "compiled": arguments.compile, "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
