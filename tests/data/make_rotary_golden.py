#!/usr/bin/env python3
"""Writes golden-rotary.safetensors: keys that Hugging Face's own rotary code has rotated.

    venv/bin/python tests/data/make_rotary_golden.py    # README.md has the packages

A case is a few kept keys of a prompt, as they are before rotation (`NAME.unrotated`, [kept, rotary_dim]
F32), rotated at their original positions (`NAME.before`) and at consecutive ones (`NAME.after`), in
float32. Where the frequencies depend on the sequence, those at the original positions are of a sequence of
`prompt_tokens`, and those at consecutive positions of one that has the kept tokens alone. `NAME.positions`
are the original positions, `NAME.from` and `NAME.to` the inverse frequencies. The metadata `cases` is a
JSON list: name, parameters as a text-format RotaryParameters, prompt_tokens, key_dim, and by what Hugging
Face scales rotated keys.

Of the model that the bundled prompt was captured from (tiny-llama): `model.positions`, and `model.layer.I.after`, [kv_heads, kept, head_dim], the keys of
some layers' prefill of the captured prompt, as its k_proj gave them, rotated at consecutive positions.
"""

import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama

from make_golden import order_metadata

HERE = pathlib.Path(__file__).resolve().parent
CAPTURE = HERE / "capture-tiny-llama-1000.safetensors"
GOLDEN = HERE / "golden-rotary.safetensors"
MODEL = HERE / "tiny-llama"
KEPT = 8
MODEL_KEPT = 40
MODEL_LAYERS = (0, 5, 11)


def config(kind, dim, max_position_embeddings, rope):
    return kind(
        hidden_size=dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope,
    )


# Each takes keys [kept, rotary_dim] and positions [kept], and returns rotated keys, the inverse frequencies
# and the scale. The highest position is that of the sequence's last token.


def half_split(keys, positions, dim, longest, rope):
    rotary = llama.LlamaRotaryEmbedding(config(transformers.LlamaConfig, dim, longest, rope))
    cos, sin = rotary(keys, positions[None])
    rotated, _ = llama.apply_rotary_pos_emb(keys[None, None], keys[None, None], cos, sin)
    return rotated[0, 0], rotary.inv_freq, rotary.attention_scaling


def interleaved(keys, positions, dim, longest, rope):
    rotary = cohere.CohereRotaryEmbedding(config(transformers.CohereConfig, dim, longest, rope))
    cos, sin = rotary(keys, positions[None])
    rotated, _ = cohere.apply_rotary_pos_emb(keys[None, None], keys[None, None], cos, sin)
    return rotated[0, 0], rotary.inv_freq, rotary.attention_scaling


