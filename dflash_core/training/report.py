"""What a run leaves behind for people: metric lines, a plot and a model card; knows no tensors."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dflash_core.config import DraftConfig

METRICS = "metrics.jsonl"
PLOT = "report.html"


def shown_bytes(count: float) -> str:
    """ "1.2 GB" or "34 MB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


class Metrics:
    """`metrics.jsonl` in the output folder: one object a line, kind "step" or "evaluation".

    A resumed run first drops the lines after its state's step, so that every step is there once.
    """

    def __init__(self, output: Path, step: int) -> None:
        self._path = output / METRICS
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        fresh = self._path.with_name("." + METRICS)
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
        fresh.replace(self._path)

    def add(self, kind: str, step: int, **values: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut off by a kill is dropped."""
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        yield record


def plot(output: Path) -> Path | None:
    """Loss and acceptance length over steps as one self-contained HTML page; None where plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        return None
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    records = list(read_metrics(output / METRICS))
    steps = [record for record in records if record["kind"] == "step"]
    scores = [record for record in records if record["kind"] == "evaluation"]
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    figure.add_trace(
        graph_objects.Scatter(
            x=[r["step"] for r in steps], y=[r["loss"] for r in steps], name="loss", line={"width": 1}
        ),
        secondary_y=True,
    )
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for record in scores:
        for name, tau in {"all prompts": record["tau"], **record["tau_by_category"]}.items():
            across, up = lines.setdefault(name, ([], []))
            across.append(record["step"])
            up.append(tau)
    for name, (across, up) in lines.items():
        width = 3 if name == "all prompts" else 1.5
        figure.add_trace(
            graph_objects.Scatter(x=across, y=up, name=f"τ {name}", line={"width": width}), secondary_y=False
        )
    figure.update_layout(title="Acceptance length τ on held-out prompts, and training loss", template="plotly_white")
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="τ (committed tokens per verify pass)", secondary_y=False)
    figure.update_yaxes(title_text="loss", secondary_y=True, showgrid=False)
    path = output / PLOT
    figure.write_html(path, include_plotlyjs=True)
    return path


def card(
    target: str, config: DraftConfig, data: Mapping[str, Any], settings: Mapping[str, Any],
    progress: Mapping[str, Any], evaluation: Mapping[str, Any] | None, start: str,
) -> str:  # fmt: skip
    """The checkpoint's README.md: what it is, what it scores, what made it."""
    taps, kind = ", ".join(map(str, config.target_layer_ids)), config.kind
    parts = [
        f"# {kind} draft model for {target}",
        f"A block-diffusion draft model ({kind}, arXiv 2602.06036) for speculative decoding: "
        f"{config.num_hidden_layers} layers, blocks of {config.block_size} (one anchor, "
        f"{config.block_size - 1} drafted tokens), target layers {taps}, "
        f"mask token {config.mask_token_id}{_dflash2(config)}. "
        "It shares the target's embedding and head and works with no other target.",
        "## Acceptance length",
        _score_table(evaluation) if evaluation else "Not evaluated yet.",
        "## Data",
        _list(data),
        "## Training",
        f"{start} {progress['steps']:,} steps, {progress['minutes']:.1f} minutes, "
        f"{progress['tokens']:,} context tokens seen.",
        _list(settings),
    ]
    return "\n\n".join(parts) + "\n"


def _dflash2(config: DraftConfig) -> str:
    taps, rank = config.conv_kernel_size, config.selector_rank
    convolution = f", a convolution over {taps} slots around every sublayer" if taps else ""
    return convolution + (f", a candidate selector of rank {rank}" if rank else "")


def source(name: str, manifest: Mapping[str, Any]) -> str:
    """One source of training data in a line: its name and, where a manifest tells, how its replies were made."""
    runs = manifest.get("runs") or []
    replies = sum(run["replies"] for run in runs)
    if not replies:
        return name
    greedy, last = sum(run["greedy"] for run in runs) / replies, runs[-1]["settings"]
    return (
        f"{name}: {replies:,} replies, {sum(run['reply_tokens'] for run in runs):,} tokens, {greedy:.0%} greedy, the rest"
        f" at temperature {last['temperature']}, at most {last['max_reply']} tokens each"
    )


def _score_table(evaluation: Mapping[str, Any]) -> str:
    rows = ["| held-out prompts | τ |", "|---|---|"]
    rows += [f"| {name} | {tau:.2f} |" for name, tau in evaluation["tau_by_category"].items() if tau is not None]
    for name, key in (("all", "tau"), ("first 64 tokens of a reply", "tau_opening"), ("later tokens", "tau_later")):
        if evaluation[key] is not None:
            rows.append(f"| {name} | {evaluation[key]:.2f} |")
    slots = " ".join(f"{rate:.2f}" for rate in evaluation["match_by_slot"])
    kept = " ".join(f"{rate:.2f}" for rate in evaluation["accepted_by_slot"])
    return "\n".join(
        [
            "Committed tokens per verify pass, greedy, by teacher forcing on the target's own replies"
            f" ({evaluation['replies']} prompts, at most {evaluation['max_new_tokens']} tokens each).",
            "",
            *rows,
            "",
            f"Drafted token right, by slot: {slots}. Accepted when all before it were: {kept}.",
        ]
    )


def _list(values: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value not in (None, (), [], {}, "")}
    return "\n".join(f"- {name.replace('_', ' ')}: {_short(value)}" for name, value in shown.items())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:397] + "..."
