"""The plotly figures show the run's own numbers."""

import json

import pytest

from app import charts
from app.stats import summarise
from tests.xray_script import run_events

RUN = list(run_events(list(range(1, 40)), accepted=(3, 0, 7, 2), k=7))
PLAIN = list(run_events(list(range(1, 40)), accepted=(0,), k=0))


def trace_named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_committed_stacks_the_drafts_and_the_targets_tokens():
    figure = charts.committed_figure(RUN)
    accepted, own = trace_named(figure, "accepted").y, trace_named(figure, "correction or bonus").y
    assert list(accepted)[:4] == [3, 0, 7, 2] and set(own) == {1}
    assert sum(accepted) + sum(own) == 38
    assert trace_named(figure, "running mean τ").y[-1] == pytest.approx(summarise(RUN).tau)
    assert list(trace_named(figure, "plain decoding").y) == [1, 1]


def test_positions_and_lengths_are_the_stats():
    stats = summarise(RUN)
    assert tuple(charts.positions_figure(stats).data[0].y) == stats.acceptance_by_position
    assert tuple(charts.lengths_figure(stats).data[0].y) == stats.accepted_lengths


def test_over_time_has_a_baseline_only_when_one_was_measured():
    assert len(charts.over_time_figure(RUN).data) == 1
    figure = charts.over_time_figure(RUN, PLAIN)
    assert trace_named(figure, "plain decoding").line.dash == "dash"
    assert [lane.y[-1] for lane in figure.data] == [39, 39]


def test_plain_decoding_that_was_not_run_is_drawn_at_the_pace_measured_before():
    line = charts.over_time_figure(RUN, plain_seconds=0.05).data[1]
    start, end = RUN[0].seconds, charts.tokens_over_time(RUN)[0][-1]
    assert tuple(line.x) == pytest.approx((start, end)) and line.y[0] == 1
    assert (line.y[1] - 1) * 0.05 == pytest.approx(end - start)
    assert line.name == "plain, 50 ms a token" and line.line.dash == "dash"
    # Neither a baseline nor a run beside its own baseline needs it.
    assert len(charts.over_time_figure(PLAIN, plain_seconds=0.05).data) == 1
    assert len(charts.over_time_figure(RUN, PLAIN, plain_seconds=0.05).data) == 2


def test_time_split_adds_up_to_the_decode_time():
    stats = summarise(RUN)
    figure = charts.time_split_figure({"This run": stats})
    assert sum(part.x[0] for part in figure.data) == pytest.approx(stats.decode_seconds)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("events", [RUN, PLAIN, RUN[:1], []], ids=["run", "plain", "prefill", "empty"])
def test_every_figure_serialises_for_any_run(events, dark):
    figures = charts.figures(events, PLAIN if events is RUN else (), dark=dark)
    assert list(figures) == ["committed", "positions", "lengths", "over_time", "time_split"]
    for figure in figures.values():
        assert json.loads(figure.to_json())["layout"]["font"]["color"] == ("#f3f4f6" if dark else "#111827")
