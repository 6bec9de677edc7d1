"""Pairs: good checkpoints load and are what they say, broken ones end in a sentence before anything large is read."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_core import loading, target_files
from dflash_core.draft_files import load_draft
from dflash_core.errors import LoadError
from dflash_core.loading import KNOWN_PAIRS, Pair, load_pair
from dflash_core.target import Target
from tests.tiny import TARGETS, tiny_draft, tiny_llama, tiny_qwen3, tiny_recurrent, write_draft, write_target

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def quiet(message: str, fraction: float | None) -> None:
    """A progress callback that draws nothing."""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a `target` and a `draft` that fit."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny_qwen3()
    write_target(folder / "target", model)
    write_draft(folder / "draft", tiny_draft(model.config))
    return folder


@pytest.fixture
def copy(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


def load(folder: Path, **options: Any) -> Pair:
    return load_pair(**({"target": folder / "target", "draft": folder / "draft", "progress": quiet} | options))


def edit_json(path: Path, **changes: Any) -> None:
    """Overwrite keys of a JSON file; None removes one."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def shard(folder: Path, shards: int = 2) -> None:
    """Spread one weight file over several with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    homes = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, home in homes.items() if home == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    (folder / WEIGHTS).unlink()


# --- what a good checkpoint gives ---------------------------------------------------------------------------------


def test_a_pair_is_what_its_folders_say(good):
    pair = load(good)
    assert (pair.name, pair.block_size, pair.device, pair.dtype) == ("target + draft", 4, "cpu", "float32")
    assert (pair.stop_token_ids, pair.context_length, pair.chat_template_kwargs) == ((2,), 512, {})
    assert pair.target_parameters == sum(p.numel() for p in tiny_qwen3().parameters())
    assert pair.draft_parameters == sum(value.numel() for value in load_file(good / "draft" / WEIGHTS).values())
    assert not pair.draft.training and not any(p.requires_grad for p in pair.draft.parameters())
    assert pair.tokenizer.decode(pair.tokenizer.encode("the king")) == "the king"


def test_a_pair_leaves_cores_to_the_rest_of_the_program(good):
    before = torch.get_num_threads()
    try:
        pair = load(good, spare_cores=1)
        assert pair.threads == torch.get_num_threads() == max(1, loading.ALL_THREADS - 1)
        # Loading again takes no further core away, and at least one is left to the pair.
        assert load(good, spare_cores=1).threads == pair.threads
        assert load(good, spare_cores=1000).place == "cpu, 1 thread"
    finally:
        torch.set_num_threads(before)
    assert load(good).threads == before


@pytest.mark.parametrize("rope", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}])
def test_a_loaded_draft_computes_what_the_saved_one_did(tmp_path, rope):
    rope = {"rope_type": "default", "rope_theta": 5000.0} | (rope or {})
    draft = tiny_draft(tiny_qwen3().config, rope_parameters=rope)
    folder = write_draft(tmp_path, draft)
    again = load_draft([folder / WEIGHTS], draft.config, torch.device("cpu"), torch.float32)
    block, context = torch.randn(1, 4, 32), torch.randn(1, 9, 32)
    where = torch.arange(13)[None]
    with torch.inference_mode():
        outputs = [d(block, context, where[:, 9:], where[:, :9]) for d in (draft, again)]
    assert torch.equal(*outputs)


def test_a_draft_takes_the_targets_dtype(good):
    pair = load(good, dtype="bfloat16")
    assert pair.dtype == "bfloat16" and {p.dtype for p in pair.draft.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", TARGETS)
def test_every_target_family_loads_with_a_draft(kind, tmp_path):
    model = TARGETS[kind]()
    write_target(tmp_path / "target", model)
    write_draft(tmp_path / "draft", tiny_draft(model.config))
    pair = load(tmp_path)
    assert pair.block_size == 4
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), pair.target.model.state_dict().values(), strict=True)
    )


def test_sharded_checkpoints_and_a_device_map_load(copy):
    shard(copy / "target")
    shard(copy / "draft", shards=3)
    pair = load(copy, device_map="cpu")
    whole = load_file(copy.parent / "copy" / "draft" / "model-00001-of-00003.safetensors")
    assert all(torch.equal(pair.draft.state_dict()[name], value) for name, value in whole.items())


@pytest.mark.parametrize("draft", [None, "none"])
def test_a_target_alone_is_a_pair_without_a_draft(good, draft):
    pair = load(good, draft=draft)
    assert (pair.name, pair.draft, pair.block_size, pair.draft_parameters) == ("target", None, None, None)


def test_the_memory_of_a_dropped_pair_is_free(good):
    pair = load(good)
    alive = [weakref.ref(pair.target.model), weakref.ref(pair.draft)]
    del pair
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_progress_ends_ready_and_leaves_the_bars_of_transformers_as_they_were(good):
    from transformers.utils import logging

    seen: list[tuple[str, float | None]] = []
    assert logging.is_progress_bar_enabled()
    load(good, progress=lambda *report: seen.append(report))
    assert [message for message, _ in seen] == ["Loading the target", "Loading the draft model", "Ready"]
    assert seen[-1][1] == 1.0 and logging.is_progress_bar_enabled()


def test_a_terminal_gets_a_bar_and_a_pipe_does_not(good, capfd):
    load(good, progress=None)
    assert capfd.readouterr() == ("", "")


def test_stop_ids_are_those_of_generate(copy):
    edit_json(copy / "target" / "generation_config.json", eos_token_id=[2, 5])
    assert load(copy).stop_token_ids == (2, 5)
    (copy / "target" / "generation_config.json").unlink()
    assert load(copy).stop_token_ids == (2,)


def test_known_pairs_name_their_sources():
    sources = {name: (known.target, known.draft) for name, known in KNOWN_PAIRS.items()}
    assert sources.pop("smollm2-135m") == ("embedded", str(loading.DRAFTS_FOLDER / "smollm2-135m"))
    assert sources == {
        "qwen3-4b": ("Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16"),
        "qwen3-8b": ("Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16"),
        "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
    }


def test_a_named_pair_carries_its_template_settings_and_takes_another_draft(good, monkeypatch):
    known = loading.KnownPair(str(good / "target"), str(good / "draft"), {"enable_thinking": False})
    monkeypatch.setattr(loading, "KNOWN_PAIRS", {"tiny": known})
    pair = load_pair("tiny", progress=quiet)
    assert (pair.name, pair.chat_template_kwargs, pair.block_size) == ("tiny", {"enable_thinking": False}, 4)
    other = load_pair("tiny", draft="none", progress=quiet)
    assert (other.name, other.draft) == ("tiny", None)
    assert load_pair("tiny", draft=good / "draft", progress=quiet).name == "tiny + draft"


@pytest.mark.parametrize("native, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_widens_a_small_target_where_bfloat16_is_emulated(good, tmp_path, monkeypatch, native, expected):
    write_target(tmp_path / "target", tiny_llama().to(torch.bfloat16))
    monkeypatch.setattr(target_files, "has_native_bfloat16", lambda: native)
    assert load(tmp_path, draft=None).dtype == expected
    monkeypatch.setattr(target_files, "WIDEN_BYTES", 1000)
    assert load(tmp_path, draft=None).dtype == "bfloat16"


# --- broken drafts: refused before the target's weights are read -------------------------------------------------


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def nested(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        inner = json.loads((folder / "config.json").read_text())["dflash_config"] | changes
        edit_json(
            folder / "config.json", dflash_config={key: value for key, value in inner.items() if value is not None}
        )

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder / WEIGHTS, change)


def another(**shape: Any) -> Callable[[Path], None]:
    """A complete draft, made for another target."""

    def change(folder: Path) -> None:
        write_draft(folder, tiny_draft(tiny_qwen3(**shape).config))

    return change


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save({}, folder / name)

    return change


def without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_index(**index: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(index))

    return change


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)}))


def take(name: str) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.__delitem__(name))


PLAIN_QWEN3 = dict(architectures=["Qwen3ForCausalLM"], dflash_config=None, block_size=None, num_target_layers=None)

BROKEN_DRAFTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other hidden size": (another(hidden_size=48), "hidden size is 48, the target's is 32"),
    "other vocabulary": (another(vocab_size=160), "vocabulary is 160, the target's is 128"),
    "other layer count": (another(num_hidden_layers=7), "number of target layers is 7, the target's is 5"),
    "plain qwen3": (config(**PLAIN_QWEN3), "declares Qwen3ForCausalLM"),
    "plain qwen3 without architectures": (
        config(**PLAIN_QWEN3 | {"architectures": None}),
        "neither 'architectures' nor",
    ),
    "another speculator": (config(architectures=["DFlashSpeculator"]), "a variant that is not supported"),
    "no block size": (config(block_size=None), "no 'block_size'"),
    "block of one": (config(block_size=1), "'block_size' is 1"),
    "block size in words": (config(block_size="four"), "value of the wrong kind"),
    "no mask token": (nested(mask_token_id=None), "no 'mask_token_id'"),
    "mask beyond the embedding": (nested(mask_token_id=128), "id is 128, the target's embedding has 128 rows"),
    "negative mask": (nested(mask_token_id=-1), "'mask_token_id' is -1"),
    "no taps": (nested(target_layer_ids=[]), "'target_layer_ids' is empty"),
    "tap beyond the target": (nested(target_layer_ids=[1, 5]), "layer 5 of a 5-layer target"),
    "no target layer count": (config(num_target_layers=None), "no 'num_target_layers'"),
    "no hidden size": (config(hidden_size=None), "no 'hidden_size'"),
    "uneven heads": (config(num_key_value_heads=3), "do not divide"),
    "layer types too few": (config(layer_types=["full_attention"]), "'layer_types' is"),
    "unknown layer type": (config(layer_types=["full_attention", "linear_attention"]), "'layer_types' is"),
    "sliding without window": (config(layer_types=["sliding_attention"] * 2), "window None"),
    "unknown rotary": (config(rope_scaling={"rope_type": "longrope"}), "'longrope'"),
    "attention bias": (config(attention_bias=True), "sets 'attention_bias'"),
    "fused switch": (config(fused_qkv=True), "sets 'fused_qkv'"),
    "other activation": (config(hidden_act="gelu"), "activation is 'gelu'"),
    "config is no json": (replaced("config.json", b"{broken"), "not valid JSON"),
    "config is no text": (replaced("config.json", b"\xff\xfe\x00"), "not valid JSON"),
    "config is a list": (replaced("config.json", b"[]"), "no JSON object"),
    "no config": (removed("config.json"), "no config.json"),
    "no weights": (removed(WEIGHTS), f"no {WEIGHTS}"),
    "pickle .bin": (pickled("pytorch_model.bin"), "pickle files are refused"),
    "pickle .pt": (pickled("draft.pt"), "pickle files are refused"),
    "cut in the data": (lambda folder: cut(folder / WEIGHTS, 0.7), "damaged or cut short"),
    "cut in the header": (lambda folder: cut(folder / WEIGHTS, 0.001), "damaged or cut short"),
    "empty weights": (replaced(WEIGHTS, b""), "damaged or cut short"),
    "weights are a web page": (replaced(WEIGHTS, b"<!DOCTYPE html>" * 9), "damaged or cut short"),
    "missing tensor": (take("fc.weight"), "1 tensors are missing and 0 unexpected, such as 'fc.weight'"),
    "unexpected tensor": (put("layers.2.mlp.up_proj.weight", 4), "0 tensors are missing and 1 unexpected"),
    "more layers than weights": (config(num_hidden_layers=3, layer_types=None), "11 tensors are missing"),
    "fused qkv": (put("layers.0.self_attn.qkv_proj.weight", 4), "fused query, key and value"),
    "own embedding": (put("embed_tokens.weight", 128, 32), "an embedding or head of its own"),
    "own head": (put("lm_head.weight", 128, 32), "an embedding or head of its own"),
    "wrong shape": (put("norm.weight", 31), "'norm.weight' has shape [31], expected [32]"),
    "transposed": (put("layers.0.mlp.up_proj.weight", 32, 64), "has shape [32, 64], expected [64, 32]"),
    "integers": (put("norm.weight", 32, dtype=torch.int8), "stored as I8"),
    "float8": (put("norm.weight", 32, dtype=torch.float8_e4m3fn), "stored as F8_E4M3"),
    "missing shard": (without_shard, "shard model-00002-of-00002.safetensors is missing"),
    "index without map": (with_index(metadata={}), "no 'weight_map'"),
    "index leads outside": (
        with_index(weight_map={"fc.weight": "../target/model.safetensors"}),
        "names the file '../target",
    ),
    "index names a pickle": (with_index(weight_map={"fc.weight": "draft.bin"}), "names the file 'draft.bin'"),
}


@pytest.mark.parametrize("case", BROKEN_DRAFTS)
def test_a_broken_draft_is_refused_before_the_target_is_read(case, copy, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the target's weights were read"))
    change, expected = BROKEN_DRAFTS[case]
    change(copy / "draft")
    refused(expected, copy)


def refused(expected: str, folder: Path, **options: Any) -> None:
    """The error holds the expected words and is three sentences."""
    with pytest.raises(LoadError) as caught:
        load(folder, **options)
    error = caught.value
    assert expected in str(error)
    assert all(part.endswith(".") and not part[0].islower() for part in (error.wrong, error.found, error.do)), str(
        error
    )


def test_not_a_number_weights_are_refused(copy):
    edit_weights(copy / "draft" / WEIGHTS, lambda tensors: tensors["fc.weight"][0].fill_(float("nan")))
    refused("'fc.weight' has NaN", copy)


# --- broken targets ------------------------------------------------------------------------------------------------


def in_draft_place(folder: Path) -> None:
    shutil.copytree(folder.parent / "draft", folder, dirs_exist_ok=True)


def rwkv(folder: Path) -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    RwkvForCausalLM(RwkvConfig(hidden_size=32, num_hidden_layers=5, vocab_size=128)).save_pretrained(folder)


def mamba(folder: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=5, vocab_size=128, state_size=4)).save_pretrained(
        folder
    )


BROKEN_TARGETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (removed("config.json"), "no config.json"),
    "config is no json": (replaced("config.json", b"nothing"), "not valid JSON"),
    "unknown family": (config(model_type="walnut"), "config.json cannot be used"),
    "no family": (config(model_type=None), "config.json cannot be used"),
    "impossible config": (config(num_hidden_layers="five"), "config.json cannot be used"),
    "own code": (config(model_type="walnut", auto_map={"AutoConfig": "x.Y"}), "config.json cannot be used"),
    "not a language model": (replaced("config.json", b'{"model_type": "clap"}'), "not a causal language model"),
    "a draft": (in_draft_place, "is a draft model"),
    "no weights": (removed(WEIGHTS), f"no {WEIGHTS}"),
    "pickle": (pickled("pytorch_model.bin"), "pickle files are refused"),
    "missing shard": (without_shard, "is missing"),
    "cut weights": (lambda folder: cut(folder / WEIGHTS, 0.5), "target cannot be loaded"),
    "missing tensor": (take("model.layers.1.mlp.up_proj.weight"), "weights are incomplete"),
    "wrong shape": (put("model.norm.weight", 31), "such as 'model.norm.weight'"),
    "no tokenizer": (removed("tokenizer.json"), "no tokenizer.json"),
    "damaged tokenizer": (replaced("tokenizer.json", b"{}"), "'added_tokens' is missing"),
    "recurrent states of its own": (rwkv, "state that cannot be rolled back"),
    "recurrent and not proven": (mamba, "MambaForCausalLM is a recurrent model"),
}


@pytest.mark.parametrize("case", BROKEN_TARGETS)
def test_a_broken_target_is_refused(case, copy):
    change, expected = BROKEN_TARGETS[case]
    change(copy / "target")
    refused(expected, copy, draft="none")


@pytest.mark.parametrize("model_type", target_files.ROLLED_BACK_RECURRENT)
def test_recurrent_families_that_may_pass_do_roll_back(model_type):
    """Part of a block is taken back and other tokens follow: the logits are those of a fresh run of the kept tokens."""
    target = Target(tiny_recurrent(model_type))
    ids = (torch.arange(32) * 7 + 5)[None] % 127
    with torch.inference_mode():
        session = target.session()
        session.prefill(ids[:, :20])
        session.forward(torch.cat((ids[:, 20:23], ids[:, :5]), dim=1))
        session.rollback(3)
        after, _ = session.forward(ids[:, 23:])
        fresh = torch.stack([target.session().prefill(ids[:, :length])[0] for length in range(24, 33)])
    # The families' chunked prefill and their step differ by float32 rounding; a wrong state differs by whole logits.
    assert fresh.std() > 1.0
    torch.testing.assert_close(after, fresh, atol=2e-3, rtol=0.0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy):
    raw = json.loads((copy / "target" / "tokenizer.json").read_text())
    extra = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    raw["added_tokens"] += [{"id": 127 + i, "content": f"<|extra{i}|>"} | extra for i in range(2)]
    (copy / "target" / "tokenizer.json").write_text(json.dumps(raw))
    refused("It has 129 tokens, the target's embedding has 128 rows", copy)


# --- settings ---------------------------------------------------------------------------------------------------------


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "missing folder": (dict(target="./nowhere"), "no such folder"),
    "missing absolute folder": (dict(draft="/no/where/draft"), "no such folder"),
    "one word is no id": (dict(target="smollm"), "no such folder"),
    "unknown device": (dict(device="tpu"), "Choose auto, cpu, cuda"),
    "nonsense device": (dict(device="cpu:x"), "Choose auto, cpu, cuda"),
    "absent device": (dict(device="cuda:97"), "cannot be used"),
    "unknown dtype": (dict(dtype="int4"), "Choose auto, float32, float16, bfloat16"),
    "device twice": (dict(device="cpu", device_map="auto"), "Give only one"),
    "unknown quantization": (dict(device="cpu", quantize="2bit"), "Choose 4bit or 8bit"),
    "quantization on a CPU": (dict(device="cpu", quantize="4bit"), "needs CUDA"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_be_met_are_refused(case, good):
    options, expected = BAD_SETTINGS[case]
    refused(expected, good, **options)


@pytest.fixture
def cuda(monkeypatch) -> None:
    """A machine that says it has one CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_auto_prefers_cuda_in_bfloat16_where_the_card_has_it(cuda, monkeypatch):
    options = target_files.target_options("auto", "auto", None, None)
    assert options == {"dtype": torch.bfloat16, "device_map": {"": torch.device("cuda")}}
    assert target_files.target_options("cuda:0", "float32", None, None)["dtype"] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert target_files.target_options("auto", "auto", None, None)["dtype"] == torch.float16


