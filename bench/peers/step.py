"""Whole steps in PyTorch: diffusers' transformer on latents, the pixel model of tests/fixtures, diffusers' decoder.

Started by `bench-step --peer`; see peer.py. A step is what a pipeline does in its loop: the image in the model's type, the
model, and Euler's rule on the image in f32. Attention is cuDNN's or flash, as the name says; compiled, each block and the head
are a graph of their own (the same code for all blocks), with cuDNN's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peer import Context, Way, random_weights, serve, use_fixtures

use_fixtures()

import flux2_pixel as flux2  # noqa: E402
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, ZImageTransformer2DModel  # noqa: E402
from pixel_model import LAYOUTS, PUBLISHED_WIDTHS, L2PPixelModel, PixelConfig  # noqa: E402

#: The published decoder; the tiny one of bench/src/published.rs.
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "act_fn": "silu", "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
VAE_SIZES = {
    False: {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32},
    True: {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
}

#: Image pixels along a side of a latent cell.
DOWNSAMPLING = 8

#: Above this many tokens a step takes seconds; only the fastest attention is worth the wait.
MANY_TOKENS = 20000

TINY_TRUNK = {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 128}

SIGMA, DELTA = 0.65, -0.05


def pixel_config(case: dict) -> PixelConfig:
    layout = {"pixel-4k": "4k", "pixel-8k": "8k"}.get(case["model"], "1k")
    if not case["tiny"]:
        return PixelConfig.published(layout)
    return PixelConfig(layout, (8,) * len(LAYOUTS[layout].stages), 16, **TINY_TRUNK)


def latent_config(tiny: bool) -> dict:
    sizes = TINY_TRUNK if tiny else {}
    return {**PixelConfig(**sizes).trunk(), "in_channels": 16, "all_patch_size": [2]}


def build(make: Callable[[], nn.Module], context: Context) -> nn.Module:
    """A module with random weights, made in its type: twelve billion bytes do not go through f32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(context.dtype)
    try:
        with context.device:
            module = make()
    finally:
        torch.set_default_dtype(default)
    return random_weights(module, context)


class Toggle:
    """Compiles modules in place, and switches between that and eager."""

    def __init__(self, modules: Iterable[nn.Module], context: Context):
        self.modules = list(modules)
        for module in self.modules:
            module.compile(mode=context.compile, dynamic=False)
        self.compiled = [module._compiled_call_impl for module in self.modules]
        self.use(False)

    def use(self, compiled: bool) -> None:
        for module, implementation in zip(self.modules, self.compiled):
            module._compiled_call_impl = implementation if compiled else None


@dataclass
class Drawing:
    """A transformer and what it draws on."""

    model: nn.Module
    #: f32, what Euler's rule moves.
    image: Tensor
    #: Of the image in the model's type and of the time, f32 [1].
    velocity: Callable[[Tensor, Tensor], Tensor]
    #: Whether its modules run compiled; None without compilation.
    toggle: Toggle | None
    #: Kinds of attention, and what enters one of them.
    backends: list[str]
    attention: Callable

    def ways(self, call: Callable[[int], object]) -> dict[str, Way]:
        """The call with each kind of attention and, where asked for, compiled. Not recorded: the published pipelines launch
        every step."""

        def using(compiled: bool) -> Callable[[int], object]:
            def run(index: int) -> object:
                if self.toggle:
                    self.toggle.use(compiled)
                return call(index)

            return run

        around = {name: partial(self.attention, name) for name in self.backends}
        ways = {f"eager, {name}": Way(using(False), around=entered, recorded=False) for name, entered in around.items()}
        if self.toggle:
            ways["compiled, cudnn"] = Way(using(True), around=around["cudnn"], recorded=False)
        return ways


