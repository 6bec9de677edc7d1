"""Probabilities follow the settings, picks follow the probabilities, and both acceptance rules leave p unchanged."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dflash_core import DFlashError, SamplingParams
from dflash_core.sampling import Sampler, confidence, pick, probabilities
from dflash_core.scheduler import judge, matching_prefix
from tests import tiny
from tests.scripted import OracleDrafter, run

CPU = torch.device("cpu")


def chi_square_limit(cells: int) -> float:
    """Wilson-Hilferty upper limit that a true null exceeds once in about 3.5 million tests (5 sigma, one-sided)."""
    d = cells - 1
    return d * (1 - 2 / (9 * d) + 5 * (2 / (9 * d)) ** 0.5) ** 3


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    assert (expected > 5).all(), "too few expected hits for the test to mean anything"
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature,top_p,top_k", [(0.7, 1.0, 0), (1.0, 0.9, 0), (1.3, 1.0, 7), (0.8, 0.6, 12), (1.0, 0.01, 0)])
def test_probabilities_equal_transformers_warpers(temperature, top_p, top_k):
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(1)) * 3
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1.0:
        warped = TopPLogitsWarper(top_p)(None, warped)
    torch.testing.assert_close(probabilities(logits, temperature, top_p, top_k), warped.softmax(-1), atol=1e-6, rtol=1e-4)


def test_top_p_reaches_past_its_sorting_depth():
    """A flat row needs more tokens than the first partial sort holds."""
    probs = probabilities(torch.zeros(1, 5000), 1.0, top_p=0.5)
    assert int((probs > 0).sum()) >= 2500


def test_pick_is_the_inverse_cumulative_distribution():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).expand(6, 4)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9999999, 1 - 2**-53], dtype=torch.float64)
    assert pick(probs, uniforms).tolist() == [1, 1, 3, 3, 3, 3]


def test_uniforms_depend_on_seed_and_position_only():
    a, b = (Sampler(SamplingParams(temperature=1.0, seed=3), CPU) for _ in range(2))
    whole = a.uniforms_at(0, 600)
    assert torch.equal(b.uniforms_at(590, 10), whole[590:])
    assert torch.equal(b.uniforms_at(17, 5), whole[17:22])
    assert not torch.equal(Sampler(SamplingParams(temperature=1.0, seed=4), CPU).uniforms_at(0, 600), whole)
    assert not torch.equal(a.fresh_uniforms(600), whole)


def test_confidence_is_the_probability_at_temperature_one():
    logits = torch.randn(3, 50)
    tokens = torch.tensor([4, 9, 49])
    torch.testing.assert_close(confidence(logits, tokens), logits.softmax(-1)[torch.arange(3), tokens])


@pytest.mark.parametrize("length", [1, 3, 7])
def test_matching_prefix_by_enumeration(length):
    for drafted in itertools.product(range(2), repeat=length):
        for posterior in itertools.product(range(2), repeat=length + 1):
            expected = next((i for i in range(length) if drafted[i] != posterior[i]), length)
            assert int(matching_prefix(torch.tensor(drafted), torch.tensor(posterior))) == expected


class ThreeTokens:
    """A target and a draft over three tokens whose distributions depend on the prefix, as tables."""

    def __init__(self, seed: int, k: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.k = k
        prefixes = [p for n in range(k + 1) for p in itertools.product(range(3), repeat=n)]
        self.p = {prefix: torch.randn(3, generator=generator).mul(0.6) for prefix in prefixes}
        self.q = [torch.randn(3, generator=generator).mul(0.9) for _ in range(k)]

    def exact(self) -> dict[tuple[int, ...], float]:
        """Probability of every sequence of k + 1 tokens under the target alone."""
        result = {}
        for sequence in itertools.product(range(3), repeat=self.k + 1):
            probability = 1.0
            for i, token in enumerate(sequence):
                probability *= float(self.p[sequence[:i]].softmax(-1)[token])
            result[sequence] = probability
        return result

    def sample(self, sampler: Sampler, position: int) -> tuple[int, ...]:
        """k + 1 tokens by repeated blocks: draft, judge, keep, draft again from what was kept."""
        kept: tuple[int, ...] = ()
        while len(kept) <= self.k:
            room = self.k - len(kept)
            logits = torch.stack([*self.q[len(kept) :]]) if room else torch.empty(0, 3)
            drafted, probs, _ = sampler.draft(logits) if room else (torch.empty(0, dtype=torch.long), None, None)
            path = drafted.tolist()
            rows = torch.stack([self.p[(*kept, *path[:i])] for i in range(room + 1)])
            verdict = judge(sampler, rows, drafted, probs, position + len(kept))
            kept += (*path[: verdict.accepted], int(verdict.posterior[verdict.accepted]))
        return kept[: self.k + 1]


@pytest.mark.parametrize("acceptance", ["match", "rejection"])
@pytest.mark.parametrize("seed", [0, 1])
def test_three_token_sequences_follow_the_target_exactly(acceptance, seed):
    """27 sequences, 12,000 draws: chi-square with 26 degrees of freedom; a right rule fails once in 3.5 million."""
    world = ThreeTokens(seed, k=2)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed, acceptance=acceptance), CPU)
    counts = Counter(world.sample(sampler, position=3 * draw) for draw in range(12_000))
    exact = world.exact()
    observed = torch.tensor([float(counts[sequence]) for sequence in exact])
    assert chi_square(observed, torch.tensor(list(exact.values()))) < chi_square_limit(27)


def test_the_chi_square_test_can_fail():
    """Comparing a sampled draft with min(p, q) but drawing the correction from p, not the residual, is caught."""
    world = ThreeTokens(0, k=2)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0, acceptance="rejection"), CPU)
    exact = world.exact()
    counts = Counter()
    for _ in range(12_000):
        logits = torch.stack(world.q)
        drafted, q, _ = sampler.draft(logits)
        kept: tuple[int, ...] = ()
        for i in range(2):
            p = world.p[kept].softmax(-1)
            d = int(drafted[i])
            if float(sampler.fresh_uniforms(1)) * float(q[i, d]) >= float(p[d]):
                break
            kept += (d,)
        while len(kept) < 3:
            kept += (int(pick(world.p[kept].softmax(-1)[None], sampler.fresh_uniforms(1))),)
        counts[kept] += 1
    observed = torch.tensor([float(counts[sequence]) for sequence in exact])
    assert chi_square(observed, torch.tensor(list(exact.values()))) > chi_square_limit(27)


@pytest.mark.parametrize("acceptance", ["match", "rejection"])
def test_tiny_pair_second_token_follows_the_target(acceptance):
    """The token after the first, from 3,000 whole runs of a real loop with a draft that is right half of the time.

    A run's second token is a draft accepted or a correction, so both paths are in the counts. Tokens expected fewer
    than 6 times share one cell. A right loop fails once in 3.5 million.
    """
    model = tiny.tiny_llama()
    pair = tiny.tiny_pair(model, tiny.tiny_draft(model.config, block_size=4))
    ids = [5, 17, 99, 42]
    settings = dict(temperature=1.0, stop_token_ids=(), acceptance=acceptance, top_k=8)
    first = run(pair, ids, SamplingParams(max_new_tokens=1, temperature=0.0, stop_token_ids=()))[0][0]

    def only_first(tokens, logits):
        if len(tokens) > len(ids):
            return logits
        return torch.full_like(logits, float("-inf")).index_fill(0, torch.tensor([first]), 0.0)

    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, first]])).logits[0, -1]
    exact = probabilities(logits[None], 1.0, top_k=8)[0]
    likely = int(exact.argmax())
    counts, accepted, drawn = torch.zeros(128), 0, 3_000
    for seed in range(drawn):
        params = SamplingParams(max_new_tokens=3, seed=seed, processors=(only_first,), **settings)
        drafter = OracleDrafter([first, likely, 0, 0], 128, 2, right_of=lambda step: 1)
        reply, events = run(pair, ids, params, drafter=drafter)
        counts[reply[1]] += 1
        accepted += events[1].accepted > 0
    assert counts[exact == 0].sum() == 0
    common = exact * drawn >= 6
    cells = torch.cat((exact[common], exact[~common].sum()[None]))
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    if float(cells[-1]) * drawn <= 5:
        cells, observed = cells[:-1], observed[:-1]
    assert chi_square(observed, cells / cells.sum()) < chi_square_limit(len(cells))
    assert accepted == pytest.approx(float(exact[likely]) * drawn, abs=5 * (drawn / 4) ** 0.5)


@pytest.mark.parametrize(
    "settings,found",
    [
        ({"temperature": -0.1}, "'temperature' is -0.1"),
        ({"temperature": float("nan")}, "'temperature' is nan"),
        ({"top_p": 0.0}, "'top_p' is 0.0"),
        ({"top_p": 1.1}, "'top_p' is 1.1"),
        ({"top_k": -1}, "'top_k' is -1"),
        ({"max_new_tokens": 0}, "'max_new_tokens' is 0"),
        ({"block_size": 1}, "'block_size' is 1"),
        ({"acceptance": "typical"}, "'acceptance' is 'typical'"),
        ({"stop_strings": ("",)}, "'stop_strings'"),
        ({"seed": -1}, "'seed' is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, found):
    with pytest.raises(DFlashError, match=found):
        SamplingParams(**settings)