def test_quantization_computes_in_the_chosen_dtype(cuda):
    four = target_files.target_options("cuda", "auto", None, "4bit")["quantization_config"]
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)
    assert target_files.target_options("cuda", "auto", None, "8bit")["quantization_config"].load_in_8bit
    spread = target_files.target_options("auto", "auto", "balanced", "8bit")
    assert spread["device_map"] == "balanced" and spread["quantization_config"].load_in_8bit


def test_quantization_without_its_package_is_a_sentence(cuda, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="pip install bitsandbytes"):
        target_files.target_options("cuda", "auto", None, "8bit")


def test_a_file_is_not_a_checkpoint(good):
    refused("It is a file", good, draft=good / "draft" / WEIGHTS)


def test_an_unknown_pair_names_the_known():
    with pytest.raises(LoadError, match="smollm2-135m, qwen3-4b, qwen3-8b, llama-3.1-8b"):
        load_pair("gpt-5")


def test_a_pair_whose_draft_is_not_installed_says_how_to_go_on(monkeypatch, tmp_path):
    known = loading.KnownPair("embedded", str(tmp_path / "nothing"))
    monkeypatch.setattr(loading, "KNOWN_PAIRS", {"smollm2-135m": known})
    with pytest.raises(LoadError, match="draft model of 'smollm2-135m' is not installed.*'none'"):
        load_pair()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("DefaultCPUAllocator: no")]
)
def test_no_memory_left_names_the_options_that_help(good, monkeypatch, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "load_model", fail)
    refused("quantize='4bit'", good)


def test_other_runtime_errors_stay_bugs(good, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loading, "load_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        load(good)
