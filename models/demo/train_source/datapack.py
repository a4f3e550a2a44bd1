"""Reads the data pack of `prepare.py` into tensors."""

import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_SIZE = 128


@dataclass
class DataPack:
    """Pictures and captions, row by row; `ids` and `lengths` are [images, slots, tokens] and [images, slots]."""

    images: torch.Tensor  # uint8 [images, 3, IMAGE_SIZE, IMAGE_SIZE]
    weights: torch.Tensor  # sampling weight of every image
    captions: list[list[str]]
    ids: torch.Tensor
    lengths: torch.Tensor
    empty_ids: torch.Tensor
    empty_length: torch.Tensor

    def to(self, device: torch.device) -> "DataPack":
        """The same pack with its tensors on `device`."""
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return DataPack(captions=self.captions, **moved)

    def find(self, caption: str) -> tuple[int, int]:
        """Row and slot of the image that is captioned exactly like this."""
        return find_caption(self.captions, caption)


def find_caption(captions: list[list[str]], wanted: str) -> tuple[int, int]:
    for row, slots in enumerate(captions):
        if wanted in slots:
            return row, slots.index(wanted)
    raise KeyError(f"no image has the caption {wanted!r}")


def flatten(picture: bytes) -> np.ndarray:
    """A WebP with alpha as RGB on white, [3, IMAGE_SIZE, IMAGE_SIZE].

    White comes first and scaling second, so that half-transparent edges keep their colour.
    """
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    flat = flat.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(flat).transpose(2, 0, 1)


def choose_rows(captions: list[list[str]], first: list[str], limit: int | None) -> list[int]:
    """All rows, or `limit` of them with the images of the captions `first` among them."""
    rows = list(range(len(captions)))
    if limit is None:
        return rows
    needed = [find_caption(captions, caption)[0] for caption in first]
    return (needed + [row for row in rows if row not in needed])[: max(limit, len(needed))]


def load(folder: Path, prompts: list[str], limit: int | None = None) -> DataPack:
    """Loads the whole pack, or for quick tests `limit` images that include those of `prompts`."""
    with open(folder / "captions.jsonl", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    rows = choose_rows([entry["captions"] for entry in entries], prompts, limit)
    entries = [entries[row] for row in rows]
    with zipfile.ZipFile(folder / "images.zip") as archive:
        files = [archive.read(f"{entry['code']}.webp") for entry in entries]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(flatten, files)))
    tokens = np.load(folder / "tokens.npz")
    return DataPack(
        images=torch.from_numpy(images),
        weights=torch.tensor([entry["weight"] for entry in entries]),
        captions=[entry["captions"] for entry in entries],
        ids=torch.from_numpy(tokens["ids"][rows].astype(np.int64)),
        lengths=torch.from_numpy(tokens["lengths"][rows].astype(np.int64)),
        empty_ids=torch.from_numpy(tokens["empty_ids"].astype(np.int64)),
        empty_length=torch.tensor(int(tokens["empty_length"])),
    )
