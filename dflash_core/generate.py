"""`python -m dflash_core.generate "prompt"`: one reply, streamed to the terminal; asks for it, does not decode."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TextIO

from dflash_core.config import SamplingParams
from dflash_core.decode import decode
from dflash_core.errors import DFlashError, PromptError
from dflash_core.events import Event, Finish
from dflash_core.loading import DEFAULT_PAIR, Pair, load_pair, pair_names
from dflash_core.prompts import chat_ids, text_ids
from dflash_core.tally import Tally
from dflash_core.terminal import Printer, legend, may_colour, summary

INTERRUPTED = 130
INTERRUPTION = "Ctrl-C"
ENDINGS = {"stop": "a stop token", "length": "the length limit", "context": "the end of the context"}


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name and load a pair, the same for every command."""
    pair = parser.add_argument_group("the pair")
    pair.add_argument("--pair", default=DEFAULT_PAIR, metavar="NAME", help=f"one of {', '.join(pair_names())} (default: %(default)s)")
    pair.add_argument("--target", metavar="T", help="a target of your own: a Hub id or a folder")
    pair.add_argument("--draft", metavar="D", help="a draft of your own: a Hub id or a folder; 'none' loads no draft")
    pair.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    pair.add_argument("--device-map", metavar="MAP", help="spread a large target over devices, for instance 'auto'")
    pair.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    pair.add_argument("--quantize", choices=("4bit", "8bit"), help="quantize the target (CUDA, needs bitsandbytes)")
    pair.add_argument("--revision", help="branch, tag or commit of the target on the Hub")
    pair.add_argument("--offline", action="store_true", help="use only what is on this machine already")


def load_from(options: argparse.Namespace, *, draft: bool = True) -> Pair:
    """The pair these options name. Raises `LoadError`."""
    return load_pair(
        options.pair,
        target=options.target,
        draft=options.draft if draft else "none",
        device=options.device,
        dtype=options.dtype,
        device_map=options.device_map,
        quantize=options.quantize,
        revision=options.revision,
        local_files_only=options.offline,
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dflash_core.generate", description="Reply to a prompt in the terminal.")
    parser.add_argument("prompt", nargs="?", help="what to reply to; '-' or nothing reads it from standard input")
    add_pair_arguments(parser)
    reply = parser.add_argument_group("the reply")
    reply.add_argument("--system", metavar="S", help="a system message")
    reply.add_argument(
        "--raw", action="store_true", help="go on from the prompt as plain text, without the chat template"
    )
    reply.add_argument("--no-draft", action="store_true", help="plain decoding, the baseline")
    reply.add_argument(
        "--block-size", type=int, metavar="K", help="slots per block, anchor included (default: the draft's)"
    )
    reply.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    reply.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    reply.add_argument("--top-p", type=float, default=1.0)
    reply.add_argument("--top-k", type=int, default=0)
    reply.add_argument("--seed", type=int)
    reply.add_argument(
        "--acceptance", choices=("match", "rejection"), default="match", help="the rule above temperature 0"
    )
    output = parser.add_argument_group("the output")
    output.add_argument("--show-steps", action="store_true", help="one line per step: drafted, accepted, corrected")
    output.add_argument("--json", action="store_true", help="print every event as one line of JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error of the user's, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        return _run(options, sys.stdout, sys.stderr)
    except DFlashError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader is gone; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(options: argparse.Namespace, out: TextIO, notes: TextIO) -> int:
    params = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        block_size=options.block_size,
        acceptance=options.acceptance,
    )
    text = _prompt_text(options.prompt)
    pair = load_from(options, draft=not options.no_draft)
    ids = _prompt_ids(pair, text, options.system, raw=options.raw)
    colour = may_colour(out, os.environ) and not options.json
    printer = None if options.json else Printer(out, pair.tokenizer, colour=colour, show_steps=options.show_steps)
    tally, ending = Tally(), INTERRUPTION
    with closing(decode(pair, ids, params, drafting=pair.draft is not None)) as events:
        try:
            for event in events:
                tally.add(event)
                if isinstance(event, Finish):
                    ending = ENDINGS[event.reason]
                printer.show(event) if printer else _write_line(event, out)
        except KeyboardInterrupt:
            pass
    if printer:
        printer.close()
    if colour and tally.drafted:
        print(legend(), file=notes)
    print(*summary(tally, ending), sep="\n", file=notes)
    return INTERRUPTED if ending == INTERRUPTION else 0


def _prompt_text(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise PromptError(
            "There is nothing to reply to.", "No prompt was given.", "Write it after the command, in quotes."
        )
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text.strip():
        raise PromptError("The prompt is empty.", "It holds no text.", "Write something to reply to.")
    return text


def _prompt_ids(pair: Pair, text: str, system: str | None, *, raw: bool) -> list[int]:
    if raw:
        return text_ids(pair.tokenizer, text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return chat_ids(pair.tokenizer, messages, **pair.chat_template_kwargs)


def _write_line(event: Event, out: TextIO) -> None:
    row = {"event": type(event).__name__.lower()} | dataclasses.asdict(event)
    out.write(json.dumps(row) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
