"""Lays pictures that l2p-sample drew with one or more models beside the dataset pictures of the same prompts.

    for model in source pixel; do
        l2p-sample --model models/demo/$model --prompts models/demo/train_source/prompts.jsonl --out pictures/$model
    done
    python models/demo/contact_sheet.py pictures/source pictures/pixel --out docs/contact-sheet.png

The folders' names say which model drew what. Prompt and settings of each picture are read from its own PNG text; a picture of another prompt is an error. Needs Pillow.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SIDE = 128
COLUMNS = 3
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


def read_folder(folder: Path, prompts: list[str]) -> tuple[list[Image.Image], list[dict]]:
    """The pictures of the prompts, in their order, and the settings that they were drawn with."""
    files = sorted(folder.glob("*.png"))
    if len(files) != len(prompts):
        raise SystemExit(f"{folder}: holds {len(files)} PNG files for {len(prompts)} prompts")
    drawn = [read_drawn(file, prompt) for file, prompt in zip(files, prompts, strict=True)]
    return [picture for picture, _ in drawn], [settings for _, settings in drawn]


def headline(names: list[str], settings: list[dict]) -> str:
    first = settings[0]
    seeds = [entry["seed"] for entry in settings]
    return (
        f"from the left: picture of the dataset, drawn by l2p-sample with the {' and the '.join(names)} model; "
        f"{first['steps']} steps, cfg {first['cfg']:g}, shift {first['shift']:g}, seeds {min(seeds)} to {max(seeds)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+", help="folders that l2p-sample wrote")
    parser.add_argument("--prompts", type=Path, default=HERE / "train_source/prompts.jsonl")
    parser.add_argument("--references", type=Path, default=HERE / "pictures")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    prompts = read_prompts(arguments.prompts)
    drawn, settings = zip(*(read_folder(folder, prompts) for folder in arguments.pictures), strict=True)
    columns = [read_references(arguments.references, prompts), *drawn]

    cell = (len(columns) * SIDE + GAP, SIDE + LABEL + GAP)
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (GAP + COLUMNS * cell[0], HEADER + rows * cell[1]), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((GAP, 10), headline([folder.name for folder in arguments.pictures], settings[0]), TEXT, font)
    for index, (prompt, *pictures) in enumerate(zip(prompts, *columns, strict=True)):
        x, y = GAP + index % COLUMNS * cell[0], HEADER + index // COLUMNS * cell[1]
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (x + column * SIDE, y))
        draw.text((x, y + SIDE + 2), prompt, TEXT, font)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
