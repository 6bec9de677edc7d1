"""Paints a race's verdict as a picture to share, 1200 × 630; claims nothing the verdict does not, knows no widget."""

import io
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from app.race import LaneResult, Result
from app.race_words import verdict
from app.spans import committed_kind
from app.trace import parse
from dflash_core import Prefill, Step

WIDTH, HEIGHT, SCALE, MARGIN = 1200, 630, 2, 64
GROUND, PANEL, EDGE = "#0f1419", "#18202b", "#2b3644"
INK, SOFT = "#f3f4f6", "#aab6c3"
TONES = {"faster": "#56B4E9", "slower": "#F0B840", "even": "#d5dbe2"}
KINDS = {"accepted": "#56B4E9", "correction": "#F0B840", "bonus": "#F0B840", "first": "#7d8998", "plain": "#7d8998"}
IDENTITY = {
    "same": "Identical output, token for token",
    "rounding": "Output differs at a rounding tie only",
    "differs": "Output differs from plain decoding",
    "unknown": "Sampled: outputs not compared",
}

# Regular and bold of the families that systems come with, best first.
FAMILIES = (
    ("Inter-Regular.ttf", "Inter-Bold.ttf"),
    ("segoeui.ttf", "segoeuib.ttf"),
    ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf"),
    ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
    ("Arial.ttf", "Arial Bold.ttf"),
    ("arial.ttf", "arialbd.ttf"),
    ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
)
# What Pillow's own font cannot draw.
PLAIN_SIGNS = str.maketrans({"×": "x", "τ": "tau", "–": "-", "…": "...", "‘": "'", "’": "'", "≈": "~"})


def card(result: Result) -> bytes:
    """The verdict as PNG bytes."""
    words, canvas = verdict(result), _Canvas()
    colour = TONES[words.tone]
    canvas.text((MARGIN, 50), "DFlash", 30, INK, bold=True)
    canvas.text((MARGIN + canvas.width("DFlash ", 30, bold=True), 50), "block-diffusion speculative decoding", 30, SOFT)
    canvas.text((MARGIN - 6, 96), words.factor, 148, colour, bold=True)
    beside = MARGIN + canvas.width(words.factor, 148, bold=True) + 30
    canvas.text((beside, 152), _claim(words.tone), 40, INK, bold=True)
    canvas.text((beside, 206), words.basis, 26, SOFT)
    _bars(canvas, result, 292)
    _fingerprint(canvas, result.leader, 446)
    _key(canvas, 480)
    mark = "identical" if words.identity_tone == "same" else "other"
    canvas.mark((MARGIN, 532), mark, colour if mark == "identical" else KINDS["correction"])
    canvas.text((MARGIN + 36, 525), _told(words, result), 25, INK)
    facts = result.facts
    canvas.text(
        (MARGIN, 567),
        f"{facts['pair']} · {facts['device']} · {facts['dtype']} · “{facts['prompt']}”",
        22,
        SOFT,
        until=WIDTH - MARGIN,
    )
    return canvas.png()


def _claim(tone: str) -> str:
    return {
        "faster": "the speed of plain decoding",
        "slower": "the speed of plain decoding",
        "even": "no real difference",
    }[tone]


def _told(words: Any, result: Result) -> str:
    tau = result.leader.tau
    return IDENTITY[words.identity_tone] + ("" if tau is None else f"  ·  {tau:.2f} tokens per verify pass")


def _bars(canvas: "_Canvas", result: Result, top: int) -> None:
    """Seconds of plain decoding and of the lane the verdict speaks of, on one scale."""
    entries = (result.plain, result.leader)
    longest = max(entry.shown.seconds for entry in entries)
    left, right = MARGIN + 230, WIDTH - MARGIN - 250
    for row, entry in enumerate(entries):
        y = top + row * 66
        fill = "#7d8998" if entry is result.plain else KINDS["accepted"]
        canvas.text((MARGIN, y + 6), entry.lane.label.removesuffix(" (transformers)"), 25, INK, until=left - 16)
        end = left + max(10, round((right - left) * entry.shown.seconds / longest))
        canvas.bar((left, y, end, y + 44), fill)
        rate = entry.tokens_per_second
        canvas.text((end + 16, y + 6), f"{entry.shown.seconds:.2f} s · {rate.median:.1f} tok/s", 25, INK)


