#!/usr/bin/env python3
"""Chooses the prompts that the source model draws for the transfer, from the captions of the data pack that
`../train_source/prepare.py` builds:

    prompts.jsonl   what is trained on, in random order, so that the first N are as good a sample as all
    held_out.jsonl  prompts of the same kinds that are never trained on

Every prompt occurs once. A caption is chosen with the weight that the source model saw it with: that of its emoji times
the slots it fills.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent


def choose(entries: list[dict], count: int, draw: random.Random) -> list[str]:
    """`count` different captions, drawn without replacement by weight, in the order of drawing."""
    weights: Counter[str] = Counter()
    for entry in entries:
        for caption, slots in Counter(entry["captions"]).items():
            weights[caption] += entry["weight"] * slots
    # The smallest of exponential variables with these rates is each with a probability in proportion to its rate.
    keys = {caption: draw.expovariate(weight) for caption, weight in weights.items()}
    return sorted(keys, key=keys.__getitem__)[:count]


def write(path: Path, prompts: list[str]) -> None:
    lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--prompts", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()

    with open(args.pack / "captions.jsonl", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    draw = random.Random(0)
    chosen = choose(entries, args.prompts + args.held_out, draw)
    # Drawing puts the heavy ones first.
    draw.shuffle(chosen)
    write(args.out / "held_out.jsonl", chosen[: args.held_out])
    write(args.out / "prompts.jsonl", chosen[args.held_out :])


if __name__ == "__main__":
    main()
