"""Training in PyTorch: the peer of `bench-train`, and the check of our gradients and steps at the published size.

Started by `bench-train --peer`, see peer.py: a step is forward, backward and fused AdamW with f32 master weights of bf16 ones, on
one picture, eager as published training code is; attention is cuDNN's or flash, as the name says.

Run by hand it checks `bench-parity grad` (on a GPU of 80 GB; needs diffusers):

    python bench/peers/train.py --programs bundle/bin --work /dev/shm/grad --out grad.json
    python bench/peers/train.py --programs target/release --work /tmp/grad --out grad.json --tiny
    python bench/peers/train.py --programs bundle/bin --work /dev/shm/grad --out klein-grad.json --family klein --train paper

Random weights, rounded to bf16, are trained by PyTorch in f32 (the reference: no TF32, attention by plain products), by PyTorch in
bf16, and by this engine, which reads them from a file: loss and gradients of the first step, and the losses of the steps after it,
all on the same picture. The reference too rounds its weights to bf16 after each step, so that only the arithmetic differs. A row passes when our error is at most 1.25 times that of PyTorch's bf16. Losses count together: what is
compared is the largest relative error of one. Only errors are written; weights and gradients are removed from the work folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer import Context, Way, serve, use_fixtures

use_fixtures()

import flux2_pixel as flux2  # noqa: E402
from pixel_model import LAYOUTS, PUBLISHED_WIDTHS, L2PPixelModel, PixelConfig, freeze  # noqa: E402

#: The published recipe.
OPTIMIZER = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

#: t = 1 - sigma.
TIME = 0.35

#: No multiple of 32, so that the caption is padded.
CAPTION = 77

TINY_TRUNK = {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 128}

LARGEST_RATIO = 1.25


def pixel_config(model: str, tiny: bool) -> PixelConfig:
    layout = model.removeprefix("pixel-")
    if not tiny:
        return PixelConfig.published(layout)
    return PixelConfig(layout, (8,) * len(LAYOUTS[layout].stages), 16, **TINY_TRUNK)


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a weight, so that activations stay near 1 and every branch matters; as in full_size.py."""
    if len(shape) == 1 and name.endswith("weight"):
        return 1.0, 0.1
    if len(shape) == 1:
        return 0.0, 0.3 if "adaLN" in name else 0.1
    if "pad_token" in name:
        return 0.0, 1.0
    gain = 1.0
    if "t_embedder" in name:
        gain = 2.0
    elif "adaLN" in name:
        gain = 0.3
    elif len(shape) == 4 and "out_conv" not in name and ".up" not in name:
        gain = 1.6
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


@dataclass
class Kind:
    """A pixel model of 1K: how it is made, how wide its captions are, which of its parameters a policy trains, and how it is called with
    a caption [tokens, width]."""

    make: Callable[[], nn.Module]
    caption_width: int
    trained: Callable[[nn.Module, str, int], list[str]]
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def z_image(config: PixelConfig) -> Kind:
    return Kind(
        lambda: L2PPixelModel(config), config.cap_feat_dim, lambda *given: list(freeze(*given)),
        lambda model, x, time, caption: model(x, time, [caption]),
    )  # fmt: skip


def klein(tiny: bool) -> Kind:
    config = flux2.TINY if tiny else flux2.KLEIN
    sizes = ((8,) * len(LAYOUTS["1k"].stages), 16) if tiny else (PUBLISHED_WIDTHS["1k"], 512)
    return Kind(
        lambda: flux2.Flux2PixelModel(config, "1k", *sizes), config["joint_attention_dim"], flux2.freeze,
        lambda model, x, time, caption: model(x, time, caption[None]),
    )  # fmt: skip


