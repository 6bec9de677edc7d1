"""A tiny quantized GGUF inside a real wheel, so that pip, the check and the conversion run offline; knows no test."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from dflash_core.default_target import WheelSource
from tests.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

MEMBER = "tiny_gguf/tiny.gguf"
HEADS, KV_HEADS, LAYERS = 4, 2, 2
SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-5,
)  # fmt: skip
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores a Llama's q and k with each rotary pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def halve(weight: np.ndarray, heads: int) -> np.ndarray:
    """The way back: first halves of all pairs, then second halves."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a Q4_1 Llama with the tiny tokenizer; returns the weights that a reader must find, float32."""
    writer = GGUFWriter(path, "llama")
    _write_facts(writer)
    expected: dict[str, torch.Tensor] = {}
    model = tiny_llama(**SHAPE).state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    names |= {
        f"blk.{i}.{short}": f"model.layers.{i}.{long}" for i in range(LAYERS) for short, long in LAYER_NAMES.items()
    }
    for short, long in names.items():
        expected[f"{long}.weight"] = _write_tensor(writer, f"{short}.weight", model[f"{long}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_facts(writer: Any) -> None:
    tokenizer = tiny_tokenizer()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) + ["<|endoftext|>"]
    writer.add_context_length(512)
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(SHAPE["head_dim"])
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def _write_tensor(writer: Any, name: str, weight: np.ndarray) -> torch.Tensor:
    """Store one weight as the real file does (norms float32, embedding Q8_0, matrices Q4_1); returns what it became."""
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return torch.from_numpy(weight)
    kind = GGMLQuantizationType.Q8_0 if "embd" in name else GGMLQuantizationType.Q4_1
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    packed = quantize(weight if heads is None else interleave(weight, heads), kind)
    writer.add_tensor(name, packed, raw_dtype=kind)
    plain = dequantize(packed, kind)
    return torch.from_numpy(plain if heads is None else halve(plain, heads).copy())


def write_wheel(folder: Path, gguf: Path) -> WheelSource:
    """A wheel that pip accepts, holding the GGUF, and the record that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_gguf-0.0.1-py3-none-any.whl"
    info = "tiny_gguf-0.0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 0.0.1\nRequires-Dist: absent\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{MEMBER},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    content = wheel.read_bytes()
    return WheelSource(
        folder_name="tiny",
        requirement="tiny-gguf==0.0.1",
        sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=len(content),
        member=MEMBER,
        needed_bytes=1_000_000,
    )
