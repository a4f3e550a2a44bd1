#!/usr/bin/env python3
"""Makes the data sets of real pictures that the demo's high-resolution model is trained on, from the data pack that
`../train_source/prepare.py` builds.

    python3 prepare.py --pack .demo-pack --out large-data

`train/` holds pictures, chosen with the weights that the source model saw them with, each under its name and under another of its
captions; `held-out/` holds pictures that are in no line of `train/`, under their names. The pictures stay as they were published, 256x256
with transparency: l2p-train lays them on white and enlarges them. Needs nothing but Python; the result has some 13 MB.
"""

import argparse
import json
import random
import zipfile
from pathlib import Path


def choose(entries: list[dict], count: int, draw: random.Random) -> list[dict]:
    """`count` entries, drawn without replacement by weight: the smallest of exponential variables with these rates."""
    keys = [(draw.expovariate(entry["weight"]), number) for number, entry in enumerate(entries)]
    return [entries[number] for _, number in sorted(keys)[:count]]


def write_set(archive: zipfile.ZipFile, lines: list[tuple[str, str]], folder: Path) -> None:
    """The pictures of (code, caption) pairs and their metadata; a picture of several captions is written once."""
    folder.mkdir(parents=True, exist_ok=True)
    for code in sorted({code for code, _ in lines}):
        (folder / f"{code}.webp").write_bytes(archive.read(f"{code}.webp"))
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as out:
        for number, (code, caption) in enumerate(lines):
            line = {"file_name": f"{code}.webp", "prompt": caption, "seed": number}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    with open(arguments.pack / "captions.jsonl", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    draw = random.Random(0)
    chosen = choose(entries, arguments.pictures + arguments.held_out, draw)
    # Drawing puts the heavy ones first.
    draw.shuffle(chosen)
    held_out, train = chosen[: arguments.held_out], chosen[arguments.held_out :]
    pairs = [(entry["code"], entry["name"]) for entry in train]
    pairs += [(entry["code"], draw.choice(entry["captions"])) for entry in train]
    draw.shuffle(pairs)
    with zipfile.ZipFile(arguments.pack / "images.zip") as archive:
        write_set(archive, pairs, arguments.out / "train")
        write_set(archive, [(entry["code"], entry["name"]) for entry in held_out], arguments.out / "held-out")


if __name__ == "__main__":
    main()
