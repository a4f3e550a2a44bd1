"""Training on several GPUs in PyTorch: the peer of `bench-train --ranks`. One process per GPU, as torchrun starts them:

    torchrun --nproc-per-node 2 bench/peers/ranks.py --side 1024 --policy released --out peers.json

The step is that of train.py (bf16 weights with f32 masters, eager, cuDNN's attention), on one picture per GPU: alone on each GPU; with
DistributedDataParallel, whose reducer sends gradients while the backward pass goes on; and with that and ZeroRedundancyOptimizer,
which divides AdamW's state among ranks. Times are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from peer import use_fixtures

use_fixtures()

from pixel_model import freeze  # noqa: E402
from train import OPTIMIZER, Trainer, build, cudnn_attention, pixel_config, random_batch  # noqa: E402

WARM_STEPS = 3


class ZeroTrainer(Trainer):
    """The same with a divided state."""

    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__(model, names)
        fused = {"fused": True} if self.weights[0].is_cuda else {}
        self.optimizer = ZeroRedundancyOptimizer(self.masters, torch.optim.AdamW, **OPTIMIZER, **fused)


def measure(way: str, arguments: argparse.Namespace, device: torch.device) -> dict:
    cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(1)
    config = pixel_config(arguments.model, arguments.tiny)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build(config, device, dtype, generator)
    policy, _, ends = arguments.policy.partition(":")
    names = list(freeze(model, policy, int(ends or 5)))
    trainer = (ZeroTrainer if way == "zero" else Trainer)(model, names)
    normal = partial(torch.randn, device=device, generator=generator)
    batch = random_batch(config, arguments.side, arguments.caption, lambda *shape: normal(shape))
    # Pad tokens that nothing is padded with have no gradient, the same in every step.
    options = {"gradient_as_bucket_view": True, "static_graph": True}
    runs = model if way == "alone" else DistributedDataParallel(model, **options)

    def step() -> float:
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        with cudnn_attention():
            loss = batch.loss(runs, dtype)
            loss.backward()
        trainer.step()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e3

    for _ in range(WARM_STEPS):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    own = [step() for _ in range(arguments.repeats)]
    slowest = torch.tensor(own, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {"name": way, "samples_ms": slowest.tolist(), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pixel-1k")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--caption", type=int, default=96)
    parser.add_argument("--policy", default="released")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # As in the other runs: no multicast over NVLink.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    found = []
    for way in ("alone", "ddp", "zero"):
        try:
            found.append(measure(way, arguments, device))
        except torch.OutOfMemoryError as error:
            found.append({"name": way, "samples_ms": [], "peak_bytes": 0, "failure": str(error).splitlines()[0]})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "ways": found}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
