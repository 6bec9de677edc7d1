"""Seeded tiny targets, a tiny tokenizer and tiny drafts, built in a moment; knows no decoding and no network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dflash_core.config import DraftConfig, default_target_layer_ids
from dflash_core.model import DFlashDraftModel

VOCAB_SIZE = 128
SLIDING_WINDOW = 8
SPECIAL_TOKENS = ("<|unk|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
STOP_TOKEN_ID = 2
MASK_TOKEN_ID = 127
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Byte-level spelling: "Ġ" is the space, "Ċ" the newline. Every merge adds a token; 100 + 27 = 127, id 127 is the mask.
MERGES = (
    "Ġ t|h e|i n|r e|o n|a t|e r|o r|e n|a n|i s|e s|e d|o u|l l|s t|"
    "a r|i t|a s|a l|Ġ a|Ġ s|Ġ w|Ġt he|o f|in g|an d"
)  # fmt: skip


def tiny_tokenizer() -> Any:
    """A fast byte-level BPE of 127 tokens: 4 specials, printable ASCII and newline, 27 merges; ChatML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["Ċ", "Ġ", *(chr(code) for code in range(33, 127))]
    merges = [tuple(merge.split(" ")) for merge in MERGES.split("|")]
    words = [*SPECIAL_TOKENS, *characters, *("".join(merge) for merge in merges)]
    vocab = {word: index for index, word in enumerate(words)}
    assert len(vocab) == len(words) == VOCAB_SIZE - 1
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|unk|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _settings(overrides: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Shared shape, then the architecture's own, then the test's."""
    shared = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=STOP_TOKEN_ID,
        pad_token_id=3,
    )
    return shared | own | overrides


def _build(model_class: Any, config: Any, seed: int) -> Any:
    """Weights wide enough that greedy choices differ from token to token and are far from ties."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.1 if "embed" in name else 2.0 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = config.eos_token_id
    return model.to(torch.float32).eval()


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(LlamaForCausalLM, LlamaConfig(**_settings(overrides)), seed)


def tiny_qwen3(seed: int = 0, **overrides: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, Qwen3Config(**_settings(overrides, num_hidden_layers=5)), seed)


def tiny_gemma3(seed: int = 0, **overrides: Any) -> Any:
    """Sliding windows of 8 in four of six layers, tied and scaled embeddings, softcapped logits."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings = _settings(
        overrides,
        num_hidden_layers=6,
        query_pre_attn_scalar=8,
        final_logit_softcapping=5.0,
        tie_word_embeddings=True,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    return _build(Gemma3ForCausalLM, Gemma3TextConfig(**settings), seed)


def tiny_gpt_oss(seed: int = 0, **overrides: Any) -> Any:
    """Alternating windows of 8, attention sinks, four experts of which two answer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = _settings(
        overrides,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return _build(GptOssForCausalLM, GptOssConfig(**settings), seed)


def tiny_qwen3_5(seed: int = 0, **overrides: Any) -> Any:
    """The hybrid: three linear-attention layers, then one full, twice over."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    settings = _settings(
        overrides,
        num_hidden_layers=6,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    )
    return _build(Qwen3_5ForCausalLM, Qwen3_5TextConfig(**settings), seed)


def tiny_recurrent(model_type: str, seed: int = 0) -> Any:
    """A four-layer model of any causal family with recurrent layers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    own: dict[str, Any] = {}
    if model_type.startswith("qwen3"):
        own = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
        own |= dict(layer_types=["linear_attention", "full_attention"] * 2, num_experts=4, num_experts_per_tok=2)
        own |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
    if model_type == "falcon_h1":
        own = dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_chunk_size=16)
    config = AutoConfig.for_model(model_type, **_settings(own))
    return _build(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, seed)


TARGETS: dict[str, Callable[..., Any]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gemma3": tiny_gemma3,
    "gpt_oss": tiny_gpt_oss,
    "qwen3_5": tiny_qwen3_5,
}


def write_target(folder: Path, model: Any) -> Path:
    """Save a target with the tiny tokenizer as a local folder that `load_pair(target=folder)` takes."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_draft_config(target_config: Any, *, block_size: int = 4, layers: int = 2, **overrides: Any) -> DraftConfig:
    """A draft shape for this target: two tapped layers and 4 heads unless told otherwise."""
    shape = dict(
        hidden_size=target_config.hidden_size,
        intermediate_size=2 * target_config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=target_config.vocab_size,
        block_size=block_size,
        mask_token_id=target_config.vocab_size - 1,
        target_layer_ids=default_target_layer_ids(target_config.num_hidden_layers, 2),
        num_target_layers=target_config.num_hidden_layers,
        max_position_embeddings=target_config.max_position_embeddings,
    )
    return DraftConfig(**(shape | overrides))


def tiny_draft(
    target_config: Any, *, block_size: int = 4, layers: int = 2, seed: int = 0, **overrides: Any
) -> DFlashDraftModel:
    """A seeded random float32 draft for this target; it guesses almost nothing right."""
    config = tiny_draft_config(target_config, block_size=block_size, layers=layers, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DFlashDraftModel(config).eval()


def write_draft(folder: Path, draft: DFlashDraftModel, **config_changes: Any) -> Path:
    """Save a draft in the public layout (config.json + model.safetensors); `config_changes` overwrite its json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in draft.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(draft.config.to_dict() | config_changes, indent=2))
    return folder


def tiny_pair(model: Any, draft: DFlashDraftModel | None = None, name: str = "tiny") -> Any:
    """A `Pair` around a built target, without disk: what `load_pair` would return for these two."""
    from dflash_core.loading import Pair
    from dflash_core.target import Target

    return Pair(
        name=name,
        target=Target(model),
        draft=draft,
        tokenizer=tiny_tokenizer(),
        stop_token_ids=(STOP_TOKEN_ID,),
        context_length=model.config.max_position_embeddings,
    )
