"""The model's parts and their batched forward passes for equal sizes.

The parts are the classes of diffusers and transformers, so that what is saved is what those libraries load. Their own
forward passes handle ragged lists item by item; here every item has the same image size and the same padded caption
length, so the same submodules are applied to one dense batch. `check_forward` proves both agree.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

PATCH = 2
LATENT_CHANNELS = 16
CAPTION_TOKENS = 32
TIME_FREQUENCIES = 128
HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """Widths and depths of one model."""

    layers: int
    heads: int
    text_layers: int
    text_hidden: int
    text_heads: int
    text_kv_heads: int
    text_mlp: int
    vae_widths: tuple[int, int, int, int]


# 43 MB in bf16 all told. The text model's last layer never runs, as the features are taken before it.
FULL = Shape(
    layers=5,
    heads=3,
    text_layers=3,
    text_hidden=256,
    text_heads=2,
    text_kv_heads=1,
    text_mlp=384,
    vae_widths=(64, 64, 64, 128),
)
SMOKE = Shape(
    layers=2,
    heads=1,
    text_layers=2,
    text_hidden=64,
    text_heads=2,
    text_kv_heads=1,
    text_mlp=96,
    vae_widths=(16, 16, 16, 32),
)


def build_vae(shape: Shape) -> AutoencoderKL:
    """An autoencoder 8 times smaller on each side."""
    vae = AutoencoderKL(
        block_out_channels=shape.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # With the usual 32 groups these narrow layers would be normalized channel by channel and forget brightness.
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        # Start nearly noise-free; a posterior as wide as the prior would drown the signal in the first steps.
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0
    return vae


def build_text_encoder(shape: Shape, vocabulary: int, pad_id: int, end_id: int) -> Qwen3Model:
    """A small Qwen3 decoder, freshly initialized."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape.text_hidden,
        intermediate_size=shape.text_mlp,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        num_key_value_heads=shape.text_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=pad_id,
        eos_token_id=end_id,
    )
    text = Qwen3Model(config)
    for module in text.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            # Of the size of the layers' outputs, so that a token keeps its identity beside them.
            nn.init.normal_(module.weight, std=0.3)
    return text


