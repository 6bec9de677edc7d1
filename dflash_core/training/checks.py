"""What must hold before any long work: a folder to write to, sequences and prompts that fit; trains nothing."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dflash_core.errors import TrainingError
from dflash_core.loading import Pair
from dflash_core.training.heldout import Prompt
from dflash_core.training.settings import TrainSettings
from dflash_core.training.shards import TokenShards


def prepare_output(settings: TrainSettings) -> Path:
    output = Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise TrainingError(
            "The output folder cannot be used.", f"{output}: {error}.", "Choose another --output."
        ) from error
    return output


def check_context(settings: TrainSettings, pair: Pair, shards: TokenShards) -> None:
    longest = int(shards.lengths.max())
    if longest > pair.context_length:
        raise TrainingError(
            "A sequence is longer than the target's context.",
            f"The longest has {longest} tokens, the context {pair.context_length}.",
            "Generate the data with this target, or drop long sequences.",
        )


def check_prompts(settings: TrainSettings, pair: Pair, prompts: Sequence[Prompt]) -> None:
    longest = max(len(ids) for _, ids in prompts) + settings.held_out_tokens
    for limit, name in ((settings.context_tokens, "--context-tokens"), (pair.context_length, "the target's context")):
        if longest > limit:
            raise TrainingError(
                "A held-out prompt does not fit.",
                f"With its reply of at most {settings.held_out_tokens} tokens it has {longest}, {name} is {limit}.",
                "Lower --held-out-tokens, or leave long prompts out.",
            )
