"""The plotly figure of a suite: speed by category, whiskers from slowest to fastest repeat; measures nothing."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from app.charts import DARK, LIGHT, blank
from app.suites import ALL

# Lanes are told apart by hue and by hatching; plain decoding is always the grey one.
HATCHES = ("", "", "/", "x", ".", "\\")


def suite_figure(rows: Sequence[dict[str, Any]], *, dark: bool = False) -> go.Figure:
    """`rows` as `suites.table` makes them."""
    ink = DARK if dark else LIGHT
    colours = (ink.other, ink.accepted, ink.accepted, ink.own, ink.own, ink.accepted)
    lanes = list(dict.fromkeys(row["lane"] for row in rows))
    figure = blank("Tokens per second by kind of prompt", "", "tokens per second", ink)
    for number, lane in enumerate(lanes):
        own = [row for row in rows if row["lane"] == lane]
        median = [row["tokens_per_second"] for row in own]
        figure.add_bar(
            x=[_name(row) for row in own],
            y=median,
            name=lane,
            marker={"color": colours[number % 6], "pattern": {"shape": HATCHES[number % 6], "size": 6}},
            error_y={
                "type": "data", "symmetric": False, "color": ink.text, "thickness": 1.5, "width": 5,
                "array": [row["high"] - middle for row, middle in zip(own, median)],
                "arrayminus": [middle - row["low"] for row, middle in zip(own, median)],
            },
            customdata=[[row["speedup"], row["low"], row["high"]] for row in own],
            text=[f"{row['speedup']:.2f}×" if number else "" for row in own],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            hovertemplate="%{y:.1f} tok/s (%{customdata[1]:.1f}–%{customdata[2]:.1f}), %{customdata[0]:.2f}× plain",
        )  # fmt: skip
    figure.update_layout(
        margin={"t": 84, "b": 40},
        height=380,
        barmode="group",
        bargap=0.3,
        legend={"y": 1.02, "yref": "paper"},
        xaxis={"showgrid": False, "rangemode": "normal"},
    )
    return figure


def _name(row: dict[str, Any]) -> str:
    return "all prompts" if row["category"] == ALL else row["category"]
