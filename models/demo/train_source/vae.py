"""Training of the autoencoder, and the latents it yields."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from datapack import DataPack
from training import Budget, Meter, RunLog, Trainer, compiled_or_eager

KL_WEIGHT = 1e-3
EDGE_SCALES = (1, 2, 4)
EDGE_WEIGHT = 0.5
EVALUATION_CHUNK = 64


@dataclass(frozen=True)
class VaeSettings:
    batch: int
    lr: float
    warmup: int
    log_every: int
    compile: bool


def to_signed(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def edge_loss(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring errors at several scales: it asks for edges where they belong."""
    total = error.new_zeros(())
    for scale in EDGE_SCALES:
        coarse = F.avg_pool2d(error, scale)
        total = total + coarse.diff(dim=2).abs().mean() + coarse.diff(dim=3).abs().mean()
    return total / len(EDGE_SCALES)


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction of sampled latents plus a small pull of the posterior towards the unit normal.

    The pull also leaves a little noise in the latents, to which the decoder becomes robust.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        mean, log_variance = vae.encoder(images).float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        decoded = vae.decoder(mean + (0.5 * log_variance).exp() * noise)
    error = decoded.float() - images
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edge_loss(error) + KL_WEIGHT * kl


def train_vae(vae: AutoencoderKL, pack: DataPack, settings: VaeSettings, seconds: float, log: RunLog) -> None:
    """Trains for `seconds`, compilation included, and leaves the averaged weights in `vae`."""
    deadline = time.monotonic() + seconds
    device = pack.images.device
    size = pack.images.shape[-1] // 8

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.multinomial(pack.weights, settings.batch, replacement=True)
        images = to_signed(pack.images[rows]).contiguous(memory_format=torch.channels_last)
        return images, torch.randn(settings.batch, vae.config.latent_channels, size, size, device=device)

    def batch_loss(images: Tensor, noise: Tensor) -> Tensor:
        return vae_loss(vae, images, noise)

    def trial(function: Callable[..., Tensor]) -> None:
        try:
            function(*batch()).backward()
        finally:
            vae.zero_grad(set_to_none=True)

    step_loss = compiled_or_eager(batch_loss, trial, settings.compile, log)
    trainer = Trainer(list(vae.parameters()), settings.lr, ema=0.995, warmup=settings.warmup)
    meter, budget = Meter(device), Budget(deadline - time.monotonic())
    while (progress := budget.progress()) < 1:
        loss = step_loss(*batch())
        trainer.step(loss, progress)
        meter.add(loss)
        if trainer.steps % settings.log_every:
            continue
        mean_loss, speed = meter.read()
        sound = trainer.guard(mean_loss)
        log.write("vae", step=trainer.steps, loss=mean_loss, steps_per_second=speed, sound=sound)
    trainer.guard(meter.read()[0] if meter.steps else 0.0)
    trainer.swap_average()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means of all pictures, not normalized."""
    return torch.cat([vae.encode(to_signed(chunk)).latent_dist.mean for chunk in images.split(EVALUATION_CHUNK)])


@torch.no_grad()
def equalize_channels(vae: AutoencoderKL, raw: Tensor) -> None:
    """Folds every latent channel's spread into the layers beside it, so that all channels count alike.

    This leaves the reconstruction as it was: the decoder's first layer takes back what the encoder's last gives. The
    configuration has room for one factor only, so the channels' own factors must live in the weights.
    """
    spread, channels = raw.std((0, 2, 3)), vae.config.latent_channels
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[:channels] /= spread[:, None, None, None]
    last.bias[:channels] /= spread
    last.bias[channels:] -= 2 * spread.log()
    first.weight *= spread[:, None, None]


def normalize_latents(vae: AutoencoderKL, raw: Tensor) -> Tensor:
    """Records mean and spread of `raw` in the configuration and returns (raw - shift) * scale."""
    # Rounded first, so that what is trained on is exactly what the written configuration says.
    shift, scale = round(raw.mean().item(), 4), round(1 / raw.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (raw - shift) * scale


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalized latents as uint8 pictures."""
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = torch.cat([vae.decode(chunk).sample for chunk in raw.split(EVALUATION_CHUNK)])
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB, over all of them at once."""
    error = (first.float() - second.float()).square().mean().clamp_min(1e-10)
    return (10 * torch.log10(255**2 / error)).item()