def gpt_j(keys, positions, dim, longest, rope):
    table = gptj.create_sinusoidal_positions(longest, dim)
    sin, cos = torch.split(table[positions][None], dim // 2, dim=-1)
    rotated = gptj.apply_rotary_pos_emb(keys[None, :, None], sin, cos)
    frequencies = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
    return rotated[0, :, 0], frequencies, 1.0


def gpt_neox_part(keys, positions, dim, longest, rope):
    whole = 2 * dim
    made = transformers.GPTNeoXConfig(
        hidden_size=whole,
        num_attention_heads=1,
        max_position_embeddings=longest,
        rotary_pct=0.5,
        rope_parameters={**rope, "partial_rotary_factor": 0.5},
    )
    rotary = gpt_neox.GPTNeoXRotaryEmbedding(made)
    cos, sin = rotary(keys, positions[None])
    padded = torch.cat((keys, torch.ones(len(keys), whole - dim)), -1)[None, None]
    rotated, _ = gpt_neox.apply_rotary_pos_emb(padded, padded, cos, sin)
    assert rotary.inv_freq.numel() == dim // 2
    assert (rotated[0, 0, :, dim:] == 1).all()
    return rotated[0, 0, :, :dim], rotary.inv_freq, rotary.attention_scaling


def deepseek_latent(keys, positions, dim, longest, rope):
    rotary = deepseek.DeepseekV2RotaryEmbedding(
        config(transformers.DeepseekV2Config, dim, longest, rope)
    )
    turns = rotary(keys, positions[None])
    rotated, _ = deepseek.apply_rotary_emb(keys[None, None], keys[None, None], turns)
    return rotated[0, 0], rotary.inv_freq, rotary.attention_scaling


SCALINGS = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 24.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def text(rope, pairing, key_dim, dim, offset, longest):
    fields = [f"rope_theta: {rope['rope_theta']}", f"rope_type: ROPE_TYPE_{rope['rope_type'].upper()}"]
    for name, value in rope.items():
        # Constant factors of rotated keys are no parameters.
        if name not in ("rope_theta", "rope_type", "mscale", "mscale_all_dim"):
            fields.append(f"{name}: {str(value).lower()}")
    if rope["rope_type"] == "dynamic":
        fields.append(f"max_position_embeddings: {longest}")
    if pairing == "interleaved":
        fields.append("pairing: ROTARY_PAIRING_INTERLEAVED")
    if dim != key_dim:
        fields.append(f"rotary_dim: {dim}")
    if offset:
        fields.append(f"rotary_offset: {offset}")
    return " ".join(fields)


class Golden:
    def __init__(self):
        self.tensors, self.cases = {}, []
        self.random = torch.Generator().manual_seed(20261125)

    def positions(self, tokens, kept):
        some = torch.randperm(tokens - 1, generator=self.random)[: kept - 1]
        return torch.cat((some, torch.tensor([tokens - 1]))).sort().values

    def add(self, name, rotate, pairing, tokens, dim, rope, key_dim=None, offset=0, longest=1024):
        key_dim = key_dim or dim
        positions = self.positions(tokens, KEPT)
        keys = torch.randn(KEPT, dim, generator=self.random)
        before, old, scale = rotate(keys, positions, dim, longest, rope)
        after, new, _ = rotate(keys, torch.arange(KEPT), dim, longest, rope)
        for suffix, tensor in (
            ("positions", positions.int()),
            ("unrotated", keys),
            ("before", before),
            ("after", after),
            ("from", old),
            ("to", new),
        ):
            self.tensors[f"{name}.{suffix}"] = tensor.float() if suffix != "positions" else tensor
        self.cases.append(
            {
                "name": name,
                "rotary": text(rope, pairing, key_dim, dim, offset, longest),
                "prompt_tokens": tokens,
                "key_dim": key_dim,
                "scale": scale,
            }
        )
        print(f"{name}: positions {positions.tolist()}, scale {scale:.4f}")


def add_model(golden, directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    captured = load_file(CAPTURE)
    tokens = captured["tokens"].long()
    prompt = captured["layer.0.k"].shape[1]
    made = model.config
    found = {}
    hooks = [
        model.model.layers[i].self_attn.k_proj.register_forward_hook(
            lambda module, inputs, output, i=i: found.__setitem__(i, output[0])
        )
        for i in MODEL_LAYERS
    ]
    with torch.no_grad():
        model(tokens[None, :prompt])
    for hook in hooks:
        hook.remove()
    positions = golden.positions(prompt, MODEL_KEPT)
    golden.tensors["model.positions"] = positions.int()
    rotary = model.model.rotary_emb
    for i in MODEL_LAYERS:
        keys = found[i].view(prompt, made.num_key_value_heads, -1).transpose(0, 1)[None]
        cos, sin = rotary(keys, torch.arange(prompt)[None])
        whole, _ = llama.apply_rotary_pos_emb(keys, keys, cos, sin)
        worst = (whole[0] - captured[f"layer.{i}.k"].float()).abs() / whole[0].abs().clamp(min=1)
        assert worst.max() < 2**-6, f"the capture's keys differ by {worst.max()}: another model"
        keys = keys[:, :, positions]
        cos, sin = rotary(keys, torch.arange(MODEL_KEPT)[None])
        after, _ = llama.apply_rotary_pos_emb(keys, keys, cos, sin)
        golden.tensors[f"model.layer.{i}.after"] = after[0]
        print(f"layer {i}: the capture lies within {worst.max():.5f} of the model's keys")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, type=pathlib.Path)
    directory = parser.parse_args().model
    transformers.logging.set_verbosity_error()
    golden = Golden()

    def rope(kind, theta=10000.0, **more):
        return {"rope_theta": theta, "rope_type": kind, **SCALINGS[kind], **more}

    for kind in SCALINGS:
        golden.add(f"{kind}_half_split", half_split, "half_split", 3000, 64, rope(kind))
        golden.add(f"{kind}_interleaved", interleaved, "interleaved", 3000, 64, rope(kind))
    golden.add("dynamic_not_grown", half_split, "half_split", 1000, 32, rope("dynamic"))
    golden.add(
        "yarn_not_truncated", half_split, "half_split", 3000, 64, rope("yarn", truncate=False)
    )
    golden.add(
        "gptj_part", gpt_j, "interleaved", 2000, 32, rope("default"), key_dim=64, longest=2048
    )
    golden.add(
        "gpt_neox_part", gpt_neox_part, "half_split", 3000, 32, rope("default"), key_dim=64
    )
    golden.add(
        "deepseek_latent",
        deepseek_latent,
        "interleaved",
        3000,
        64,
        rope(
            "yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            beta_fast=32.0,
            mscale=0.707,
            mscale_all_dim=0.5,
        ),
        key_dim=576,
        offset=512,
        longest=163840,
    )
    million = 1_000_000
    golden.add("default_million", half_split, "half_split", million, 32, rope("default", 500000.0))
    golden.add("llama3_million", interleaved, "interleaved", million, 32, rope("llama3", 500000.0))
    golden.add("dynamic_million", half_split, "half_split", million, 32, rope("dynamic"))
    golden.add("yarn_million", half_split, "half_split", million, 32, rope("yarn"))
    add_model(golden, directory)

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file(
        {name: tensor.contiguous() for name, tensor in golden.tensors.items()},
        GOLDEN,
        metadata={"cases": json.dumps(golden.cases), "versions": json.dumps(versions)},
    )
    order_metadata(GOLDEN)


if __name__ == "__main__":
    main()
