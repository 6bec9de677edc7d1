"""Plotly figures of finished runs, for reading closely and for saving as a picture; refuses to know HTML and models.

Blue is the draft's accepted work, amber the target's own tokens, grey a baseline; shapes and labels say the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import plotly.graph_objects as go

from app.stats import RunStats, committed_per_step, running_mean, summarise, tokens_over_time
from dflash_core import Finish, Prefill, Step

Event: TypeAlias = Prefill | Step | Finish
FONT = "ui-sans-serif, system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif"


@dataclass(frozen=True, slots=True)
class Inks:
    """The colours of one theme; the ground is transparent and the page shows through."""

    text: str
    grid: str
    accepted: str
    own: str
    other: str


LIGHT = Inks(text="#111827", grid="#dde3ea", accepted="#0072B2", own="#B26A00", other="#666666")
DARK = Inks(text="#f3f4f6", grid="#2b3644", accepted="#56B4E9", own="#F0B840", other="#a3a3a3")


def figures(
    events: Sequence[Event], baseline: Sequence[Event] = (), *, plain_seconds: float | None = None, dark: bool = False
) -> dict[str, go.Figure]:
    """All figures of one run by name, in reading order.

    Plain decoding of the same prompt is `baseline` where it was run, else `plain_seconds` is what a pass took before.
    """
    stats = summarise(events)
    return {
        "committed": committed_figure(events, dark=dark),
        "positions": positions_figure(stats, dark=dark),
        "lengths": lengths_figure(stats, dark=dark),
        "over_time": over_time_figure(events, baseline, plain_seconds=plain_seconds, dark=dark),
        "time_split": time_split_figure({"This run": stats} | ({"Plain": summarise(baseline)} if baseline else {}), dark=dark),
    }


def committed_figure(events: Sequence[Event], *, dark: bool = False) -> go.Figure:
    """Committed tokens per verify pass: the draft's below, the target's own on top, the running mean τ, plain's 1."""
    ink = DARK if dark else LIGHT
    steps = [event for event in events if isinstance(event, Step)]
    numbers = [step.index + 1 for step in steps]
    drafted = [min(step.accepted, len(step.committed)) for step in steps]
    own = [len(step.committed) - kept for step, kept in zip(steps, drafted)]
    mean = running_mean(committed_per_step(events))
    figure = blank("Committed tokens per step", "step", "tokens", ink)
    figure.add_bar(x=numbers, y=drafted, name="accepted", marker_color=ink.accepted, hovertemplate="%{y} accepted")
    figure.add_bar(x=numbers, y=own, name="correction or bonus", marker=_hatched(ink.own), hovertemplate="%{y} own")
    figure.add_scatter(x=numbers, y=mean, name="running mean τ", mode="lines", line={"color": ink.text, "width": 2},
                       hovertemplate="τ %{y:.2f}")  # fmt: skip
    figure.add_scatter(x=[0.5, len(steps) + 0.5], y=[1, 1], name="plain decoding", mode="lines", hoverinfo="skip",
                       line={"color": ink.text, "width": 1.5, "dash": "dash"})  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.15, hovermode="x unified")
    figure.update_xaxes(range=[0.5, len(steps) + 0.5], showgrid=False)
    return figure


def positions_figure(stats: RunStats, *, dark: bool = False) -> go.Figure:
    """The share of drafted tokens accepted at each position of the block."""
    ink = DARK if dark else LIGHT
    shares = stats.acceptance_by_position
    figure = blank("Accepted by position in the block", "position", "accepted", ink)
    figure.add_bar(
        x=list(range(1, len(shares) + 1)),
        y=list(shares),
        marker_color=ink.accepted,
        text=[f"{share:.0%}" for share in shares],
        textposition="outside",
        cliponaxis=False,
        customdata=list(zip(stats.kept, stats.offered)),
        hovertemplate="position %{x}: %{customdata[0]} of %{customdata[1]} accepted<extra></extra>",
    )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    figure.update_xaxes(dtick=1, range=[0.5, len(shares) + 0.5], showgrid=False)
    return figure


