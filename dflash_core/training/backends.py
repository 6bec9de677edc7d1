"""Opens what generates the replies, a model on this device or a server; knows loading, no prompts and no output."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_core.errors import TrainingError
from dflash_core.loading import EMBEDDED, KNOWN_PAIRS, load_pair
from dflash_core.training.engine import Engine, Job, Reply, fitting_rows
from dflash_core.training.remote import Server


@dataclass(frozen=True)
class Backend:
    """What generates.

    capacity    the longest sequence, prompt and reply together
    window      how many jobs may be sorted by length before they are drawn
    facts       describe the run afterwards, for the manifest
    """

    target: str
    tokenizer: Any
    template_options: Mapping[str, Any]
    vocab_size: int
    capacity: int
    window: int
    generate: Callable[[Iterable[Job]], Iterator[Reply]]
    facts: Callable[[], dict[str, Any]]


def open_backend(args: argparse.Namespace) -> Backend:
    """The server if one is named, else the local device. Raises `TrainingError` or `LoadError`."""
    return _open_server(args) if args.server else _open_local(args)


def _load(args: argparse.Namespace, **options: Any) -> Any:
    if args.target in KNOWN_PAIRS:
        return load_pair(args.target, draft="none", revision=args.revision, **options)
    return load_pair(target=args.target, revision=args.revision, **options)


def _name(target: str) -> str:
    """A folder's name or the Hub id; where a folder lies is nobody's business."""
    return Path(target).expanduser().resolve().name if Path(target).expanduser().is_dir() else target


def _need_context(args: argparse.Namespace, context: int) -> int:
    capacity = args.max_prompt + args.max_reply
    if capacity > context:
        raise TrainingError(
            "The sequences would be longer than the target's context.",
            f"--max-prompt {args.max_prompt} and --max-reply {args.max_reply} exceed {context} tokens.",
            "Lower one of them.",
        )
    return capacity


def _open_local(args: argparse.Namespace) -> Backend:
    pair = _load(args, device=args.device, dtype=args.dtype)
    model = pair.target.model
    capacity = _need_context(args, pair.context_length)
    rows = args.batch or fitting_rows(model, capacity)
    engine = Engine(model, pair.stop_token_ids, rows, capacity, seed=args.seed, eager=args.eager)

    def facts() -> dict[str, Any]:
        return {
            "kind": "local", "device": engine.device_name, "dtype": str(model.dtype).removeprefix("torch."),
            "rows": rows, "capacity": capacity, "attention": engine.attention, "graph": engine.graphed,
            "steps": engine.steps,
        }  # fmt: skip

    print(
        f"{engine.device_name}, {facts()['dtype']}, {rows} rows of {capacity} tokens, {engine.attention}, "
        f"{'captured graph' if engine.graphed else 'eager'}.", file=sys.stderr, flush=True,
    )  # fmt: skip
    options = {**pair.chat_template_kwargs, **args.template_args}
    return Backend(
        _name(args.target),
        pair.tokenizer,
        options,
        pair.target.vocab_size,
        capacity,
        max(1, rows // 2),
        engine.generate,
        facts,
    )


def _tokenizer(args: argparse.Namespace) -> tuple[Any, Mapping[str, Any], tuple[int, ...], int]:
    """Tokenizer, template options, stop ids and context length of a target whose weights stay where they are."""
    known = KNOWN_PAIRS.get(args.target)
    if known is not None and known.target == EMBEDDED:
        pair = _load(args, device="cpu")
        return pair.tokenizer, pair.chat_template_kwargs, pair.stop_token_ids, pair.context_length
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = (
        known.target
        if known
        else str(Path(args.target).expanduser())
        if Path(args.target).expanduser().is_dir()
        else args.target
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=args.revision, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, revision=args.revision, trust_remote_code=False).get_text_config(
            decoder=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            "The target's tokenizer cannot be read.",
            f"{str(error).splitlines()[0][:200]}.",
            "Give its folder or Hub id with --target.",
        ) from error
    try:
        eos = GenerationConfig.from_pretrained(source, revision=args.revision).eos_token_id
    except OSError:
        eos = None
    eos = tokenizer.eos_token_id if eos is None else eos
    stops = (eos,) if isinstance(eos, int) else tuple(eos or ())
    # The tokenizer's own end comes first: it is what a reply that the server reports as stopped is closed with.
    stops = tuple(sorted(stops, key=lambda token: token != tokenizer.eos_token_id))
    return (
        tokenizer,
        known.chat_template_kwargs if known else {},
        stops,
        getattr(config, "max_position_embeddings", 2**20),
    )


def _open_server(args: argparse.Namespace) -> Backend:
    key = None
    if args.api_key_file:
        try:
            key = args.api_key_file.read_text("utf-8").strip()
        except OSError as error:
            raise TrainingError(
                "The key cannot be read.", f"{args.api_key_file}: {error.strerror}.", "Check --api-key-file."
            ) from error
    tokenizer, options, stops, context = _tokenizer(args)
    server = Server(args.server, args.model, tokenizer, stops, args.concurrency, key)
    model = server.check()

    def facts() -> dict[str, Any]:
        counts = {"answered": server.answered, "refused": server.refused}
        return {"kind": "server", "model": model, "concurrency": args.concurrency, **counts}

    options = {**options, **args.template_args}
    capacity = _need_context(args, context)
    return Backend(_name(args.target), tokenizer, options, len(tokenizer), capacity, 1, server.generate, facts)
