"""Flow matching: training of transformer and text encoder, and the sampler used to look at the result."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

from datapack import DataPack
from network import PATCH, Rotations, build_rotations, dit_output, text_features
from training import Budget, Meter, RunLog, Trainer, compiled_or_eager

SHIFT = 3.0
EMPTY_SHARE = 0.1
EVALUATION_CHUNK = 256
# Progress at which the averaged weights are handed out before the end.
CHECKPOINTS = (0.35, 0.7)


@dataclass(frozen=True)
class FlowSettings:
    batch: int
    lr: float
    warmup: int
    log_every: int
    compile: bool


@dataclass
class FlowModel:
    """Transformer, text encoder, their rotary tables, and the dtype they compute in."""

    dit: ZImageTransformer2DModel
    text: Qwen3Model
    tables: Rotations
    dtype: torch.dtype

    @classmethod
    def make(cls, dit: nn.Module, text: nn.Module, latent_size: int, device: torch.device) -> "FlowModel":
        tables = build_rotations(dit, text, (latent_size // PATCH, latent_size // PATCH), device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(dit.to(device), text.to(device), tables, dtype)

    def features(self, ids: Tensor) -> Tensor:
        return text_features(self.text, ids, self.tables.text, self.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """noise - image, float32. The model is given 1 - sigma and returns the negative velocity."""
        return -dit_output(self.dit, latents, 1 - sigma, features, lengths, self.tables).float()

    def loss(self, latents: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        level = sigma[:, None, None, None]
        noisy = (1 - level) * latents + level * noise
        return F.mse_loss(self.velocity(noisy, sigma, self.features(ids), lengths), noise - latents)

    def trained_parameters(self) -> list[Tensor]:
        """All parameters that take part; the rest is frozen.

        `hidden_states[-2]` leaves out the text model's last layer and norm, and 64 image tokens need no padding.
        """
        self.text.layers[-1].requires_grad_(False)
        self.text.norm.requires_grad_(False)
        self.dit.x_pad_token.requires_grad_(False)
        return [p for module in (self.dit, self.text) for p in module.parameters() if p.requires_grad]


def shifted(u: Tensor) -> Tensor:
    """The noise level of schedule position `u` in (0, 1]."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def stratified_levels(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """`count` noise levels spread evenly over the schedule, which makes the loss less noisy than free draws."""
    jitter = torch.rand(count, device=device, generator=generator)
    return shifted((torch.arange(count, device=device) + jitter) / count)


def draw_batch(pack: DataPack, latents: Tensor, size: int) -> tuple[Tensor, ...]:
    """Random images with random captions, some of them empty; the arguments of `FlowModel.loss`."""
    device = latents.device
    rows = torch.multinomial(pack.weights, size, replacement=True)
    slots = torch.randint(pack.ids.shape[1], (size,), device=device)
    empty = torch.rand(size, device=device) < EMPTY_SHARE
    ids = torch.where(empty[:, None], pack.empty_ids, pack.ids[rows, slots])
    lengths = torch.where(empty, pack.empty_length, pack.lengths[rows, slots])
    images = latents[rows]
    return images, torch.randn_like(images), stratified_levels(size, device), ids, lengths


def compile_step(
    model: FlowModel, pack: DataPack, latents: Tensor, settings: FlowSettings, log: RunLog
) -> Callable[..., Tensor]:
    """The loss of one batch as a function of `draw_batch`'s results, compiled if that is wanted and works."""
    parameters = model.trained_parameters()

    def flow_loss(*batch: Tensor) -> Tensor:
        return model.loss(*batch)

    def trial(function: Callable[..., Tensor]) -> None:
        try:
            function(*draw_batch(pack, latents, settings.batch)).backward()
        finally:
            for parameter in parameters:
                parameter.grad = None

    return compiled_or_eager(flow_loss, trial, settings.compile, log)


def train_flow(
    model: FlowModel,
    pack: DataPack,
    latents: Tensor,
    settings: FlowSettings,
    seconds: float,
    log: RunLog,
    save: Callable[[], None],
) -> None:
    """Trains for `seconds`, compilation included, `save`s at some checkpoints and leaves the averaged weights."""
    deadline = time.monotonic() + seconds
    step_loss = compile_step(model, pack, latents, settings, log)
    trainer = Trainer(model.trained_parameters(), settings.lr, ema=0.999, warmup=settings.warmup)
    meter, budget = Meter(latents.device), Budget(deadline - time.monotonic())
    checkpoints = list(CHECKPOINTS)
    while (progress := budget.progress()) < 1:
        loss = step_loss(*draw_batch(pack, latents, settings.batch))
        trainer.step(loss, progress)
        meter.add(loss)
        if trainer.steps % settings.log_every:
            continue
        mean_loss, speed = meter.read()
        sound = trainer.guard(mean_loss)
        log.write("dit", step=trainer.steps, loss=mean_loss, steps_per_second=speed, sound=sound)
        if sound and checkpoints and progress > checkpoints[0]:
            checkpoints.pop(0)
            trainer.swap_average()
            save()
            trainer.swap_average()
    trainer.guard(meter.read()[0] if meter.steps else 0.0)
    trainer.swap_average()


@torch.no_grad()
def fixed_loss(model: FlowModel, pack: DataPack, latents: Tensor, count: int) -> float:
    """The loss on a fixed set of images, noises and levels with plain names, to compare runs by."""
    generator = torch.Generator().manual_seed(0)
    device = latents.device
    rows = torch.randint(len(latents), (count,), generator=generator).to(device)
    noise = torch.randn((count, *latents.shape[1:]), generator=generator).to(device)
    levels = stratified_levels(count, torch.device("cpu"), generator)
    sigma = levels[torch.randperm(count, generator=generator)].to(device)
    total = 0.0
    for part in torch.arange(count, device=device).split(EVALUATION_CHUNK):
        chosen = rows[part]
        batch = (latents[chosen], noise[part], sigma[part], pack.ids[chosen, 0], pack.lengths[chosen, 0])
        total += model.loss(*batch).item() * len(part)
    return total / count


def start_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """One independent start per seed, the same on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: FlowModel, pack: DataPack, ids: Tensor, lengths: Tensor, noise: Tensor, steps: int, cfg: float
) -> Tensor:
    """Normalized latents drawn from `noise` with Euler steps and guidance against the empty caption."""
    count = len(noise)
    features = model.features(torch.cat((ids, pack.empty_ids.expand(count, -1))))
    lengths = torch.cat((lengths, pack.empty_length.expand(count)))
    levels = [shifted(torch.tensor(1 - step / steps)).item() for step in range(steps)] + [0.0]
    x = noise.to(ids.device)
    for level, following in itertools.pairwise(levels):
        sigma = torch.full((2 * count,), level, device=x.device)
        positive, negative = model.velocity(torch.cat((x, x)), sigma, features, lengths).chunk(2)
        x = x + (negative + cfg * (positive - negative)) * (following - level)
    return x