def build_dit(shape: Shape) -> ZImageTransformer2DModel:
    """The single-stream transformer with the usual start for diffusion: every modulated block begins as identity."""
    dit = ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        all_f_patch_size=(1,),
        in_channels=LATENT_CHANNELS,
        dim=shape.heads * HEAD_DIM,
        n_layers=shape.layers,
        n_refiner_layers=1,
        n_heads=shape.heads,
        n_kv_heads=shape.heads,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=shape.text_hidden,
        rope_theta=256.0,
        axes_dims=[32, 48, 48],
        axes_lens=[1024, 512, 512],
    )
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (dit.t_embedder.mlp[0], dit.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    final = dit.all_final_layer[f"{PATCH}-1"]
    for layer in (final.linear, final.adaLN_modulation[1]):
        nn.init.zeros_(layer.weight)
    for block in (*dit.noise_refiner, *dit.layers):
        nn.init.zeros_(block.adaLN_modulation[0].weight)
    nn.init.normal_(dit.cap_pad_token, std=0.02)
    return dit


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in the dtype of `x`; the float32 master weights are rounded on the way."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@dataclass
class Rotation:
    """Cosines and sines of a rotary embedding, float32 [tokens, angles]."""

    cos: Tensor
    sin: Tensor


@dataclass
class Rotations:
    """The rotary tables of all token streams of one image size."""

    text: Rotation
    caption: Rotation
    image: Rotation
    joint: Rotation


def image_rotation(dit: ZImageTransformer2DModel, positions: Tensor) -> Rotation:
    table = dit.rope_embedder(positions)
    return Rotation(table.real.contiguous(), table.imag.contiguous())


def build_rotations(
    dit: ZImageTransformer2DModel, text: Qwen3Model, grid: tuple[int, int], device: torch.device
) -> Rotations:
    """Tables for captions padded to CAPTION_TOKENS and `grid` = (rows, columns) image tokens."""
    caption = torch.zeros(CAPTION_TOKENS, 3, dtype=torch.int64)
    caption[:, 0] = torch.arange(1, CAPTION_TOKENS + 1)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    image = torch.stack((torch.full_like(rows, CAPTION_TOKENS + 1), rows, columns), -1).flatten(0, 1)
    angles = torch.outer(torch.arange(CAPTION_TOKENS).float(), text.rotary_emb.inv_freq.float().cpu())
    tables = {
        "text": Rotation(angles.cos(), angles.sin()),
        "caption": image_rotation(dit, caption),
        "image": image_rotation(dit, image),
        "joint": image_rotation(dit, torch.cat((image, caption))),
    }
    return Rotations(**{name: Rotation(r.cos.to(device), r.sin.to(device)) for name, r in tables.items()})


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotation of (first half, second half) pairs, as in Qwen3; `x` is [batch, tokens, heads, dim]."""
    first, second = x.float().chunk(2, -1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotation of neighbouring pairs, as in Z-Image; `x` is [batch, tokens, heads, dim]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of [batch, tokens, heads, dim] tensors, heads merged in the result."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2).flatten(2)


def text_layer(layer: nn.Module, x: Tensor, rotation: Rotation) -> Tensor:
    """One Qwen3 decoder layer."""
    attention = layer.self_attn

    def heads(projection: nn.Linear) -> Tensor:
        return linear(projection, normed).unflatten(-1, (-1, attention.head_dim))

    def normed_heads(projection: nn.Linear, norm: nn.Module) -> Tensor:
        return rotate_halves(rms_norm(heads(projection), norm.weight, norm.variance_epsilon), rotation)

    normed = rms_norm(x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
    query = normed_heads(attention.q_proj, attention.q_norm)
    key = normed_heads(attention.k_proj, attention.k_norm)
    groups = attention.num_key_value_groups
    key, value = key.repeat_interleave(groups, 2), heads(attention.v_proj).repeat_interleave(groups, 2)
    x = x + linear(attention.o_proj, attend(query, key, value, causal=True))

    mlp, norm = layer.mlp, layer.post_attention_layernorm
    normed = rms_norm(x, norm.weight, norm.variance_epsilon)
    return x + linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, normed)) * linear(mlp.up_proj, normed))


def text_features(text: Qwen3Model, ids: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
    """`hidden_states[-2]` of right-padded ids.

    The mask is causal only: padding stands on the right, so no real token sees it, and what it yields is replaced by
    the transformer's pad token.
    """
    x = F.embedding(ids, text.embed_tokens.weight).to(dtype)
    for layer in text.layers[:-1]:
        x = text_layer(layer, x, rotation)
    return x


def dit_block(block: nn.Module, x: Tensor, rotation: Rotation, condition: Tensor | None) -> Tensor:
    """One transformer block; `condition` [batch, width] modulates it, the caption refiner goes without."""
    scale_attention = scale_mlp = gate_attention = gate_mlp = 1.0
    if condition is not None:
        modulation = linear(block.adaLN_modulation[0], condition)[:, None]
        scale_attention, gate_attention, scale_mlp, gate_mlp = modulation.chunk(4, -1)
        scale_attention, scale_mlp = 1 + scale_attention, 1 + scale_mlp
        gate_attention, gate_mlp = gate_attention.tanh(), gate_mlp.tanh()

    def norm(layer: nn.Module, tokens: Tensor) -> Tensor:
        return rms_norm(tokens, layer.weight, layer.eps)

    attention = block.attention
    normed = norm(block.attention_norm1, x) * scale_attention
    query, key, value = (
        linear(projection, normed).unflatten(-1, (attention.heads, -1))
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    query = rotate_pairs(norm(attention.norm_q, query), rotation)
    key = rotate_pairs(norm(attention.norm_k, key), rotation)
    mixed = linear(attention.to_out[0], attend(query, key, value, causal=False))
    x = x + gate_attention * norm(block.attention_norm2, mixed)

    mlp = block.feed_forward
    normed = norm(block.ffn_norm1, x) * scale_mlp
    mixed = linear(mlp.w2, F.silu(linear(mlp.w1, normed)) * linear(mlp.w3, normed))
    return x + gate_mlp * norm(block.ffn_norm2, mixed)


def embed_time(dit: ZImageTransformer2DModel, t: Tensor, dtype: torch.dtype) -> Tensor:
    """The condition vector of `t` = 1 - sigma."""
    steps = torch.arange(TIME_FREQUENCIES, device=t.device, dtype=torch.float32)
    angles = (t * dit.t_scale)[:, None] * torch.exp(-math.log(10000) / TIME_FREQUENCIES * steps)
    waves = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    mlp = dit.t_embedder.mlp
    return linear(mlp[2], F.silu(linear(mlp[0], waves)))


def patchify(latents: Tensor) -> Tensor:
    """[batch, channels, H, W] -> [batch, tokens, values]; inside a patch (row, column, channel), channel fastest."""
    x = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`."""
    x = tokens.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def dit_output(
    dit: ZImageTransformer2DModel, latents: Tensor, t: Tensor, features: Tensor, lengths: Tensor, tables: Rotations
) -> Tensor:
    """The raw output (negative velocity) for equal-sized latents and captions padded to CAPTION_TOKENS."""
    dtype = features.dtype
    grid = (latents.shape[2] // PATCH, latents.shape[3] // PATCH)
    condition = embed_time(dit, t, dtype)

    image = linear(dit.all_x_embedder[f"{PATCH}-1"], patchify(latents.to(dtype)))
    for block in dit.noise_refiner:
        image = dit_block(block, image, tables.image, condition)

    norm, project = dit.cap_embedder
    caption = linear(project, rms_norm(features, norm.weight, norm.eps))
    is_pad = torch.arange(CAPTION_TOKENS, device=lengths.device) >= lengths[:, None]
    caption = torch.where(is_pad[..., None], dit.cap_pad_token.to(dtype), caption)
    for block in dit.context_refiner:
        caption = dit_block(block, caption, tables.caption, None)

    tokens = torch.cat((image, caption), 1)
    for block in dit.layers:
        tokens = dit_block(block, tokens, tables.joint, condition)

    final = dit.all_final_layer[f"{PATCH}-1"]
    scale = 1 + linear(final.adaLN_modulation[1], F.silu(condition))[:, None]
    image = tokens[:, : grid[0] * grid[1]].float()
    image = F.layer_norm(image, image.shape[-1:], eps=final.norm_final.eps).to(dtype) * scale
    return unpatchify(linear(final.linear, image), grid)


@torch.no_grad()
def randomized(module: nn.Module) -> nn.Module:
    """Adds noise to every parameter, so that no branch that starts as zero or identity hides from `check_forward`."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.05)
    return module


@torch.no_grad()
def check_forward(shape: Shape, vocabulary: int) -> float:
    """Relative error of the batched passes against diffusers and transformers, float32 on the CPU."""
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    text = randomized(build_text_encoder(shape, vocabulary, 0, 1)).eval()
    dit = randomized(build_dit(shape)).eval()
    lengths = torch.tensor([CAPTION_TOKENS, 9, 17])
    ids = torch.randint(vocabulary, (3, CAPTION_TOKENS))
    latents, t = torch.randn(3, LATENT_CHANNELS, 16, 16), torch.tensor([0.0, 0.3, 0.95])

    mask = torch.arange(CAPTION_TOKENS) < lengths[:, None]
    hidden = text(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    captions = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
    wanted = dit(list(latents[:, :, None].unbind(0)), t, captions, return_dict=False)[0]
    wanted = torch.stack(wanted)[:, :, 0]

    tables = build_rotations(dit, text, (8, 8), torch.device("cpu"))
    features = text_features(text, ids, tables.text, torch.float32)
    got = dit_output(dit, latents, t, features, lengths, tables)
    torch.random.set_rng_state(state)
    return ((got - wanted).norm() / wanted.norm()).item()
