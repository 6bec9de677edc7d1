"""The command line of `regenerate`; knows words and ranges, nothing of what they do."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflash_core.errors import TrainingError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dflash_core.training.regenerate",
        description="Let the target answer prompts; store prompts and replies as token shards to train a draft on.",
    )
    add = parser.add_argument
    add(
        "--target",
        default="smollm2-135m",
        help="a known pair's name, a folder or a Hub id (with --server: for its tokenizer)",
    )
    add("--revision", help="branch, tag or commit of a target on the Hub")
    add("--output", type=Path, required=True, help="folder for the shards; the same command goes on in it")
    what = parser.add_argument_group("prompts")
    add = what.add_argument
    add("--prompts", type=Path, nargs="+", default=[], metavar="FILE", help='JSONL of {"messages": […], "category": …}')
    add(
        "--synthesize",
        type=int,
        default=0,
        metavar="N",
        help="let the target write N prompts (kept in the output folder)",
    )
    add(
        "--seed-prompts",
        type=Path,
        metavar="FILE",
        help="own openers for --synthesize: category<TAB>opener, one a line",
    )
    add("--mix", metavar="NAME=SHARE,…", help="categories for --synthesize and their shares")
    add(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="prompts that must not occur, such as those you evaluate on",
    )
    add("--limit", type=int, metavar="N", help="use N prompts at most")
    add("--samples", type=int, default=1, metavar="N", help="replies per prompt")
    add("--max-prompt", type=int, default=256, metavar="TOKENS", help="longer prompts are left out, template included")
    how = parser.add_argument_group("replies")
    add = how.add_argument
    add("--max-reply", type=int, default=384, metavar="TOKENS")
    add("--greedy-fraction", type=float, default=0.5, metavar="SHARE", help="share of replies at temperature 0")
    add("--temperature", type=float, default=0.8, metavar="T", help="of the other replies")
    add(
        "--template-args",
        default="{}",
        metavar="JSON",
        help='for the chat template, such as {"enable_thinking": false}',
    )
    add("--seed", type=int, default=0)
    add("--max-minutes", type=float, metavar="M", help="stop taking prompts after this time, loading included")
    add("--shard-mb", type=float, default=15.0, metavar="MB", help="size of a full shard (MiB)")
    local = parser.add_argument_group("local device")
    add = local.add_argument
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--batch", type=int, metavar="ROWS", help="rows decoded together; default: what fits, 2048 at most")
    add("--eager", action="store_true", help="on CUDA: no captured graph (for targets whose step cannot be captured)")
    server = parser.add_argument_group("OpenAI-compatible server instead")
    add = server.add_argument
    add("--server", metavar="URL", help="such as http://localhost:8000/v1")
    add("--model", help="its name on the server; default: the only one served")
    add("--concurrency", type=int, default=64, metavar="N", help="requests in flight")
    add("--api-key-file", type=Path, metavar="FILE", help="a file with the server's key")
    return parser


def _need(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise TrainingError("A setting is out of range.", f"--{name} is {value}.", f"It must be {rule}.")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked arguments. Raises `TrainingError` for values that cannot work."""
    args = _parser().parse_args(argv)
    for name in ("samples", "max-prompt", "max-reply", "concurrency", "limit", "batch"):
        value = getattr(args, name.replace("-", "_"))
        _need(value is None or value >= 1, name, value, "at least 1")
    _need(0.0 <= args.greedy_fraction <= 1.0, "greedy-fraction", args.greedy_fraction, "from 0 to 1")
    _need(
        0.0 < args.temperature < float("inf"),
        "temperature",
        args.temperature,
        "above 0 (--greedy-fraction 1 is greedy)",
    )
    _need(args.max_minutes is None or args.max_minutes > 0, "max-minutes", args.max_minutes, "above 0")
    _need(args.synthesize >= 0, "synthesize", args.synthesize, "0 or more")
    _need(args.shard_mb > 0, "shard-mb", args.shard_mb, "above 0")
    if not args.prompts and not args.synthesize:
        raise TrainingError(
            "There are no prompts.", "Neither --prompts nor --synthesize is given.", "Give one of them."
        )
    try:
        args.template_args = dict(json.loads(args.template_args))
    except (ValueError, TypeError) as error:
        raise TrainingError("The template arguments cannot be read.", f"{error}.", "Give a JSON object.") from error
    return args
