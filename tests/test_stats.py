"""Totals of a run against counting by hand."""

import pytest

from app.stats import RunStats, add, committed_per_step, modelled_speedup, running_mean, summarise, tokens_over_time
from dflash_core import Finish, Prefill, Step


def step(index, drafted, accepted, committed=None):
    k = len(drafted)
    committed = tuple(range(accepted + 1)) if committed is None else committed
    return Step(index, 0, 0, tuple(drafted), (0,) * (k + 1), accepted, 0, committed, (0.5,) * k, (0.5,) * (k + 1), 0.01, 0.03)


EVENTS = [
    Prefill(10, 5, 0.2),
    step(0, (1, 2, 3), 2),
    step(1, (1, 2, 3), 0),
    step(2, (1, 2, 3), 3),
    step(3, (1,), 1, committed=(4,)),
    Finish("stop", 10, 4, 0.5),
]


def test_nothing_is_known_before_anything_happened():
    empty = summarise([])
    assert empty == RunStats()
    assert (empty.tau, empty.acceptance_rate, empty.tokens_per_second, empty.other_seconds) == (None,) * 4
    assert empty.time_to_first_token_seconds is None


def test_counts_by_hand():
    stats = summarise(EVENTS)
    assert (stats.steps, stats.committed, stats.new_tokens, stats.drafted, stats.accepted) == (4, 9, 10, 10, 6)
    assert stats.tau == 9 / 4
    assert stats.acceptance_rate == 6 / 10
    assert stats.accepted_lengths == (1, 1, 1, 1)
    assert (stats.offered, stats.kept) == ((4, 3, 3), (3, 2, 1))
    assert stats.acceptance_by_position == (3 / 4, 2 / 3, 1 / 3)
    assert stats.reason == "stop" and stats.prompt_tokens == 10


def test_times_and_speed():
    stats = summarise(EVENTS)
    assert stats.time_to_first_token_seconds == 0.2
    assert stats.decode_seconds == pytest.approx(0.3)
    assert stats.tokens_per_second == pytest.approx(9 / 0.3)
    assert (stats.draft_seconds, stats.verify_seconds) == (pytest.approx(0.04), pytest.approx(0.12))
    assert stats.other_seconds == pytest.approx(0.14)


def test_a_run_still_going_knows_its_speed_from_its_steps():
    stats = summarise(EVENTS[:3])
    assert stats.total_seconds is None and stats.other_seconds is None
    assert stats.tokens_per_second == pytest.approx(4 / 0.08)


def test_folding_one_by_one_is_the_same_as_all_at_once():
    stats = RunStats()
    for event in EVENTS:
        before = stats
        stats = add(stats, event)
        assert before is not stats
    assert stats == summarise(EVENTS)


def test_the_baseline_commits_one_per_pass_and_has_no_acceptance_rate():
    stats = summarise([Prefill(1, 1, 0.1), step(0, (), 0), step(1, (), 0)])
    assert stats.tau == 1.0 and stats.acceptance_rate is None
    assert stats.acceptance_by_position == () and stats.accepted_lengths == (2,)


def test_series():
    assert committed_per_step(EVENTS) == [3, 1, 4, 1]
    assert running_mean([3, 1, 4]) == [3, 2, pytest.approx(8 / 3)]
    seconds, tokens = tokens_over_time(EVENTS)
    assert seconds == pytest.approx([0, 0.2, 0.24, 0.28, 0.32, 0.36])
    assert tokens == [0, 1, 4, 5, 9, 10]


def test_modelled_speedup_breaks_even_at_one():
    assert modelled_speedup(2.0, 0.03, 0.02, 0.04) == pytest.approx(1.0)
    assert modelled_speedup(4.0, 0.03, 0.02, 0.04) == pytest.approx(2.0)
