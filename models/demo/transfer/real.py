#!/usr/bin/env python3
"""Makes the data sets of real pictures that the ablation "source data against real pictures" trains on: for every prompt of
`prompts.jsonl` (`train/`) and of `held_out.jsonl` (`held-out/`), in the same order, the picture of the emoji that has it as
a caption, on white, 128x128.

    python3 real.py --pack .demo-pack --out real

`--pack` is the folder that `../train_source/prepare.py` wrote. Needs Pillow. The result has some 12 MB.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
SIDE = 128
QUALITY = 92


def flatten(picture: bytes) -> Image.Image:
    """A WebP with alpha on white; white comes first and scaling second, so that half-transparent edges keep their colour."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    return flat.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_set(archive: zipfile.ZipFile, codes: dict[str, str], prompts: list[str], folder: Path) -> None:
    """The pictures of the prompts and their metadata; a picture of several prompts is written once."""
    folder.mkdir(parents=True, exist_ok=True)
    for code in sorted({codes[prompt] for prompt in prompts}):
        flatten(archive.read(f"{code}.webp")).save(folder / f"{code}.webp", quality=QUALITY, method=6)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as out:
        for number, prompt in enumerate(prompts):
            line = {"file_name": f"{codes[prompt]}.webp", "prompt": prompt, "seed": number}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_prompts(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    codes: dict[str, str] = {}
    with open(args.pack / "captions.jsonl", encoding="utf-8") as lines:
        for entry in map(json.loads, lines):
            for caption in entry["captions"]:
                codes.setdefault(caption, entry["code"])
    sets = {"train": read_prompts(HERE / "prompts.jsonl"), "held-out": read_prompts(HERE / "held_out.jsonl")}
    for prompt in (prompt for prompts in sets.values() for prompt in prompts):
        if prompt not in codes:
            raise SystemExit(f"{args.pack}: no picture has the caption {prompt!r}")
    with zipfile.ZipFile(args.pack / "images.zip") as archive:
        for name, prompts in sets.items():
            write_set(archive, codes, prompts, args.out / name)


if __name__ == "__main__":
    main()
