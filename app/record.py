"""Records the traces that ship with the app, `python -m app.record`: one prompt, drafted and plain; shows nothing.

The tour, the Traces tab and the tests read them. Run it again whenever the default draft model changes.
"""

import argparse
import sys
from pathlib import Path

from app.learn import RECORDINGS
from app.settings import Settings
from app.trace import Recorder, Trace, new_header, parse, save
from app.turn import Decode, prompt_ids
from dflash_core import DFlashError, Pair, decode, load_pair, pair_names

PROMPT = "Write a Python function that returns the n-th Fibonacci number using a loop."
WARM_UP_TOKENS = 16


def record(pair: Pair, prompt: str, settings: Settings, *, decode: Decode = decode) -> Trace:
    """One warmed-up run of the pair as a checked trace."""
    messages = [{"role": "user", "content": prompt}]
    ids, drafting = prompt_ids(pair, messages), settings.drafting
    for _ in decode(pair, ids, settings.capped(WARM_UP_TOKENS).params(), drafting=drafting):
        pass
    header = new_header(
        pair=pair.name,
        device=pair.place,
        dtype=pair.dtype,
        settings=settings.to_dict(),
        messages=messages,
        drafting=settings.drafting,
    )
    recorder = Recorder(header, pair.tokenizer)
    for event in decode(pair, ids, settings.params(), drafting=settings.drafting):
        recorder.add(event)
    return parse(recorder.ndjson)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m app.record", description="Record the traces that ship with the app.")
    parser.add_argument("--pair", default=pair_names()[0], help="(default: %(default)s)")
    parser.add_argument("--target", help="a target of your own: Hub id or folder")
    parser.add_argument("--draft", help="a draft of your own: Hub id or folder")
    parser.add_argument("--dtype", default="float32", help="float32 makes both replies the same to the last token")
    parser.add_argument("--prompt", default=PROMPT, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="(default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=5, help="keep the fastest of so many (default: %(default)s)")
    parser.add_argument("--block-size", type=int, help="(default: the draft's)")
    parser.add_argument("--folder", type=Path, default=RECORDINGS["dflash"].parent, help="(default: %(default)s)")
    chosen = parser.parse_args(argv)
    try:
        pair = load_pair(chosen.pair, target=chosen.target, draft=chosen.draft, dtype=chosen.dtype)
        lanes = {name: _settings(chosen, drafting=name == "dflash") for name in RECORDINGS}
        # In turns, so that whatever else the machine does slows all alike; the fastest attempt was slowed least.
        runs = [{name: record(pair, chosen.prompt, own) for name, own in lanes.items()} for _ in range(chosen.attempts)]
        for name in lanes:
            trace = min((attempt[name] for attempt in runs), key=lambda one: one.stats.total_seconds or 0.0)
            chosen.folder.mkdir(parents=True, exist_ok=True)
            path = save(trace, chosen.folder / f"{name}.ndjson")
            print(f"{path}: {trace.stats.new_tokens} tokens, τ {trace.stats.tau:.2f}")
    except DFlashError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _settings(chosen: argparse.Namespace, *, drafting: bool) -> Settings:
    block_size = chosen.block_size if drafting else None
    return Settings(max_new_tokens=chosen.max_new_tokens, drafting=drafting, block_size=block_size)


if __name__ == "__main__":
    sys.exit(main())
