"""`python -m dflash_core.bench`: the same prompts through several ways of decoding; does no decoding itself."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dflash_core.bench_methods import METHODS, Method, Run, logit_gap, make_methods, possible
from dflash_core.bench_report import VERSION, Difference, first_difference, method_report, table
from dflash_core.config import SamplingParams
from dflash_core.errors import DecodeError, DFlashError, PromptError
from dflash_core.generate import INTERRUPTED, add_pair_arguments, load_from
from dflash_core.loading import Pair
from dflash_core.prompts import chat_ids, read_prompts, spread

WARM_UP_TOKENS = 8


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dflash_core.bench", description="Compare ways of decoding on this machine."
    )
    add_pair_arguments(parser)
    bench = parser.add_argument_group("the bench")
    bench.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSONL: 'messages' and perhaps 'category' per line"
    )
    bench.add_argument(
        "--methods", type=_names, metavar="A,B", help=f"of {','.join(METHODS)} (default: all that the pair allows)"
    )
    bench.add_argument(
        "--block-size", type=int, nargs="+", default=[], metavar="K", help="one or several (default: the draft's)"
    )
    bench.add_argument("--temperature", type=float, default=0.0)
    bench.add_argument("--seed", type=int, default=0, help="for temperatures above 0 (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    bench.add_argument("--limit", type=int, metavar="N", help="so many prompts, taken in turn from each category")
    bench.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    bench.add_argument("--json", metavar="FILE", help="also write the numbers here")
    return parser


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}" if unknown else "no method named")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error of the user's, 130 after Ctrl-C before any result."""
    return carry_out(run, table, parser().parse_args(arguments), "repeat")


def carry_out(
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], Sequence[str]],
    options: argparse.Namespace,
    part: str,
) -> int:
    """Measure, show the table, write `options.json`; returns the exit code. `part` is what Ctrl-C keeps when complete."""
    try:
        report = measure(options)
        print(*show(report), sep="\n")
        if options.json:
            _write(report, Path(options.json))
        return 0
    except DFlashError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped before the first {part} was complete.", file=sys.stderr)
        return INTERRUPTED


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and report as the options say. Raises `DFlashError`."""
    for name in ("repeats", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise PromptError(
                "A bench setting is out of range.", f"'{name}' is {getattr(options, name)}.", "It must be at least 1."
            )
    params = SamplingParams(
        temperature=options.temperature,
        seed=options.seed if options.temperature > 0.0 else None,
        max_new_tokens=options.max_new_tokens,
    )
    prompts = spread(read_prompts(options.prompts), options.limit)
    pair = load_from(options)
    ids = [chat_ids(pair.tokenizer, prompt.messages, **pair.chat_template_kwargs) for prompt in prompts]
    check_lengths(pair, ids)
    kinds = options.methods or possible(pair)
    methods = make_methods(pair, kinds, params, options.block_size)
    # The warm-up meets every method's errors before an hour was spent on the others.
    for method in make_methods(pair, kinds, replace(params, max_new_tokens=WARM_UP_TOKENS), options.block_size):
        _guarded(method, ids[0])
    runs = measure(methods, ids, options.repeats)
    settings = {
        "version": VERSION,
        "pair": pair.name,
        "device": str(pair.target.device),
        "device_name": device_name(pair),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompts": len(ids),
        "repeats": len(next(iter(runs.values()))),
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "block_sizes": options.block_size or ([pair.draft.config.block_size] if pair.draft is not None else []),
        "peak_memory_bytes": _peak_bytes(pair, runs),
    }
    return settings | {"methods": dict(_reports(pair, methods, runs, ids, [p.category for p in prompts], params))}


def measure(methods: Sequence[Method], prompts: Sequence[Sequence[int]], repeats: int) -> dict[str, list[list[Run]]]:
    """runs[method][repeat][prompt]. Methods take turns on each prompt and change their order, so that a machine that
    warms up or is disturbed treats all alike. Ctrl-C keeps the complete repeats, if there are any."""
    runs: dict[str, list[list[Run]]] = {method.name: [] for method in methods}
    with tqdm(total=repeats * len(prompts) * len(methods), unit="run", leave=False, disable=None) as bar:
        for repeat in range(repeats):
            try:
                done = _measure_once(methods, prompts, repeat, bar)
            except KeyboardInterrupt:
                if not repeat:
                    raise
                break
            for name, row in done.items():
                runs[name].append(row)
    return runs


def _measure_once(
    methods: Sequence[Method], prompts: Sequence[Sequence[int]], repeat: int, bar: tqdm
) -> dict[str, list[Run]]:
    done: dict[str, list[Run]] = {method.name: [] for method in methods}
    for index, ids in enumerate(prompts):
        turn = (repeat + index) % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            bar.set_postfix_str(method.name)
            done[method.name].append(_guarded(method, ids))
            bar.update()
    return done


def _guarded(method: Method, ids: Sequence[int]) -> Run:
    try:
        return method.run(ids)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DecodeError(
            "There is not enough memory for this method.",
            f"'{method.name}' broke on a prompt of {len(ids)} tokens.",
            "Leave it out, lower max_new_tokens or load the pair with --quantize 4bit.",
        ) from error


def _reports(
    pair: Pair,
    methods: Sequence[Method],
    runs: Mapping[str, list[list[Run]]],
    prompts: Sequence[Sequence[int]],
    categories: Sequence[str | None],
    params: SamplingParams,
) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in methods:
        # Above temperature 0 only our own loop draws with the baseline's random numbers.
        comparable = "ar" in runs and (params.temperature == 0.0 or method.kind in ("ar", "dflash"))
        found = list(_differences(pair, runs["ar"][0], runs[method.name][0], prompts, params)) if comparable else None
        yield method.name, method_report(method, runs, categories, found)


def _differences(
    pair: Pair, reference: Sequence[Run], own: Sequence[Run], prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Iterator[Difference]:
    for index, (expected, run) in enumerate(zip(reference, own, strict=True)):
        found = first_difference(index, expected.ids, run.ids)
        if found is None:
            continue
        if None not in (found.ar_token, found.token) and params.temperature == 0.0:
            prefix = [*prompts[index], *expected.ids[: found.position]]
            found = replace(found, logit_gap=logit_gap(pair, prefix, found.ar_token, found.token))
        yield found


def check_lengths(pair: Pair, prompts: Sequence[Sequence[int]]) -> None:
    for number, ids in enumerate(prompts, start=1):
        if len(ids) >= pair.context_length:
            raise PromptError(
                f"Prompt {number} is too long for this target.",
                f"It has {len(ids)} tokens, the context holds {pair.context_length}.",
                "Shorten it or leave it out.",
            )


def device_name(pair: Pair) -> str:
    if pair.target.device.type == "cuda":
        return torch.cuda.get_device_name(pair.target.device)
    return platform.processor() or platform.machine()


def _peak_bytes(pair: Pair, runs: Mapping[str, list[list[Run]]]) -> int | None:
    """The most memory a run held on the GPU if the target is there, else this process in RAM (unknown on Windows)."""
    if pair.target.device.type == "cuda":
        return max(run.peak_bytes or 0 for repeats in runs.values() for repeat in repeats for run in repeat)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write(report: Mapping[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PromptError("The numbers cannot be written.", f"{error}.", "Choose another file for --json.") from error


if __name__ == "__main__":
    sys.exit(main())
