"""Lays pictures that l2p-sample drew beside the dataset pictures of the same prompts.

    l2p-sample --model models/demo/source --prompts models/demo/train_source/prompts.jsonl --out pictures
    python models/demo/contact_sheet.py pictures --out docs/contact-sheet.png

Prompt and settings of each picture are read from its own PNG text; a picture of another prompt is an error. Needs Pillow.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SIDE = 128
COLUMNS = 4
LABEL = 20
GAP = 12
HEADER = 34
BACKGROUND, TEXT = (224, 224, 224), (20, 20, 20)


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]


def read_references(folder: Path, prompts: list[str]) -> list[Image.Image]:
    """The dataset pictures of the prompts."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    files = {entry["text"]: folder / entry["file_name"] for entry in map(json.loads, lines)}
    missing = [prompt for prompt in prompts if prompt not in files]
    if missing:
        raise SystemExit(f"{folder}: holds no picture of {missing[0]!r}")
    return [Image.open(files[prompt]).convert("RGB") for prompt in prompts]


def read_drawn(path: Path, prompt: str) -> tuple[Image.Image, dict]:
    image = Image.open(path)
    image.load()
    if "l2p" not in image.text:
        raise SystemExit(f"{path}: carries no settings; it must be a PNG file as l2p-sample wrote it")
    settings = json.loads(image.text["l2p"])
    if settings["prompt"] != prompt or image.size != (SIDE, SIDE):
        raise SystemExit(f"{path}: shows {settings['prompt']!r} at {image.size}, expected {prompt!r} at {SIDE}x{SIDE}")
    return image.convert("RGB"), settings


def headline(settings: list[dict]) -> str:
    first = settings[0]
    seeds = [entry["seed"] for entry in settings]
    return (
        f"left: picture of the dataset      right: drawn by l2p-sample, {first['steps']} steps, cfg {first['cfg']:g}, "
        f"shift {first['shift']:g}, seeds {min(seeds)} to {max(seeds)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the folder that l2p-sample wrote")
    parser.add_argument("--prompts", type=Path, default=HERE / "train_source/prompts.jsonl")
    parser.add_argument("--references", type=Path, default=HERE / "pictures")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    prompts = read_prompts(arguments.prompts)
    files = sorted(arguments.pictures.glob("*.png"))
    if len(files) != len(prompts):
        raise SystemExit(f"{arguments.pictures}: holds {len(files)} PNG files for {len(prompts)} prompts")
    references = read_references(arguments.references, prompts)
    drawn = [read_drawn(file, prompt) for file, prompt in zip(files, prompts, strict=True)]

    cell = (2 * SIDE + GAP, SIDE + LABEL + GAP)
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (GAP + COLUMNS * cell[0], HEADER + rows * cell[1]), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((GAP, 10), headline([settings for _, settings in drawn]), TEXT, font)
    for index, (prompt, reference, (picture, _)) in enumerate(zip(prompts, references, drawn, strict=True)):
        x, y = GAP + index % COLUMNS * cell[0], HEADER + index // COLUMNS * cell[1]
        sheet.paste(reference, (x, y))
        sheet.paste(picture, (x + SIDE, y))
        draw.text((x, y + SIDE + 2), prompt, TEXT, font)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
