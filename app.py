"""Starts the app: reads the arguments, opens the page at once and loads the pair behind it; knows no chat and no decode."""

import argparse
import logging
import sys

log = logging.getLogger("dflash")

EXAMPLES = """examples:
  python app.py                                     the default pair, on this machine only
  python app.py --pair qwen3-4b --device cuda       a larger pair
  python app.py --target ./my-model --draft ./my-draft
  python app.py --public --host 0.0.0.0             a shared host: caps on size and rate, listed pairs only
"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="app.py", description="Chat with a language model and watch DFlash speculative decoding work.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--pair", default="smollm2-135m", help="named pair to load (default: %(default)s)")
    parser.add_argument("--target", help="target of your own: Hub id or folder")
    parser.add_argument("--draft", help="draft model for the target or the pair: Hub id or folder, or 'none'")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(default: %(default)s)"
    )
    parser.add_argument("--quantize", choices=("4bit", "8bit"), help="load the target's weights smaller (CUDA)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="open a temporary public link through Gradio's servers")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")
    parser.add_argument("--public", action="store_true", help="caps for a shared host: chat size, tokens, runs a minute, pairs")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for name in ("dflash", "app"):
        logging.getLogger(name).setLevel(chosen.log_level.upper())
    log.info("starting")
    from app.server import serve

    return serve(chosen)


if __name__ == "__main__":
    sys.exit(main())
