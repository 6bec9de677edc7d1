"""`python -m dflash_core.training.train`: checks everything, loads the target, trains or resumes; knows no single step.

Run it again with the same command after an interruption, a pause or a kill: it goes on where its last state was saved.
"""

import sys
import time

STARTED = time.monotonic()

import logging  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from dflash_core.checkpoints import read_json, weight_files  # noqa: E402
from dflash_core.config import DraftConfig  # noqa: E402
from dflash_core.draft_files import load_draft, read_draft_config  # noqa: E402
from dflash_core.errors import DFlashError, TrainingError  # noqa: E402
from dflash_core.loading import KNOWN_PAIRS, Pair, load_pair  # noqa: E402
from dflash_core.model import DFlashDraftModel  # noqa: E402
from dflash_core.target import Target  # noqa: E402
from dflash_core.training import heldout, state  # noqa: E402
from dflash_core.training.checks import check_context, check_prompts, prepare_output  # noqa: E402
from dflash_core.training.data import DrawSettings, PackedData  # noqa: E402
from dflash_core.training.features import TargetReader, check_room  # noqa: E402
from dflash_core.training.init import Measured, draft_config, grown, initialise, measure  # noqa: E402
from dflash_core.training.loss import FullSoftmax, SampledSoftmax, Softmax  # noqa: E402
from dflash_core.training.machine import Machine, decide_machine  # noqa: E402
from dflash_core.training.objective import DraftObjective, LossSettings  # noqa: E402
from dflash_core.training.report import source  # noqa: E402
from dflash_core.training.schedule import Clock  # noqa: E402
from dflash_core.training.settings import TrainSettings, digest, parse  # noqa: E402
from dflash_core.training.shards import TokenShards  # noqa: E402
from dflash_core.training.source import InputSource  # noqa: E402
from dflash_core.training.trainer import Story, Trainer  # noqa: E402
from dflash_core.training.walk import Replies  # noqa: E402

MEASURED_TOKENS = 2048
SAMPLED_FROM = 32768
DEFAULT_EPOCHS = 6.0
log = logging.getLogger("dflash_core.training")


def load_target(settings: TrainSettings, machine: Machine) -> Pair:
    """The target alone: a known pair's, or a Hub id or folder."""
    where = settings.device if settings.device != "auto" else str(machine.accelerator.device)
    name = {"name" if settings.target in KNOWN_PAIRS else "target": settings.target}
    return load_pair(**name, draft="none", device=where, dtype=machine.dtype)


def pick_mask_token(pair: Pair, counts: np.ndarray, wanted: int | None) -> int:
    """The embedding that fills empty slots: the tokenizer's mask token, or a special token the data never uses."""
    if wanted is not None:
        return wanted
    tokenizer = pair.tokenizer
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    taken = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, *pair.stop_token_ids}
    special = [token for token, added in sorted(tokenizer.added_tokens_decoder.items()) if added.special]
    beyond = range(len(tokenizer), pair.target.vocab_size)
    for token in (*special, *beyond):
        if token not in taken and counts[token] == 0:
            return token
    raise TrainingError(
        "No token is free to be the mask.", "The data uses every special token.", "Give --mask-token-id."
    )