def build(kind: Kind, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """The model with random weights, representable in bf16, made in its type on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind.make()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = distribution(name, tuple(parameter.shape))
            parameter.normal_(mean, deviation, generator=generator)
            parameter.copy_(parameter.bfloat16())
    model.local_decoder.to(memory_format=torch.channels_last)
    return model.train()


@dataclass
class Batch:
    """A noisy picture [1, 3, H, W], what its velocity should be, and a caption."""

    x: Tensor
    target: Tensor
    caption: Tensor
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

    def loss(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """mean((v - target)²) in f32; the model sees its inputs in its own type."""
        time = torch.tensor([TIME], device=self.x.device)
        velocity = self.velocity(model, self.x.to(dtype), time, self.caption.to(dtype))
        return F.mse_loss(velocity.float(), self.target)


def random_batch(kind: Kind, side: int, caption: int, normal: Callable[..., Tensor]) -> Batch:
    shape = (1, 3, side, side)
    return Batch(normal(*shape), normal(*shape), normal(caption, kind.caption_width), kind.velocity)


class Trainer:
    """AdamW over f32 masters of the trained weights; the weights are their masters, rounded to bf16 if `rounded`, in their own type."""

    def __init__(self, model: nn.Module, names: list[str], rounded: bool = True):
        self.rounded = rounded
        parameters = dict(model.named_parameters())
        self.weights = [parameters[name] for name in names]
        self.masters = [nn.Parameter(weight.detach().to(torch.float32, copy=True)) for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, **OPTIMIZER, fused=self.weights[0].is_cuda)

    def step(self) -> None:
        for master, weight in zip(self.masters, self.weights):
            # A pad token that nothing is padded with has none; its weight decays all the same.
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights):
                weight.copy_(master.bfloat16() if self.rounded else master)


# The peer of bench-train.


def make(case: dict, context: Context) -> dict[str, Way]:
    if case["recompute"] not in ("none", "all"):
        raise ValueError(f"diffusers recomputes no or all blocks, not {case['recompute']}")
    policy, _, ends = case["policy"].partition(":")
    kind = z_image(pixel_config(case["model"], case["tiny"]))
    # The server forbids gradients.
    with torch.inference_mode(False):
        model = build(kind, context.device, context.dtype, context.generator)
        names = kind.trained(model, policy, int(ends or 5))
        if case["recompute"] == "all":
            model.enable_gradient_checkpointing()
        batch = random_batch(kind, case["side"], case["caption"], partial(context.normal, dtype=torch.float32))
        trainer = Trainer(model, names)

    def step(_: int) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            loss = batch.loss(model, context.dtype)
            loss.backward()
            trainer.step()
        return loss.detach()

    # Recorded steps would need static gradients; published training code launches every step.
    ways = ("cudnn", "flash") if context.cuda else ("cudnn",)
    return {f"eager, {way}": Way(step, around=partial(context.attention, way), recorded=False) for way in ways}


# The check of bench-parity grad.


def cudnn_attention():
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def plain_attention():
    """f32 by plain matrix products, as fused f32 kernels may use tensor cores."""
    return sdpa_kernel([SDPBackend.MATH])


HEADER_TYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, tensor by tensor: twelve billion bytes are not gathered on the host first."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": HEADER_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            # Bytes in the order of the axes, whatever the order in memory.
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)


class Gradients:
    """Errors of gradients against f32 ones, which lie on the host."""

    def __init__(self, reference: dict[str, Tensor]):
        self.reference = reference

    def errors(self, device: torch.device, found: Callable[[str], Tensor]) -> tuple[dict[str, float], float]:
        """‖found - f32‖ / ‖f32‖ of each tensor, and of all together."""
        errors, squares, norm = {}, 0.0, 0.0
        for name, reference in self.reference.items():
            reference = reference.to(device, non_blocking=True)
            difference = (found(name).to(device).float() - reference).square_().sum(dtype=torch.float64).item()
            size = reference.square().sum(dtype=torch.float64).item()
            # Of a pad token that nothing is padded with the gradient is 0, and must be.
            errors[name] = math.sqrt(difference / size) if size > 0 else math.sqrt(difference)
            squares, norm = squares + difference, norm + size
        return errors, math.sqrt(squares / norm)


def steps(
    model: nn.Module, batch: Batch, names: list[str], count: int, first: Callable[[], None], rounded: bool = True
) -> list[float]:
    """The losses before each step; `first` is called with the gradients of the first one in place."""
    trainer, losses = Trainer(model, names, rounded), []
    dtype = next(model.parameters()).dtype
    for step in range(count):
        loss = batch.loss(model, dtype)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first()
        trainer.step()
    return losses


def free(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def gradients_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = {name: (parameters[name], parameters[name].grad) for name in names}
    return {name: torch.zeros_like(weight) if gradient is None else gradient for name, (weight, gradient) in found.items()}


def torch_runs(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Writes weights and inputs, and runs PyTorch in f32 and in bf16."""
    cuda = device.type == "cuda"
    clock = time.perf_counter()

    def told(what: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        print(f"{what}: {now - clock:.1f} s", flush=True)
        clock = now

    kind = klein(arguments.tiny) if arguments.family == "klein" else z_image(pixel_config("pixel-1k", arguments.tiny))
    generator = torch.Generator(device).manual_seed(arguments.seed)
    model = build(kind, device, torch.float32, generator)
    names = kind.trained(model, arguments.train, arguments.ends)
    model.enable_gradient_checkpointing()

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).normal_(generator=generator).bfloat16().float()

    side = 64 if arguments.tiny else 1024
    batch = random_batch(kind, side, 20 if arguments.tiny else CAPTION, normal)
    time_input = torch.tensor([TIME], device=device)
    save(arguments.work / "io.safetensors", {"x": batch.x, "t": time_input, "cap.0": batch.caption, "target": batch.target})
    # The weights as they are before any step: bf16 holds them.
    initial = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    save(arguments.work / "model.safetensors", initial)
    if cuda:
        # f32 training needs the room.
        initial = {name: value.cpu() for name, value in initial.items()}
    told("weights")

    reference: dict[str, Tensor] = {}

    def keep() -> None:
        reference.update({name: gradient.detach().cpu() for name, gradient in gradients_of(model, names).items()})

    with plain_attention():
        # On the CPU this engine does not round either.
        f32_losses = steps(model, batch, names, arguments.steps, keep, rounded=cuda)
    gradients = Gradients(reference)
    told(f"{arguments.steps} steps in f32")

    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.data = initial[name].to(device)
    model.local_decoder.to(memory_format=torch.channels_last)
    del initial
    free(cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    runs = {}

    def compare(way: str) -> None:
        found = gradients_of(model, names)
        runs[way] = gradients.errors(device, found.__getitem__)

    if cuda:
        with cudnn_attention():
            batch.loss(model, torch.bfloat16).backward()
        compare("cudnn")
        for parameter in model.parameters():
            parameter.grad = None
    bf16_losses = steps(model, batch, names, arguments.steps, partial(compare, "default"))
    told("PyTorch in bf16")
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    del model
    free(cuda)
    return {
        "gradients": gradients, "f32_losses": f32_losses, "bf16_losses": bf16_losses, "runs": runs, "names": names,
        "peak_bytes": peak, "told": told,
    }  # fmt: skip


def ours(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Runs bench-parity grad on the same files; its tolerance is left to the ratios."""
    command = [str(arguments.programs / "bench-parity"), "grad", "--model", str(arguments.work / "model.safetensors")]
    command += ["--io", str(arguments.work / "io.safetensors"), "--write", str(arguments.work / "gradients.safetensors")]
    policy = arguments.train if arguments.train in ("full", "head-only") else f"{arguments.train}:{arguments.ends}"
    command += ["--train", policy, "--steps", str(arguments.steps), "--recompute", arguments.recompute]
    command += ["--learning-rate", str(OPTIMIZER["lr"]), "--json", "--device", device.type]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if not finished.stdout:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(finished.stdout)


def largest(losses: list[float], reference: list[float]) -> float:
    """The largest relative error of a loss."""
    return max(abs(found / expected - 1) for found, expected in zip(losses, reference, strict=True))


def rows(torch_found: dict, found: dict, errors: dict[str, float], together: float) -> list[dict]:
    """One line per requirement; for gradients also one per tensor."""
    per_tensor, torch_together = torch_found["runs"]["default"]

    def row(name: str, ours: float, peer: float, **more) -> dict:
        ratio = ours / peer if peer > 0 else None
        return {
            "name": name, "ours": ours, "peer": peer, "unit": "relative error", "ratio": ratio,
            "target": f"<= {LARGEST_RATIO} x PyTorch bf16", "pass": bool(ours <= LARGEST_RATIO * peer), **more,
        }  # fmt: skip

    noise = largest(torch_found["bf16_losses"], torch_found["f32_losses"])
    losses = found["steps"]["losses"]
    changed = found["steps"]["frozen_changed"]
    lines = [
        row("loss of the first step", largest(losses[:1], torch_found["f32_losses"][:1]), noise),
        row(f"losses of {len(losses)} steps", largest(losses, torch_found["f32_losses"]), noise),
        row("gradients together", together, torch_together),
    ]
    frozen = {"name": "frozen tensors changed", "ours": len(changed), "peer": 0, "unit": "tensors", "ratio": None}
    lines.append({**frozen, "target": "0", "pass": not changed, "of": found["steps"]["frozen_tensors"]})
    cudnn = torch_found["runs"].get("cudnn", ({},))[0]
    return lines + [
        row(f"grad.{name}", errors[name], per_tensor[name], torch_cudnn=cudnn.get(name)) for name in torch_found["names"]
    ]


def environment(arguments: argparse.Namespace, device: torch.device) -> dict:
    gpu, driver = "cpu", "none"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    commit = arguments.commit or os.environ.get("L2P_COMMIT")
    if not commit:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = head.stdout.strip() or "unknown"
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"gpu": gpu, "driver": driver, "commit": commit, "date": date, "torch": torch.__version__}


def check(arguments: argparse.Namespace) -> bool:
    # The reference takes most of a GPU of 80 GB, which leaves none for gaps between blocks.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = [arguments.work / f"{name}.safetensors" for name in ("model", "io", "gradients")]
    try:
        torch_found = torch_runs(arguments, device)
        found = ours(arguments, device)
        torch_found["told"]("ours")
        from safetensors import safe_open

        with safe_open(files[2], "pt", device=str(device)) as file:
            errors, together = torch_found["gradients"].errors(device, lambda name: file.get_tensor(f"grad.{name}"))
        torch_found["told"]("comparison")
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    lines = rows(torch_found, found, errors, together)
    record = {
        **environment(arguments, device), "family": arguments.family, "policy": arguments.train, "ends": arguments.ends, "tiny": arguments.tiny,
        "recompute": arguments.recompute, "rows": lines, "losses": {
            "f32": torch_found["f32_losses"], "torch_bf16": torch_found["bf16_losses"], "ours": found["steps"]["losses"],
        },
        "ours_peak_bytes": found["peak_bytes"], "torch_peak_bytes": torch_found["peak_bytes"],
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    tensors = sorted((line for line in lines if line["name"].startswith("grad.")), key=lambda line: -(line["ratio"] or 0))
    passed = sum(line["pass"] for line in tensors)
    print(f"{'':<64}{'ours':>11}{'PyTorch':>11}{'ratio':>8}")
    for line in [line for line in lines if not line["name"].startswith("grad.")] + tensors[:12]:
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        print(f"{line['name']:<64}{line['ours']:>11.2e}{line['peer']:>11.2e}{ratio:>8} {'' if line['pass'] else 'miss'}")
    print(f"{passed} of {len(tensors)} gradients within {LARGEST_RATIO} times PyTorch's error; above: the largest ratios")
    return all(line["pass"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="folder with bench-parity")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and gradients (18 GB)")
    parser.add_argument("--out", type=Path, required=True, help="the record, JSON")
    parser.add_argument("--family", default="z-image", choices=("z-image", "klein"), help="which source the pixel model is of; klein: not released")
    parser.add_argument("--train", default="released", choices=("paper", "released", "full", "head-only"))
    parser.add_argument("--ends", type=int, default=5, help="main blocks trained at either end")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recompute", default="all", choices=("none", "frozen", "all"), help="ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="the commit of the programs, where this is no checkout")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to try this script")
    arguments = parser.parse_args()
    sys.exit(0 if check(arguments) else 1)


if __name__ == "__main__":
    main() if "--programs" in sys.argv else serve(make)