def klein_drawing(case: dict, context: Context) -> Drawing:
    """FLUX.2 [klein] or the pixel model of it with random weights, and noise."""
    config = flux2.TINY if case["tiny"] else flux2.KLEIN
    text = context.normal(1, case["caption"], config["joint_attention_dim"])
    if "latent" in case["model"]:
        model = build(lambda: Flux2Transformer2DModel(**config), context)
        side, channels, patch = case["side"] // flux2.CELL, config["in_channels"], 1
        velocity = lambda x, time: flux2.latent_velocity(model, x, time, text)  # noqa: E731
    else:
        layout = "4k" if case["model"].endswith("4k") else "1k"
        widths, bottleneck = ((8,) * len(LAYOUTS[layout].stages), 16) if case["tiny"] else (PUBLISHED_WIDTHS[layout], 512)
        model = build(lambda: flux2.Flux2PixelModel(config, layout, widths, bottleneck), context)
        model.local_decoder.to(memory_format=torch.channels_last)
        side, channels, patch = case["side"], 3, model.patch
        velocity = lambda x, time: model(x, time, text)  # noqa: E731
    toggle = None
    if context.compile:
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        toggle = Toggle(blocks + ([] if "latent" in case["model"] else [model.local_decoder]), context)
    image = context.normal(1, channels, side, side, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    backends = ["cudnn", "flash"] if (side // patch) ** 2 <= MANY_TOKENS else ["cudnn"]
    return Drawing(model, image, velocity, toggle, backends, context.attention)


def drawing(case: dict, context: Context) -> Drawing:
    """The model of a case with random weights, and noise."""
    if case["model"].startswith("klein"):
        return klein_drawing(case, context)
    latent = case["model"].startswith("latent")
    if latent:
        model = build(lambda: ZImageTransformer2DModel(**latent_config(case["tiny"])), context)
        side, channels, patch = case["side"] // DOWNSAMPLING, 16, 2
        width = latent_config(case["tiny"])["cap_feat_dim"]
    else:
        config = pixel_config(case)
        model = build(lambda: L2PPixelModel(config), context)
        model.local_decoder.to(memory_format=torch.channels_last)
        side, channels, patch, width = case["side"], 3, config.patch, config.cap_feat_dim
    image = context.normal(1, channels, side, side, dtype=torch.float32)
    if not latent:
        image = image.contiguous(memory_format=torch.channels_last)
    caption = context.normal(case["caption"], width)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        if latent:
            return -model([x[0].unsqueeze(1)], time, [caption], return_dict=False)[0][0].squeeze(1).unsqueeze(0)
        return model(x, time, [caption])

    toggle = None
    if context.compile:
        modules = [*model.layers, *model.noise_refiner, *model.context_refiner]
        toggle = Toggle(modules + ([] if latent else [model.local_decoder]), context)
    tokens = (side // patch) ** 2
    backends = ["cudnn", "flash"] if tokens <= MANY_TOKENS else ["cudnn"]
    return Drawing(model, image, velocity, toggle, backends, context.attention)


def step_ways(case: dict, context: Context) -> dict[str, Way]:
    drawn = drawing(case, context)
    image, time = drawn.image, torch.tensor([1 - SIGMA], device=context.device)

    def step(_: int) -> None:
        image.add_(drawn.velocity(image.to(context.dtype), time).float(), alpha=DELTA)

    step(0)
    if not torch.isfinite(image).all():
        raise ValueError("the step's result is not finite")
    return drawn.ways(step)


#: Blocks of the published models, refiners included, and what their layers are made of: outputs and inputs over the width, and
#: those of the feed-forward network.
BLOCKS = 34


def quantised(rows: int, columns: int, context: Context) -> tuple[Tensor, Tensor]:
    """Random e4m3 numbers with a scale per row."""
    values = context.normal(rows, columns, dtype=torch.float32).clamp(-4, 4).to(torch.float8_e4m3fn)
    return values, torch.rand(rows, 1, device=context.device) + 0.5


def eight_bit_ways(case: dict, context: Context) -> dict[str, Way]:
    """A step's matrix products in fp8 with scales of rows, through cuBLASLt, and its attention through cuDNN in bf16: nothing is
    normalised, gated, rotated or quantised, and there is no head. PyTorch has no int8 products that are faster than bf16's."""
    width, heads, hidden = (256, 2, 640) if case["tiny"] else (3840, 30, 10240)
    tokens = case["tokens"]
    layers = [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden)]
    weights = [quantised(outputs, inputs, context) for outputs, inputs in layers]
    inputs = [quantised(tokens, inputs, context) for _, inputs in layers]
    qkv = context.normal(1, 3, heads, tokens, width // heads)

    def step(_: int) -> None:
        for _ in range(BLOCKS):
            for (weight, of_columns), (x, of_rows) in zip(weights, inputs):
                torch._scaled_mm(x, weight.t(), of_rows, of_columns.t(), out_dtype=context.dtype, use_fast_accum=True)
            nn.functional.scaled_dot_product_attention(*qkv.unbind(1))

    return {"fp8 products and attention": Way(step, around=partial(context.attention, "cudnn"))}


class Decoder:
    """The published decoder with random weights."""

    def __init__(self, case: dict, context: Context):
        self.config = {**VAE, **VAE_SIZES[case["tiny"]]}
        self.vae = build(lambda: AutoencoderKL(**self.config), context)

    def __call__(self, latent: Tensor) -> Tensor:
        latent = latent / self.config["scaling_factor"] + self.config["shift_factor"]
        return self.vae.decode(latent, return_dict=False)[0]


class KleinDecoder:
    """FLUX.2's decoder with random weights, of packed latents."""

    def __init__(self, case: dict, context: Context):
        config = flux2.TINY_VAE if case["tiny"] else flux2.VAE
        self.vae = build(lambda: AutoencoderKLFlux2(**config), context)

    def __call__(self, latent: Tensor) -> Tensor:
        return flux2.decoded(self.vae, latent)


def decode_ways(case: dict, context: Context) -> dict[str, Way]:
    klein = case["model"].startswith("klein")
    decoder = (KleinDecoder if klein else Decoder)(case, context)
    side, channels = (case["side"] // flux2.CELL, 128) if klein else (case["side"] // DOWNSAMPLING, decoder.config["latent_channels"])
    latent = context.normal(1, channels, side, side)
    # At 4096 x 4096 cuDNN's search takes four minutes and finds nothing faster.
    torch.backends.cudnn.benchmark = False

    # The transformer stays resident while a pipeline decodes; its bytes are counted without being held.
    with torch.device("meta"):
        if klein:
            transformer = Flux2Transformer2DModel(**(flux2.TINY if case["tiny"] else flux2.KLEIN))
        else:
            transformer = ZImageTransformer2DModel(**latent_config(case["tiny"]))
    beside = sum(parameter.numel() for parameter in transformer.parameters()) * context.dtype.itemsize
    return {"eager": Way(lambda _: decoder(latent), around=partial(context.attention, "cudnn"), beside=beside, recorded=False)}


def make(case: dict, context: Context) -> dict[str, Way]:
    if case.get("trunk", "bf16") != "bf16":
        return eight_bit_ways(case, context)
    return decode_ways(case, context) if case["model"].endswith("-decode") else step_ways(case, context)


if __name__ == "__main__":
    serve(make)