def make_prompts(settings: TrainSettings, pair: Pair, shards: TokenShards) -> tuple[list[heldout.Prompt], list[int]]:
    """Held-out prompts, and the data's sequences that must not be trained on because of them."""
    if settings.prompts:
        return [prompt for path in settings.prompts for prompt in heldout.read_prompts(Path(path), pair)], []
    count = min(settings.held_out, len(shards) // 2)
    if count < 1:
        raise TrainingError(
            "There is nothing to evaluate on.",
            f"The data has {len(shards)} sequences, --held-out is {settings.held_out}.",
            "Give --prompts, or more data.",
        )
    ids = np.random.default_rng((settings.seed, 0)).choice(len(shards), count, replace=False).tolist()
    return heldout.data_prompts(shards, ids), ids


def make_softmax(settings: TrainSettings, pair: Pair, counts: np.ndarray) -> tuple[Softmax, np.ndarray | None]:
    """The softmax, and the rare tokens that are drawn for it."""
    target, sampled = pair.target, settings.softmax == "sampled"
    if settings.softmax == "auto":
        sampled = target.vocab_size > SAMPLED_FROM and not settings.distil
    if not sampled or settings.frequent + settings.others >= target.vocab_size:
        return FullSoftmax(target), None
    order = np.argsort(-counts, kind="stable")
    frequent = torch.from_numpy(np.sort(order[: settings.frequent])).to(target.device)
    is_frequent = torch.zeros(target.vocab_size, dtype=torch.bool, device=target.device)
    is_frequent[frequent] = True
    return SampledSoftmax(target, frequent, is_frequent), np.sort(order[settings.frequent :])


def first_draft(settings: TrainSettings, target: Target) -> DFlashDraftModel:
    """The draft that --init-from names, in float32 on the target's device, grown or cut as the settings say."""
    assert settings.init_from is not None
    folder = Path(settings.init_from)
    config = read_draft_config(read_json(folder / "config.json"))
    if (config.hidden_size, config.vocab_size, config.num_target_layers) != (
        target.hidden_size, target.vocab_size, target.num_layers,
    ):  # fmt: skip
        raise TrainingError(
            "The first draft does not fit the target.", f"{folder}.", "Start from a draft of this target."
        )
    torch.manual_seed(settings.seed)
    trained = load_draft(weight_files(folder), config, target.device, torch.float32)
    return grown(trained, settings.shape_changes)


def make_draft(
    settings: TrainSettings, pair: Pair, data: PackedData, counts: np.ndarray, found: dict[str, Any] | None
) -> tuple[DFlashDraftModel, Measured, str]:
    """A fresh draft in float32 on the target's device, the scales measured, and a sentence on where it starts from.

    With the facts of a saved state in `found` nothing is measured: shape and scales are the state's.
    """
    device, target = pair.target.device, pair.target
    if found is not None:
        config = DraftConfig.from_dict(found["config"])
        scales = Measured([1.0 / scale for scale in found["tap_scale"]], [])
        return DFlashDraftModel(config).to(device), scales, found["start"]
    if settings.init_from:
        draft = first_draft(settings, target)
        config = draft.config
    else:
        mask = pick_mask_token(pair, counts, settings.mask_token_id)
        config = draft_config(
            target, settings.layers, settings.block_size, mask, settings.taps, settings.features, **settings.shape_changes
        )
        torch.manual_seed(settings.seed)
        draft = DFlashDraftModel(config).to(device)
    reader = TargetReader(target, config.target_layer_ids, use_flex=False, compile=False)
    pack = data.pack(data.order(settings.seed, 0)[0])
    part = slice(0, min(MEASURED_TOKENS, data.context_tokens))
    arrays = [torch.from_numpy(a[part]).to(device)[None] for a in (pack.tokens, pack.document, pack.position)]
    measured = measure(reader, *arrays, layers=config.num_hidden_layers)
    reader.close()
    if settings.init_from:
        with torch.no_grad():
            # Training scales the taps before fc; a public checkpoint has that folded in.
            draft.fc.weight /= torch.tensor(measured.tap_scale, device=device).repeat_interleave(config.hidden_size)
        return draft, measured, f"Weights start from {Path(settings.init_from).name}."
    return draft, measured, initialise(draft, target, measured, settings.init_layers == "target")


def make_clock(settings: TrainSettings, data: PackedData, spent_seconds: float, world: int) -> Clock:
    epochs = settings.epochs
    if epochs is None and settings.max_steps is None and settings.max_minutes is None:
        epochs = DEFAULT_EPOCHS
    steps = settings.max_steps
    if epochs is not None:
        rows = len(data.order(settings.seed, 0))
        by_epochs = max(1, int(epochs * rows / world / settings.accumulate))
        steps = min(steps, by_epochs) if steps else by_epochs
    seconds = None if settings.max_minutes is None else 60.0 * settings.max_minutes
    return Clock(STARTED, spent_seconds, seconds, steps)


def build(settings: TrainSettings) -> Trainer:
    """Check all that can be checked, then build the run or continue it. Raises `TrainingError` or `LoadError`."""
    output, shards = prepare_output(settings), TokenShards.open(*settings.data)
    found = state.find_state(output)
    if found is None:
        state.check_free(output)
    machine = decide_machine(settings)
    pair = load_target(settings, machine)
    check_context(settings, pair, shards)
    prompts, held_out = make_prompts(settings, pair, shards)
    data = PackedData(shards, settings.context_tokens, held_out)
    counts = data.frequencies(pair.target.vocab_size)
    facts = {"target": pair.name, "data": digest([shards.lengths.tolist(), counts.tolist()])}
    fingerprint = settings.fingerprint(**facts)
    if found is not None:
        state.check_same_run(found[1]["run"], fingerprint, output)
    draft, measured, start = make_draft(settings, pair, data, counts, found[1] if found else None)
    state.check_space(output, sum(p.numel() for p in draft.parameters()))
    width, where = draft.fc.weight.shape[1], draft.fc.weight.device
    check_room(settings.feature_cache, data, width, pair.target.dtype, where, output)
    check_prompts(settings, pair, prompts)
    replies = _replies(settings, machine, pair, prompts, output)
    return _assemble(settings, machine, pair, data, counts, draft, measured, start, replies, fingerprint, found)


def _replies(
    settings: TrainSettings, machine: Machine, pair: Pair, prompts: Sequence[heldout.Prompt], output: Path
) -> Replies:
    with machine.accelerator.main_process_first():
        return heldout.cached_replies(pair, prompts, settings.held_out_tokens, output / "heldout.npz")


def _assemble(
    settings: TrainSettings, machine: Machine, pair: Pair, data: PackedData, counts: np.ndarray,
    draft: DFlashDraftModel, measured: Measured, start: str, replies: Replies, fingerprint: dict[str, Any],
    found: tuple[Path, dict[str, Any]] | None,
) -> Trainer:  # fmt: skip
    softmax, rare = make_softmax(settings, pair, counts)
    loss = LossSettings(
        settings.labels,
        settings.weights,
        settings.slot_gamma,
        settings.dpace_alpha,
        settings.distil,
        settings.loss_chunks,
    )
    objective = DraftObjective(draft, pair.target, softmax, loss, measured.tap_scale, machine.use_flex, machine.compile)
    reader = TargetReader(pair.target, draft.config.target_layer_ids, machine.use_flex, machine.compile)
    source = InputSource(
        reader, data, settings.feature_cache, settings.distil_top if settings.distil else 0,
        settings.labels == "argmax", draft.fc.weight.device, Path(settings.output),
    )  # fmt: skip
    draw = DrawSettings(
        settings.seed, settings.anchors, draft.config.block_size, settings.overlap_anchors,
        settings.anchors_per_sequence, rare, settings.others,
    )  # fmt: skip
    weights = _load_weights(draft, found)
    clock = make_clock(
        settings, data, found[1]["progress"]["seconds"] if found else 0.0, machine.accelerator.num_processes
    )
    story = Story(pair.name, _data_story(settings, data), start)
    trainer = Trainer(
        settings,
        machine.accelerator,
        objective,
        source,
        data,
        draw,
        replies,
        clock,
        fingerprint,
        story,
        machine.compile,
    )
    if found is not None:
        trainer.restore(*found, weights)
    return trainer


def _load_weights(draft: DFlashDraftModel, found: tuple[Path, dict[str, Any]] | None) -> dict[str, Tensor]:
    """Load a saved state's weights into the draft; returns the whole file."""
    if found is None:
        return {}
    saved = load_file(found[0] / "weights.safetensors", device=str(draft.fc.weight.device))
    draft.load_state_dict({name: saved[name] for name in draft.state_dict()})
    return saved


def _data_story(settings: TrainSettings, data: PackedData) -> dict[str, Any]:
    named = zip(settings.data, data.shards.manifests, strict=True)
    return {
        "sources": "; ".join(source(Path(path).name, manifest) for path, manifest in named),
        "sequences": len(data.ids),
        "tokens": int(data.shards.lengths[data.ids].sum(dtype=np.int64)),
        "replies_by": "the target itself",
    }


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        settings = parse(arguments)
        trainer = build(settings)
        resumed = f", resumed at step {trainer.progress.step}" if trainer.progress.step else ""
        log.info(
            "Training for %s on %d sequences%s. %s",
            trainer.story.target,
            len(trainer.data.ids),
            resumed,
            trainer.story.start,
        )
        over = trainer.run()
    except DFlashError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            "A file cannot be read or written.", f"{error}.", "Mend it and run the same command again.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("Stopped. Run the same command to resume.", file=sys.stderr)
        return 130
    log.info("Done: %s" if over else "Paused: run the same command to resume. %s", settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
