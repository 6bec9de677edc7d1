"""Every knob of a training run, its default and why, as one dataclass and the command line made from it; runs nothing.

The defaults are those that gave the most for the default pair; each help text says what an option is for.
"""

import argparse
import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dflash_core.errors import TrainingError
from dflash_core.training.loss import paper_gamma


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field with its help text. `free` marks what may change when a run is resumed."""
    if default is MISSING:
        return field(metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainSettings:
    target: str = _option(MISSING, "name of a known pair, Hub id or folder of the target")
    data: list[str] = _option(MISSING, "token shards: folders, .safetensors or .npz files")
    output: str = _option(MISSING, "folder for checkpoints, metrics and report; run again to resume", free=True)

    prompts: list[str] = _option(
        (), "chat JSONL files of held-out prompts ('messages', optional 'category'); default: sequences of the data",
        free=True,
    )  # fmt: skip
    held_out: int = _option(64, "sequences taken out of the data for evaluation when there are no --prompts")
    held_out_tokens: int = _option(256, "longest greedy reply to a held-out prompt", free=True)

    init_from: str | None = _option(
        None, "start from this draft's weights and shape; its MLP can be cut, and DFlash 2's parts can join"
    )
    init_layers: Literal["target", "random"] = _option(
        "target", "'target' copies its last layers: 2.25 -> 2.06 loss at step 500"
    )
    layers: int = _option(5, "draft layers; each costs one target layer per verify pass")
    intermediate_size: int | None = _option(
        None, "width of the draft's MLPs; default: the target's. A cut keeps the units with the largest weights"
    )
    block_size: int = _option(
        8, "slots per block; short blocks pay when few tokens are accepted (16 -> 8: 2.39 -> 2.49)"
    )
    features: int = _option(5, "number of tapped target layers, spread evenly")
    taps: list[int] = _option((), "tapped target layers, instead of --features")
    conv_kernel_size: int = _option(0, "DFlash 2's convolution along the block: 2 lets a slot see the one before; 0 is off")
    conv_group_size: int = _option(16, "channels that share a dynamic kernel of the convolution")
    selector_rank: int = _option(
        0, "size of DFlash 2's candidate selector (4.05 -> 4.28 tokens a pass; vocabulary x rank x 4 bytes on disk); 0 is off"
    )
    selector_top_k: int = _option(16, "candidates per slot that the selector looks at (4 do nearly as well)")
    mask_token_id: int | None = _option(
        None, "embedding that fills empty slots; default: a special token the data never uses"
    )

    context_tokens: int = _option(16384, "packed row: context tokens of a step (a multiple of 128 for flex)")
    anchors: int = _option(8192, "blocks of a step, spread over the row's reply tokens")
    anchors_per_sequence: int | None = _option(
        None, "at most so many blocks in each sequence (the paper: 512 at length 3072)"
    )
    overlap_anchors: bool = _option(
        True, "blocks of a sequence may overlap; --no-overlap-anchors keeps them a block apart"
    )
    accumulate: int = _option(1, "rows per optimiser step")

    labels: Literal["argmax", "data"] = _option(
        "argmax", "the target's own choice while the data follows it, or the data"
    )
    weights: Literal["decay", "dpace"] = _option(
        "decay", "slot weights: fixed decay (Eq. 4) or by the draft's confidence"
    )
    gamma: float | None = _option(
        None, "decay length; default: 0.3 x block for argmax labels, the paper's 7/5/4 for data"
    )
    dpace_alpha: float = _option(0.5, "smoothing of --weights dpace")
    distil: float = _option(0.0, "share of the loss from the target's top-k distribution, for sampling with rejection")
    distil_top: int = _option(16, "the k of --distil")
    softmax: Literal["auto", "full", "sampled"] = _option("auto", "'auto' samples for vocabularies above 32768")
    frequent: int = _option(12288, "tokens that the sampled softmax counts exactly")
    others: int = _option(4096, "random other tokens of the sampled softmax")
    loss_chunks: int = _option(1, "recompute the head in so many parts to save memory", free=True)

    optimizer: Literal["muon", "adamw"] = _option("muon", "for matrices (at step 1000: loss 3.80 against AdamW's 4.39)")
    lr: float | None = _option(None, "learning rate of matrices; default 0.02 for Muon, 6e-4 for AdamW")
    lr_rest: float = _option(2e-3, "AdamW rate of everything that is no matrix")
    momentum: float = _option(0.95, "Muon's momentum")
    weight_decay: float = _option(0.0, "decoupled, matrices only")
    schedule: Literal["constant-linear", "linear", "cosine", "constant"] = _option(
        "constant-linear", "shape of the learning rate"
    )
    warm_up: float = _option(0.01, "fraction of the run in which the rate rises")
    decay: float = _option(0.5, "fraction of the run, at its end, in which constant-linear falls to 0")
    clip: float = _option(1.0, "largest gradient norm")
    ema: float = _option(0.0, "keep an average of the weights with this factor and ship that; 0 is off")

    epochs: float | None = _option(
        None, "passes over the data; default 6 unless a time or step limit is given", free=True
    )
    max_steps: int | None = _option(None, "optimiser steps of the whole run", free=True)
    max_minutes: float | None = _option(
        None, "time of the whole run over all resumes; the schedule ends with it", free=True
    )
    pause_minutes: float | None = _option(
        None, "save and stop this process after so long; resume with the same command", free=True
    )
    evaluate_every: int = _option(2000, "steps between acceptance lengths on the held-out prompts", free=True)
    save_every: int = _option(1000, "steps between saved states", free=True)
    log_every: int = _option(20, "steps between metric lines", free=True)

    feature_cache: Literal["online", "gpu", "cpu", "disk"] = _option(
        "online", "where target features live, see features", free=True
    )
    attention: Literal["auto", "flex", "sdpa"] = _option("auto", "'auto' is flex on a GPU, sdpa elsewhere", free=True)
    compile: bool | None = _option(None, "torch.compile target, draft and optimiser; default: on a GPU", free=True)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _option("auto", "'auto' is bf16 on a GPU", free=True)
    device: str = _option("auto", "auto, cpu, cuda, cuda:N or mps; several processes: use accelerate launch", free=True)
    dtype: str = _option("auto", "the target's dtype", free=True)
    seed: int = _option(0, "order of data, anchors and random tokens")

    def __post_init__(self) -> None:
        _check(self)

    @property
    def shape_changes(self) -> dict[str, int]:
        """How the draft's shape shall differ from a plain draft of the target's width."""
        names = ["intermediate_size"] if self.intermediate_size else []
        names += ["conv_kernel_size", "conv_group_size"] if self.conv_kernel_size else []
        names += ["selector_rank", "selector_top_k"] if self.selector_rank else []
        return {name: getattr(self, name) for name in names}

    @property
    def slot_gamma(self) -> float:
        if self.gamma is not None:
            return self.gamma
        return 0.3 * self.block_size if self.labels == "argmax" else paper_gamma(self.block_size)

    @property
    def matrix_lr(self) -> float:
        return self.lr if self.lr is not None else {"muon": 0.02, "adamw": 6e-4}[self.optimizer]

    def fingerprint(self, **facts: Any) -> dict[str, Any]:
        """What must be the same for a state to be continued; `facts` of the data and the target join it."""
        free = {f.name for f in fields(self) if f.metadata.get("free")} | {"target", "data"}
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        return json.loads(json.dumps(kept | facts))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _check(settings: TrainSettings) -> None:
    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            found = f"--{name.replace('_', '-')} is {getattr(settings, name)}."
            raise TrainingError("A training setting is out of range.", found, f"It must be {rule}.")

    for name in ("layers", "features", "context_tokens", "anchors", "accumulate", "loss_chunks", "frequent", "others"):
        need(getattr(settings, name) >= 1, name, "at least 1")
    for name in ("evaluate_every", "save_every", "log_every", "held_out_tokens", "distil_top"):
        need(getattr(settings, name) >= 1, name, "at least 1")
    need(settings.block_size >= 2, "block_size", "at least 2")
    for name in ("conv_kernel_size", "selector_rank"):
        need(getattr(settings, name) >= 0, name, "0 (off) or more")
    for name in ("conv_group_size", "selector_top_k"):
        need(getattr(settings, name) >= 1, name, "at least 1")
    need(settings.intermediate_size is None or settings.intermediate_size >= 1, "intermediate_size", "at least 1")
    need(settings.gamma is None or settings.gamma > 0, "gamma", "above 0")
    need(0.0 < settings.dpace_alpha <= 1.0, "dpace_alpha", "above 0 and at most 1")
    for name in ("distil", "warm_up", "decay"):
        need(0.0 <= getattr(settings, name) <= 1.0, name, "between 0 and 1")
    need(0.0 <= settings.ema < 1.0, "ema", "at least 0 and below 1")
    need(settings.clip > 0, "clip", "above 0")
    need(settings.matrix_lr > 0, "lr", "above 0")
    for name in ("epochs", "max_steps", "max_minutes", "pause_minutes"):
        need(getattr(settings, name) is None or getattr(settings, name) > 0, name, "above 0")
    if settings.distil and settings.softmax == "sampled":
        raise TrainingError("Two settings disagree.", "--distil with --softmax sampled.", "Use --softmax full.")
    if settings.distil and settings.feature_cache != "online":
        raise TrainingError("Two settings disagree.", "--distil with a feature cache.", "Use --feature-cache online.")


def parser() -> argparse.ArgumentParser:
    """The command line, made from the dataclass."""
    made = argparse.ArgumentParser(
        prog="python -m dflash_core.training.train",
        description="Train a DFlash draft model for a target on its own replies.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(TrainSettings)
    for item in fields(TrainSettings):
        made.add_argument(f"--{item.name.replace('_', '-')}", **_argument(hints[item.name], item))
    return made


def _argument(kind: Any, item: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"help": item.metadata["help"]}
    if item.default is MISSING:
        options["required"] = True
    else:
        options["default"] = item.default
    plain = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    if get_origin(kind) is list:
        return options | {"nargs": "+", "type": get_args(kind)[0]}
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    if plain[0] is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    return options | {"type": plain[0]}


def parse(arguments: list[str] | None = None) -> TrainSettings:
    values = vars(parser().parse_args(arguments))
    return TrainSettings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
