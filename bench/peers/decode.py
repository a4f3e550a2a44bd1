"""Prompts and tokens in PyTorch: transformers' Qwen3ForCausalLM and its `generate`.

Started by `bench-decode --peer`; see peer.py. A call is what a user of the library does: prompts in, greedy tokens out, with the
library's own cache; `static` is its cache of fixed size, whose steps it compiles and records itself.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from peer import Context, Way, random_weights, serve

SIZES = {
    False: {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    True: {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
}  # fmt: skip


def build(tiny: bool, context: Context) -> Qwen3ForCausalLM:
    """A model with random weights, made in its type."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(
        **SIZES[tiny], head_dim=128, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=40960,
        rope_parameters=rope, attn_implementation="sdpa",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(context.dtype)
    try:
        with context.device:
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model = random_weights(model, context)
    # Nothing ends a text before it has all its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ways(case: dict, context: Context) -> dict[str, Way]:
    model = build(case["tiny"], context)
    shape = (case["batch"], case["prompt"])
    ids = torch.randint(0, model.config.vocab_size, shape, device=context.device, generator=context.generator)
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": case["tokens"], "min_new_tokens": case["tokens"], "do_sample": False}

    def generate(**cache: str) -> torch.Tensor:
        result = model.generate(input_ids=ids, attention_mask=mask, **settings, **cache)
        if result.shape[1] != case["prompt"] + case["tokens"]:
            raise ValueError(f"{result.shape[1]} tokens are not all that were asked for")
        return result

    found = {"generate": Way(lambda _: generate(), recorded=False)}
    if context.compile and context.cuda:
        found["generate, static"] = Way(lambda _: generate(cache_implementation="static"), recorded=False)
    return found


if __name__ == "__main__":
    serve(ways)
