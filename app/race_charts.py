"""The plotly figure of a suite: speed by category, whiskers from slowest to fastest repeat; measures nothing."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from app.charts import DARK, FONT, LIGHT
from app.suites import ALL

# Lanes are told apart by hue and by hatching; plain decoding is always the grey one.
HATCHES = ("", "", "/", "x", ".", "\\")


def suite_figure(rows: Sequence[dict[str, Any]], *, dark: bool = False) -> go.Figure:
    """`rows` as `suites.table` makes them."""
    ink = DARK if dark else LIGHT
    colours = (ink.other, ink.accepted, ink.accepted, ink.own, ink.own, ink.accepted)
    lanes = list(dict.fromkeys(row["lane"] for row in rows))
    figure = go.Figure()
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
    axis = {"gridcolor": ink.grid, "linecolor": ink.grid, "zerolinecolor": ink.grid}
    figure.update_layout(
        title={
            "text": "Tokens per second by kind of prompt",
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "font": {"size": 15},
        },
        font={"family": FONT, "size": 13, "color": ink.text},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 20, "t": 84, "b": 40},
        height=380,
        barmode="group",
        bargap=0.3,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        xaxis=axis | {"showgrid": False},
        yaxis=axis | {"title": "tokens per second", "rangemode": "tozero"},
        modebar={"remove": ["lasso2d", "select2d"]},
    )
    return figure


def _name(row: dict[str, Any]) -> str:
    return "all prompts" if row["category"] == ALL else row["category"]
