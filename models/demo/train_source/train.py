#!/usr/bin/env python3
"""Trains the demo source model: a small latent text-to-image model with Z-Image's structure, on 3D emoji.

First the autoencoder, then transformer and text encoder together by flow matching on its latents. Every phase is
bounded by wall-clock time. Below --out it leaves source.tar.00 … (the model in the diffusers layout), log.jsonl,
contact.png (dataset picture and two samples of every prompt) and references.png (the dataset pictures alone).
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# How long to wait for the warm-up process once the autoencoder is trained.
WARM_UP_PATIENCE = 20
SMOKE_DEFAULTS = {
    "vae_seconds": 25.0,
    "dit_seconds": 25.0,
    "total_seconds": 110.0,
    "vae_batch": 4,
    "dit_batch": 8,
    "images": 48,
    "warmup": 10,
    "log_every": 10,
    "evaluate": 64,
    "sample_steps": 4,
    "compile": False,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=Path(".demo-pack"), help="data pack of prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, created if need be")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo-source"), help="folder for the unpacked model")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--vae-seconds", type=float, default=105.0)
    parser.add_argument("--dit-seconds", type=float, default=400.0, help="upper bound; --total-seconds rules")
    parser.add_argument("--total-seconds", type=float, default=540.0, help="from the start of the program to its end")
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--vae-lr", type=float, default=1e-3)
    parser.add_argument("--dit-batch", type=int, default=320)
    parser.add_argument("--dit-lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps over which the learning rates rise")
    parser.add_argument("--images", type=int, help="use only so many images")
    parser.add_argument("--evaluate", type=int, default=2048, help="images in the fixed set that the loss is taken on")
    parser.add_argument("--cfg", type=float, default=2.5)
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--warm-up-only", action="store_true", help="only compile the transformer's step into the cache"
    )
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on the CPU, in about two minutes")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE_DEFAULTS)
    return parser.parse_args()


def start_warm_up(args: argparse.Namespace) -> subprocess.Popen:
    """Compiles the transformer's training step while the autoencoder trains, in a process of its own.

    The compiler keeps its work on disk, where the main process finds it when it comes to that step.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--warm-up-only", "--out", str(args.work / "warm-up")]
    return subprocess.Popen(command)


def finish_warm_up(process: subprocess.Popen) -> str:
    """Waits a little; without the warm-up the main process compiles for itself."""
    try:
        return "ok" if process.wait(WARM_UP_PATIENCE) == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "too slow"


def main() -> None:
    start = time.monotonic()
    args = parse_arguments()
    warm_up = start_warm_up(args) if args.compile and not args.warm_up_only else None
    # Late, because these imports take long: they count against --total-seconds, and the warm-up runs beside them.
    from run import Run, warm_up_only

    if args.warm_up_only:
        warm_up_only(args, start)
        return
    run = Run(args, start)
    run.check()
    latents = run.train_vae()
    if warm_up:
        run.log.write("warm-up", result=finish_warm_up(warm_up))
    run.train_flow(latents)
    run.show()


if __name__ == "__main__":
    main()