def lengths_figure(stats: RunStats, *, dark: bool = False) -> go.Figure:
    """How many steps accepted exactly 0, 1, … k drafted tokens."""
    ink = DARK if dark else LIGHT
    figure = blank("Accepted tokens per step", "drafted tokens accepted", "steps", ink)
    figure.add_bar(
        x=list(range(len(stats.accepted_lengths))),
        y=list(stats.accepted_lengths),
        marker_color=ink.accepted,
        text=list(stats.accepted_lengths),
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y} steps accepted %{x}<extra></extra>",
    )
    figure.update_xaxes(dtick=1, showgrid=False, zeroline=False)
    return figure


def over_time_figure(
    events: Sequence[Event], baseline: Sequence[Event] = (), *, plain_seconds: float | None = None, dark: bool = False
) -> go.Figure:
    """Reply tokens over measured seconds; plain decoding as a dashed line, run or at the pace measured before."""
    ink = DARK if dark else LIGHT
    figure = blank("Tokens over time", "seconds", "tokens", ink)
    lanes = [("this run", events, ink.accepted, "solid")] + ([("plain decoding", baseline, ink.other, "dash")] if baseline else [])
    for name, lane, colour, dash in lanes:
        x, y = tokens_over_time(lane)
        figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"color": colour, "width": 2.5, "dash": dash, "shape": "hv"},
                           hovertemplate="%{y} tokens after %{x:.2f} s")  # fmt: skip
    if plain_seconds and not baseline and any(isinstance(event, Step) and event.drafted for event in events):
        x, _ = tokens_over_time(events)
        figure.add_scatter(x=[x[1], x[-1]], y=[1, 1 + (x[-1] - x[1]) / plain_seconds], name=f"plain, {plain_seconds * 1e3:.0f} ms a token",
                           mode="lines", line={"color": ink.other, "width": 2.5, "dash": "dash"},
                           hovertemplate="%{y:.0f} tokens after %{x:.2f} s at the pace measured at the start")  # fmt: skip
    return figure


def time_split_figure(runs: dict[str, RunStats], *, dark: bool = False) -> go.Figure:
    """Where the seconds after the prefill went, one bar per run: drafting, verifying, anything else."""
    ink = DARK if dark else LIGHT
    figure = blank("Where the time went", "seconds after the prefill", "", ink)
    parts = (
        ("draft", lambda stats: stats.draft_seconds, _hatched(ink.accepted)),
        ("verify", lambda stats: stats.verify_seconds, {"color": ink.accepted}),
        ("other", lambda stats: stats.other_seconds or 0.0, {"color": ink.other}),
    )
    names = list(runs)
    for name, seconds, marker in parts:
        values = [seconds(stats) for stats in runs.values()]
        figure.add_bar(y=names, x=values, name=name, orientation="h", marker=marker, hovertemplate="%{x:.3f} s")
    figure.update_layout(barmode="stack", height=150 + 60 * len(runs))
    figure.update_yaxes(autorange="reversed")
    return figure


def _hatched(colour: str) -> dict[str, Any]:
    """The same hue told apart by a pattern, so that colour is never alone."""
    return {"color": colour, "pattern": {"shape": "/", "size": 5, "solidity": 0.25}}


def blank(title: str, x: str, y: str, ink: Inks) -> go.Figure:
    """A figure with its title, axes and colours, and nothing drawn."""
    figure = go.Figure()
    axis = {"gridcolor": ink.grid, "linecolor": ink.grid, "zerolinecolor": ink.grid, "rangemode": "tozero"}
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 15}},
        font={"family": FONT, "size": 13, "color": ink.text},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 20, "t": 48, "b": 78},
        height=360,
        # Below the figure: beside the title there is no room for it on a phone.
        legend={"orientation": "h", "traceorder": "normal", "x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "yref": "container"},
        xaxis={"title": x, **axis},
        yaxis={"title": y, **axis},
        modebar={"remove": ["lasso2d", "select2d"]},
    )
    return figure