def _fingerprint(canvas: "_Canvas", entry: LaneResult, top: int) -> None:
    """Every token of the reply as a square, step by step: who wrote it."""
    runs = _runs(entry)
    total = sum(map(len, runs))
    gap, room = 7, WIDTH - 2 * MARGIN
    size = min(20.0, (room - gap * (len(runs) - 1)) / max(1, total))
    if size < 2.5:
        runs, size = runs[: max(1, int(room / 30))], 12.0
    x = float(MARGIN)
    for run in runs:
        for kind in run:
            if x + size > WIDTH - MARGIN:
                return
            canvas.cell((x, top, x + size - min(1.5, size / 4), top + 26), KINDS[kind])
            x += size
        x += gap


def _key(canvas: "_Canvas", top: int) -> None:
    """What the squares mean."""
    x = float(MARGIN)
    for kind, words in (("accepted", "drafted and accepted"), ("correction", "the target's own")):
        canvas.cell((x, top + 8, x + 12, top + 20), KINDS[kind])
        canvas.text((x + 20, top), words, 18, SOFT)
        x += canvas.width(words, 18) + 52


def _runs(entry: LaneResult) -> list[list[str]]:
    runs: list[list[str]] = []
    for event in parse(entry.shown.ndjson).events if entry.shown.ndjson else ():
        if isinstance(event, Prefill):
            runs.append(["first"])
        elif isinstance(event, Step):
            runs.append([committed_kind(event, i) for i in range(len(event.committed))])
    return runs


class _Canvas:
    """Drawing in card pixels on a picture twice as fine."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), GROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.rounded_rectangle(_scaled((20, 20, WIDTH - 20, HEIGHT - 20)), 28 * SCALE, PANEL, EDGE, 2 * SCALE)

    def text(
        self, at: tuple[float, float], text: str, size: int, fill: str, *, bold: bool = False, until: float = WIDTH
    ) -> None:
        font, stroke, own = _font(size, bold)
        shown = " ".join((text.translate(PLAIN_SIGNS) if own else text).split())
        while shown and at[0] + font.getlength(shown) / SCALE > until:
            shown = shown.rstrip("… .”")[:-1].rstrip() + ("..." if own else "…")
        self.draw.text(_scaled(at), shown, fill, font, stroke_width=stroke, stroke_fill=fill)

    def width(self, text: str, size: int, *, bold: bool = False) -> float:
        font, stroke, own = _font(size, bold)
        return font.getlength(text.translate(PLAIN_SIGNS) if own else text) / SCALE + stroke

    def bar(self, box: tuple[float, float, float, float], fill: str) -> None:
        self.draw.rounded_rectangle(_scaled(box), 8 * SCALE, fill)

    def cell(self, box: tuple[float, float, float, float], fill: str) -> None:
        self.draw.rounded_rectangle(_scaled(box), 2 * SCALE, fill)

    def mark(self, at: tuple[float, float], kind: str, fill: str) -> None:
        """A tick, or a wave for about-the-same."""
        x, y = at
        points = (
            [(x, y + 10), (x + 8, y + 18), (x + 23, y)]
            if kind == "identical"
            else [(x, y + 12), (x + 8, y + 4), (x + 15, y + 12), (x + 23, y + 4)]
        )
        self.draw.line([_scaled(point) for point in points], fill, 4 * SCALE, joint="curve")

    def png(self) -> bytes:
        out = io.BytesIO()
        self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
        return out.getvalue()


def _scaled(numbers: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(number * SCALE for number in numbers)


@cache
def _font(size: int, bold: bool) -> tuple[Any, int, bool]:
    """The font, an outline that stands in for a missing bold, and whether it is Pillow's own of few signs."""
    for names in FAMILIES:
        try:
            return ImageFont.truetype(names[bold], size * SCALE), 0, False
        except OSError:
            continue
    return ImageFont.load_default(size * SCALE), (max(1, size * SCALE // 40) if bold else 0), True
