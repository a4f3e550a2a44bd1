"""A source model with random weights, of the published sizes or small, as a folder that diffusers and l2p read alike.

    python bench/peers/random_source.py --out DIR [--tiny] [--device cuda]

Started by `bench-synthesize` where it is given no model. Weights have the deviations of tests/fixtures/full_size.py, so that
activations stay near 1; the autoencoder's pictures are noise, the hardest that can be to write. The largest part, 12 GB, is made on the
device in bf16.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

import torch
from torch import nn

from peer import use_fixtures

use_fixtures()

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel  # noqa: E402
from full_size import LATENT, QWEN3_4B, VAE, distribution  # noqa: E402
from groups import models, vae  # noqa: E402
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model  # noqa: E402

#: A small text encoder; its vocabulary is the tokenizer's.
SMALL_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


def fill(make: type[nn.Module], config: object, device: torch.device, seed: int) -> nn.Module:
    """A module in bf16 with random weights."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = make(**config) if isinstance(config, dict) else make(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = distribution(name, tuple(parameter.shape))
            parameter.normal_(mean, deviation, generator=generator)
    return model.eval()


def tokenizer(folder: Path) -> AutoTokenizer:
    """Qwen3's, from the fixtures."""
    import full_size

    source = Path(full_size.__file__).parent / "tokenizer-qwen3"
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(source / "tokenizer.json.gz") as packed, open(folder / "tokenizer.json", "wb") as out:
        shutil.copyfileobj(packed, out)
    shutil.copy(source / "tokenizer_config.json", folder)
    return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small sizes, same structure and files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    device, tiny = torch.device(arguments.device), arguments.tiny
    sizes = {**QWEN3_4B, **SMALL_TEXT} if tiny else dict(QWEN3_4B)
    sizes.pop("vocab_size", None)
    words = tokenizer(arguments.out / "tokenizer")
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    text = Qwen3Config(**sizes, vocab_size=QWEN3_4B["vocab_size"], rope_parameters=rope)
    transformer = {**models.latent_config(256), "cap_feat_dim": 128} if tiny else LATENT
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=fill(AutoencoderKL, vae.CONFIG if tiny else VAE, device, arguments.seed),
        text_encoder=fill(Qwen3Model, text, device, arguments.seed + 1),
        tokenizer=words,
        transformer=fill(ZImageTransformer2DModel, transformer, device, arguments.seed + 2),
    )
    pipeline.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
