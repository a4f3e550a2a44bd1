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
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

import datapack  # noqa: E402
import export  # noqa: E402
import torch  # noqa: E402
from datapack import DataPack  # noqa: E402
from flow import FlowModel, FlowSettings, fixed_loss, sample, start_noise, train_flow  # noqa: E402
from network import FULL, LATENT_CHANNELS, SMOKE, build_dit, build_text_encoder, build_vae, check_forward  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import RunLog  # noqa: E402
from vae import (  # noqa: E402
    VaeSettings,
    decode_latents,
    encode_all,
    normalize_latents,
    psnr,
    train_vae,
)

HERE = Path(__file__).resolve().parent
# Left of the total for drawing, writing and loading back.
RESERVE_SECONDS = 30
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
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on the CPU, in about two minutes")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE_DEFAULTS)
    return parser.parse_args()


def choose_device(smoke: bool) -> torch.device:
    """The GPU, except for the smoke test; sets the switches that make it fast."""
    if smoke or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


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
        export.round_weights(self.vae)
        latents = normalize_latents(self.vae, encode_all(self.vae, self.pack.images))
        quality = psnr(decode_latents(self.vae, latents), self.pack.images)
        self.log.write(
            "vae",
            psnr=quality,
            millions=count_millions(self.vae),
            shift_factor=self.vae.config.shift_factor,
            scaling_factor=self.vae.config.scaling_factor,
            channel_deviations=[round(value, 3) for value in latents.std((0, 2, 3)).tolist()],
        )
        export.save_frame(args.pack / "tokenizer", self.model_folder)
        export.save_vae(self.vae, self.model_folder)
        export.pack_model(self.model_folder, args.out)
        return latents

    def train_flow(self, latents: Tensor) -> None:
        """Trains and saves transformer and text encoder in the time that is left."""
        args = self.args
        pad, end = (self.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
        text = build_text_encoder(self.shape, self.tokenizer.get_vocab_size(), pad, end)
        self.model = FlowModel.make(build_dit(self.shape), text, latents.shape[-1], self.device)
        settings = FlowSettings(args.dit_batch, args.dit_lr, args.warmup, args.log_every, args.compile)
        left = args.total_seconds - RESERVE_SECONDS - (time.monotonic() - START)
        train_flow(self.model, self.pack, latents, settings, min(args.dit_seconds, left), self.log, self.save_flow)
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
            latents = sample(self.model, pack, pack.ids[rows, slots], pack.lengths[rows, slots], noise, args.sample_steps, args.cfg)
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
    run = Run(args)
    run.check()
    run.train_flow(run.train_vae())
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
