#!/usr/bin/env python3
"""Trains the demo source model: a small latent text-to-image model with Z-Image's structure, on 3D emoji.

First the autoencoder, then transformer and text encoder together by flow matching on its latents. Every phase is
bounded by wall-clock time. Below --out it leaves source.tar.00 … (the model in the diffusers layout), log.jsonl,
contact.png (dataset picture and two samples of every prompt) and references.png (the dataset pictures alone).
"""

import time

START = time.monotonic()  # before the slow imports: they count against --total-seconds

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

import datapack  # noqa: E402
import export  # noqa: E402
import torch  # noqa: E402
from datapack import DataPack  # noqa: E402
from flow import FlowModel, FlowSettings, compile_step, fixed_loss, sample, start_noise, train_flow  # noqa: E402
from network import FULL, LATENT_CHANNELS, SMOKE, build_dit, build_text_encoder, build_vae, check_forward  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import RunLog  # noqa: E402
from vae import (  # noqa: E402
    VaeSettings,
    decode_latents,
    encode_all,
    equalize_channels,
    normalize_latents,
    psnr,
    train_vae,
)

HERE = Path(__file__).resolve().parent
# Left of the total for drawing, writing and loading back.
RESERVE_SECONDS = 30
# How long to wait for the warm-up process once the autoencoder is trained.
WARM_UP_PATIENCE = 20
FORWARD_TOLERANCE = 1e-5
SMOKE_DEFAULTS = {
    "vae_seconds": 25.0,
    "dit_seconds": 25.0,
    "total_seconds": 110.0,
    "vae_batch": 4,
    "dit_batch": 8,
    "images": 48,
    "warmup": 10,
    "log_every": 10,
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
    parser.add_argument("--dit-batch", type=int, default=256)
    parser.add_argument("--dit-lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps over which the learning rates rise")
    parser.add_argument("--images", type=int, help="use only so many images")
    parser.add_argument("--cfg", type=float, default=2.5)
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--warm-up-only", action="store_true", help="only compile the transformer's step into the cache")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on the CPU, in about two minutes")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE_DEFAULTS)
    return parser.parse_args()


def choose_device(smoke: bool) -> torch.device:
    """The GPU if there is one, except for the smoke test."""
    return torch.device("cpu" if smoke or not torch.cuda.is_available() else "cuda")


def allow_fast_arithmetic() -> None:
    """Lets float32 products round their operands and convolutions choose their fastest kernel."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


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


def count_millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


class Run:
    """One training run: the parts, the data, and where things go."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shape = SMOKE if args.smoke else FULL
        self.device = choose_device(args.smoke)
        args.out.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(args.out / "log.jsonl", START)
        self.model_folder = args.work / "source"
        with open(args.prompts, encoding="utf-8") as lines:
            self.prompts = [json.loads(line)["prompt"] for line in lines]
        self.pack = self.load_pack()
        self.tokenizer = Tokenizer.from_file(str(args.pack / "tokenizer/tokenizer.json"))

    def load_pack(self) -> DataPack:
        pack = datapack.load(self.args.pack, self.prompts, self.args.images).to(self.device)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.log.write("start", device=device, torch=torch.__version__, images=len(pack.images))
        return pack

    def check(self) -> None:
        """Stops a run whose batched passes differ from the libraries', before any time is spent on it."""
        error = check_forward(self.shape, self.tokenizer.get_vocab_size())
        self.log.write("check", forward_error=error)
        if not error <= FORWARD_TOLERANCE:
            raise SystemExit(f"the batched forward differs from diffusers by {error:.2e}")

    def train_vae(self) -> Tensor:
        """Trains and saves the autoencoder; returns the normalized latents of all images."""
        args = self.args
        self.vae = build_vae(self.shape).to(self.device, memory_format=torch.channels_last)
        settings = VaeSettings(args.vae_batch, args.vae_lr, args.warmup, args.log_every, args.compile)
        train_vae(self.vae, self.pack, settings, args.vae_seconds, self.log)
        self.vae.eval()
        equalize_channels(self.vae, encode_all(self.vae, self.pack.images))
        export.round_weights(self.vae)
        latents = normalize_latents(self.vae, encode_all(self.vae, self.pack.images))
        quality = psnr(decode_latents(self.vae, latents), self.pack.images)
        self.log.write(
            "vae",
            psnr=quality,
            millions=count_millions(self.vae),
            shift_factor=self.vae.config.shift_factor,
            scaling_factor=self.vae.config.scaling_factor,
            channel_means=[round(value, 3) for value in latents.mean((0, 2, 3)).tolist()],
        )
        export.save_frame(args.pack / "tokenizer", self.model_folder)
        export.save_vae(self.vae, self.model_folder)
        export.pack_model(self.model_folder, args.out)
        return latents

    def make_flow_model(self, latent_size: int) -> tuple[FlowModel, FlowSettings]:
        args = self.args
        pad, end = (self.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
        text = build_text_encoder(self.shape, self.tokenizer.get_vocab_size(), pad, end)
        model = FlowModel.make(build_dit(self.shape), text, latent_size, self.device)
        return model, FlowSettings(args.dit_batch, args.dit_lr, args.warmup, args.log_every, args.compile)

    def warm_up(self) -> None:
        """Compiles the flow step on made-up latents."""
        size = datapack.IMAGE_SIZE // 8
        model, settings = self.make_flow_model(size)
        latents = torch.randn(len(self.pack.images), LATENT_CHANNELS, size, size, device=self.device)
        compile_step(model, self.pack, latents, settings, self.log)

    def train_flow(self, latents: Tensor) -> None:
        """Trains and saves transformer and text encoder in the time that is left."""
        self.model, settings = self.make_flow_model(latents.shape[-1])
        left = self.args.total_seconds - RESERVE_SECONDS - (time.monotonic() - START)
        seconds = min(self.args.dit_seconds, left)
        train_flow(self.model, self.pack, latents, settings, seconds, self.log, self.save_flow)
        export.round_weights(self.model.dit)
        export.round_weights(self.model.text)
        self.save_flow()
        self.log.write(
            "dit",
            fixed_loss=fixed_loss(self.model, self.pack, latents, 2048),
            transformer_millions=count_millions(self.model.dit),
            text_encoder_millions=count_millions(self.model.text),
        )

    def save_flow(self) -> None:
        export.save_flow(self.model, self.model_folder)
        sizes = export.pack_model(self.model_folder, self.args.out)
        self.log.write("saved", part_bytes=sizes)

    def draw(self) -> None:
        """Draws all prompts with two seeds each, then the first once more with diffusers' own pipeline."""
        args, pack = self.args, self.pack
        places = [pack.find(prompt) for prompt in self.prompts]
        rows, slots = (torch.tensor(column, device=self.device) for column in zip(*places, strict=True))
        references = pack.images[rows]
        noises, columns = [], [references]
        for first_seed in (0, 1000):
            seeds = [first_seed + number for number in range(len(rows))]
            noise = start_noise(seeds, (LATENT_CHANNELS, 16, 16))
            ids, lengths = pack.ids[rows, slots], pack.lengths[rows, slots]
            latents = sample(self.model, pack, ids, lengths, noise, args.sample_steps, args.cfg)
            noises.append(noise)
            columns.append(decode_latents(self.vae, latents))
            self.log.write("draw", first_seed=first_seed, psnr_to_dataset=psnr(columns[-1], references))
        export.contact_sheet(self.prompts, columns, args.out / "contact.png")
        export.contact_sheet(self.prompts, [references], args.out / "references.png")

        loaded = export.draw_with_pipeline(
            self.model_folder, self.prompts[0], noises[0][0], args.sample_steps, args.cfg, self.device
        )
        self.log.write("pipeline", psnr_to_own_sampler=psnr(loaded, columns[1][0].cpu()))


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    if args.warm_up_only:
        args.images = len(args.prompts.read_text().splitlines())
        allow_fast_arithmetic()
        Run(args).warm_up()
        return
    warm_up = start_warm_up(args) if args.compile else None
    run = Run(args)
    run.check()
    allow_fast_arithmetic()
    latents = run.train_vae()
    if warm_up:
        run.log.write("warm-up", result=finish_warm_up(warm_up))
    run.train_flow(latents)
    try:
        run.draw()
    except Exception:
        # The model is saved; a failure to show it must not look like a failure to train it.
        traceback.print_exc()
        run.log.write("draw", result="FAILED")
        if args.smoke:
            raise
    run.log.write("done", result="ok")


if __name__ == "__main__":
    main()
