"""One training run from data pack to contact sheet."""

import argparse
import json
import time
import traceback

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import datapack
import export
from datapack import DataPack
from flow import FlowModel, FlowSettings, compile_step, fixed_loss, sample, start_noise, train_flow
from network import FULL, LATENT_CHANNELS, SMOKE, build_dit, build_text_encoder, build_vae, check_forward
from training import RunLog
from vae import VaeSettings, decode_latents, encode_all, equalize_channels, normalize_latents, psnr, train_vae

# Left of the total for drawing, writing and loading back.
RESERVE_SECONDS = 30
FORWARD_TOLERANCE = 1e-5


def choose_device(smoke: bool) -> torch.device:
    """The GPU if there is one, except for the smoke test."""
    return torch.device("cpu" if smoke or not torch.cuda.is_available() else "cuda")


def allow_fast_arithmetic() -> None:
    """Lets float32 products round their operands and convolutions choose their fastest kernel."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def count_millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


class Run:
    """One training run: the parts, the data, and where things go."""

    def __init__(self, args: argparse.Namespace, start: float):
        torch.manual_seed(0)
        self.args, self.start = args, start
        self.shape = SMOKE if args.smoke else FULL
        self.device = choose_device(args.smoke)
        args.out.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(args.out / "log.jsonl", start)
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
        allow_fast_arithmetic()

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
        left = self.args.total_seconds - RESERVE_SECONDS - (time.monotonic() - self.start)
        seconds = min(self.args.dit_seconds, left)
        train_flow(self.model, self.pack, latents, settings, seconds, self.log, self.save_flow)
        export.round_weights(self.model.dit)
        export.round_weights(self.model.text)
        self.save_flow()
        self.log.write(
            "dit",
            fixed_loss=fixed_loss(self.model, self.pack, latents, self.args.evaluate),
            transformer_millions=count_millions(self.model.dit),
            text_encoder_millions=count_millions(self.model.text),
        )

    def save_flow(self) -> None:
        export.save_flow(self.model, self.model_folder)
        sizes = export.pack_model(self.model_folder, self.args.out)
        self.log.write("saved", part_bytes=sizes)

    def show(self) -> None:
        """Draws the prompts. The model is saved by now, and a failure here must not look like one to train it."""
        try:
            self.draw()
        except Exception:
            traceback.print_exc()
            self.log.write("draw", result="FAILED")
            if self.args.smoke:
                raise
        self.log.write("done", result="ok")

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


def warm_up_only(args: argparse.Namespace, start: float) -> None:
    """The work of the warm-up process: no image but those of the prompts, no training."""
    args.images = len(args.prompts.read_text().splitlines())
    allow_fast_arithmetic()
    Run(args, start).warm_up()
