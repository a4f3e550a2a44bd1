"""Writes the model in the diffusers layout, packs it for transport, draws contact sheets, and loads it back."""

import copy
import io
import json
import shutil
import tarfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from flow import SHIFT, FlowModel

# They announce every cast and every file.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

# Files of a size that any host takes.
SHARD_SIZE = "14MB"
PART_BYTES = 15 * 2**20
SCHEDULER = {"num_train_timesteps": 1000, "shift": SHIFT, "use_dynamic_shifting": False}
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen3Model"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Rounds all weights to bf16 in place, so that what is measured is what is saved."""
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16())


def bf16_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", torch.bfloat16)


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    bf16_copy(vae).to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae", max_shard_size=SHARD_SIZE)


def save_text_encoder(text: nn.Module, folder: Path) -> None:
    """Saved as published checkpoints are: the language model's names (`model.…`) with tied embeddings left out."""
    with torch.device("meta"):
        language_model = Qwen3ForCausalLM(copy.deepcopy(text.config))
    language_model.model = bf16_copy(text)
    language_model.tie_weights()
    language_model.config.dtype = torch.bfloat16
    language_model.save_pretrained(folder / "text_encoder", max_shard_size=SHARD_SIZE)


def save_flow(model: FlowModel, folder: Path) -> None:
    bf16_copy(model.dit).save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
    save_text_encoder(model.text, folder)


def save_frame(tokenizer: Path, folder: Path) -> None:
    """Everything that is not trained here: model index, scheduler, tokenizer."""
    index = {"_class_name": "ZImagePipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: list(parts) for name, parts in PARTS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)


def readable_by_all(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The libraries write weights readable by their owner only."""
    entry.mode = 0o755 if entry.isdir() else 0o644
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def pack_model(folder: Path, out: Path) -> list[int]:
    """Writes `folder` as source.tar.00, .01, … below `out`; `cat source.tar.* | tar x` restores it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname="source", filter=readable_by_all)
    data = buffer.getvalue()
    parts = [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
    for number, part in enumerate(parts):
        # Renamed into place: an interrupted run leaves the previous whole part.
        unfinished = out / "unfinished"
        unfinished.write_bytes(part)
        unfinished.replace(out / f"source.tar.{number:02}")
    return [len(part) for part in parts]


def to_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def contact_sheet(prompts: list[str], columns: list[Tensor], path: Path, across: int = 4) -> None:
    """A grid of prompts; each cell shows the prompt's picture of every column side by side."""
    size, gap, caption = columns[0].shape[-1], 12, 16
    width, height = len(columns) * size + gap, size + caption + gap
    rows = -(-len(prompts) // across)
    sheet = Image.new("RGB", (across * width + gap, rows * height + gap), (225, 225, 225))
    draw = ImageDraw.Draw(sheet)
    for place, prompt in enumerate(prompts):
        left, top = gap + place % across * width, gap + place // across * height
        for number, column in enumerate(columns):
            sheet.paste(Image.fromarray(to_array(column[place])), (left + number * size, top))
        draw.text((left, top + size + 2), prompt, fill="black")
    sheet.save(path, optimize=True)


def draw_with_pipeline(
    folder: Path, prompt: str, noise: Tensor, steps: int, cfg: float, device: torch.device
) -> Tensor:
    """Loads the saved model with diffusers and draws one prompt from `noise`; uint8 [3, size, size]."""
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    size = noise.shape[-1] * 8
    image = pipeline(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=cfg - 1,
        latents=noise[None].to(device),
    ).images[0]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
