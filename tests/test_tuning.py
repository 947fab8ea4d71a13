"""The training loop, on problems small enough to know the answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from verbtune.tuning import History, TuningError, in_rounds, tune

TARGETS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])
DEFAULTS: dict[str, Any] = {
    "learning_rate": 0.1, "steps": 20, "warmup": 0.1, "weight_decay": 0.0, "max_grad_norm": 1e3,
}  # fmt: skip


class Prompt(nn.Module):
    """Three vectors that start at zero, one of which nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, 2))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self) -> Tensor:
        return self.theta * 1.0


def run(
    prompt: Prompt,
    *,
    size: int = 3,
    seed: int = 0,
    seen: list[list[int]] | None = None,
    during: Callable[[int], None] | None = None,
    **options: Any,
) -> History:
    """Pull the first two vectors to the targets, weighting the first one ten times."""
    calls = 0

    def loss(index: Sequence[int], vectors: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        if during:
            during(calls)
        if seen is not None:
            seen.append(list(index))
        assert vectors is not None
        return (vectors[:2] - TARGETS[list(index)].mean(0)).square().mul(torch.tensor([[10.0], [1.0]])).sum()

    return tune(prompt, loss, in_rounds([1, 1, 1], size, seed), prompt=prompt, **(DEFAULTS | options))


def script(*scores: float) -> Callable[[], float]:
    """A validation that says the given scores one after the other."""
    lines: Iterator[float] = iter(scores)
    return lambda: next(lines)


# -- what is learned ---------------------------------------------------------------------------------------------------


def test_it_minimises_the_loss_and_trains_nothing_else() -> None:
    prompt = Prompt()
    history = run(prompt, steps=300)
    torch.testing.assert_close(prompt()[0], TARGETS.mean(0), rtol=0, atol=1e-2)
    assert torch.equal(prompt()[2], torch.zeros(2))
    assert torch.equal(prompt.fixed, torch.ones(2))
    assert history.steps[-1].loss < 0.01 * history.steps[1].loss
    assert (history.best_step, len(history.steps)) == (300, 301)


def test_weight_decay_pulls_to_zero() -> None:
    prompt = Prompt()
    with torch.no_grad():
        prompt.theta.fill_(1.0)
    run(prompt, weight_decay=0.5)
    assert 0 < prompt.theta[2, 0] < 0.9


def test_gradients_are_clipped_as_asked() -> None:
    prompt = Prompt()
    history = run(prompt, max_grad_norm=0.0)
    assert torch.equal(prompt(), torch.zeros(3, 2))
    assert history.steps[1].gradient_norms[0] > 0  # recorded as they were


def test_parts_beside_the_prompt_are_trained_too() -> None:
    parts = nn.ModuleList([nn.Linear(1, 1)])
    before = parts[0].weight.item()
    loss = lambda index, vectors: parts[0](torch.ones(1)).square().sum()  # noqa: E731
    history = tune(parts, loss, in_rounds([1, 1, 1], 3, 0), prompt=None, **DEFAULTS)
    assert parts[0].weight.item() != before
    assert all(s.gradient_norms == [] for s in history.steps)


# -- history -----------------------------------------------------------------------------------------------------------


def test_step_0_is_the_state_before_training() -> None:
    first = run(Prompt(), steps=0, validate=script(-3.0)).steps
    assert len(first) == 1
    assert (first[0].step, first[0].learning_rate, first[0].validation_score) == (0, 0.0, -3.0)
    assert math.isnan(first[0].loss)


def test_every_step_has_the_gradient_norm_of_every_vector() -> None:
    history = run(Prompt())
    assert [s.step for s in history.steps] == list(range(21))
    assert all(len(s.gradient_norms) == 3 for s in history.steps[1:])
    gradient = 2 * TARGETS.mean(0)  # of the first step, at zero
    expected = [10 * gradient.norm().item(), gradient.norm().item(), 0.0]
    assert history.steps[1].gradient_norms == pytest.approx(expected, rel=1e-5)
    assert history.steps[1].loss == pytest.approx(11 * TARGETS.mean(0).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.1), (20, 0.0), (10, 1.0), (7, 0.5), (1, 0.1)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(steps: int, warmup: float) -> None:
    rates = [s.learning_rate for s in run(Prompt(), steps=steps, warmup=warmup).steps[1:]]
    ramp = max(1, round(warmup * steps))
    rise = [0.1 * (k + 1) / ramp for k in range(ramp)]
    fall = [0.1 * (steps - k) / max(1, steps - ramp) for k in range(ramp, steps)]
    assert rates == pytest.approx(rise + fall)
    assert max(rates) == pytest.approx(0.1)
    assert min(rates) > 0


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_every_example_comes_once_a_round(size: int) -> None:
    seen: list[list[int]] = []
    per_round = math.ceil(3 / size)
    run(Prompt(), seen=seen, size=size, steps=4 * per_round)
    rounds = [list(itertools.chain(*seen[i : i + per_round])) for i in range(0, len(seen), per_round)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds)
    assert len(rounds) == 4
    assert max(map(len, seen)) == min(size, 3)


def test_the_order_is_the_seeds() -> None:
    orders: list[list[list[int]]] = [[], [], []]
    ends = []
    for seen, seed in zip(orders, (5, 5, 6), strict=True):
        prompt = Prompt()
        run(prompt, seen=seen, seed=seed, size=1)
        ends.append(prompt().detach())
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# -- which step is kept ------------------------------------------------------------------------------------------------


def trajectory(steps: int = 20) -> list[Tensor]:
    """The vectors after each step of a run."""
    prompt, states = Prompt(), []
    run(prompt, steps=steps, during=lambda call: states.append(prompt().detach().clone()))
    return [*states, prompt().detach().clone()]


def test_the_step_of_the_best_score_is_kept() -> None:
    prompt = Prompt()
    history = run(prompt, validate=script(0.0, 1.0, 3.0, 2.0, 3.0), evaluate_every=5)
    assert history.best_step == 10  # the first of the equally good
    assert torch.equal(prompt(), trajectory()[10])
    assert {s.step: s.validation_score for s in history.steps if s.validation_score is not None} == {
        0: 0.0, 5: 1.0, 10: 3.0, 15: 2.0, 20: 3.0,
    }  # fmt: skip


def test_step_0_is_kept_if_nothing_beats_it() -> None:
    prompt = Prompt()
    history = run(prompt, validate=script(0.0, -1.0, -1.0, 0.0, math.nan), evaluate_every=5)
    assert history.best_step == 0
    assert torch.equal(prompt(), torch.zeros(3, 2))


def test_without_validation_the_last_step_is_kept() -> None:
    prompt = Prompt()
    assert run(prompt).best_step == 20
    assert torch.equal(prompt(), trajectory()[20])


def test_training_ends_after_so_many_scores_that_are_no_better() -> None:
    history = run(
        Prompt(), validate=script(0.0, 1.0, 0.5, 2.0, 1.9, 1.8, 99.0), evaluate_every=2, patience=2, steps=100
    )
    assert (history.best_step, history.steps[-1].step) == (6, 10)
    assert not history.interrupted


def test_the_last_step_is_a_candidate_whatever_the_interval() -> None:
    history = run(Prompt(), validate=script(0.0, 1.0, 2.0), evaluate_every=13)
    assert [s.step for s in history.steps if s.validation_score is not None] == [0, 13, 20]
    assert history.best_step == 20


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def stop_at(n: int) -> Callable[[int], None]:
    def during(call: int) -> None:
        if call == n:
            raise KeyboardInterrupt

    return during


def test_ctrl_c_keeps_the_best_step_so_far() -> None:
    prompt = Prompt()
    history = run(prompt, during=stop_at(12), validate=script(0.0, 5.0, 1.0), evaluate_every=5)
    assert history.interrupted
    assert (history.best_step, history.steps[-1].step) == (5, 11)
    assert torch.equal(prompt(), trajectory()[5])


def test_ctrl_c_without_validation_keeps_the_last_step() -> None:
    prompt = Prompt()
    history = run(prompt, during=stop_at(12))
    assert history.interrupted
    assert (history.best_step, history.steps[-1].step) == (11, 11)
    assert torch.equal(prompt(), trajectory()[11])


def test_ctrl_c_at_once_keeps_the_start() -> None:
    prompt = Prompt()
    history = run(prompt, during=stop_at(1))
    assert history.interrupted
    assert (history.best_step, len(history.steps)) == (0, 1)
    assert torch.equal(prompt(), torch.zeros(3, 2))


def test_other_exceptions_are_not_swallowed() -> None:
    def broken(call: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Prompt(), during=broken)


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("validate", [None, lambda: 0.0])
def test_a_loss_that_is_not_finite_ends_training_at_its_step(bad: float, validate: Callable[[], float] | None) -> None:
    theta = nn.ParameterList([torch.ones(2)])
    losses = iter([1.0, 1.0, bad])
    calls = 0

    def loss(index: Sequence[int], vectors: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return theta[0].square().sum() * next(losses)

    with pytest.raises(TuningError) as error:
        tune(theta, loss, in_rounds([1, 1, 1], 3, 0), prompt=None, validate=validate, **DEFAULTS)
    assert str(error.value) == (
        f"step 3: with learning_rate=0.1 the loss is {bad} and its gradient {bad}, so nothing was fitted; "
        "lower learning_rate, or use dtype='float32'"
    )
    assert calls == 3


def test_a_gradient_that_is_not_finite_ends_training_too() -> None:
    theta = nn.ParameterList([torch.zeros(2)])
    with pytest.raises(TuningError, match=r"^step 1: with learning_rate=0.1 the loss is 0 and its gradient (nan|inf),"):
        tune(theta, lambda index, vectors: theta[0].sqrt().sum(), in_rounds([1, 1, 1], 3, 0), prompt=None, **DEFAULTS)


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "progress", "drawn"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_bar_is_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, progress: bool, drawn: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    run(Prompt(), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("tuning" in err) is drawn


# -- batches -----------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60), size=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_round_sees_every_example_once(lengths: list[int], size: int, seed: int) -> None:
    batches = in_rounds(lengths, size, seed)
    for _ in range(3):
        part = [next(batches) for _ in range(-(-len(lengths) // size))]
        assert sorted(i for batch in part for i in batch) == list(range(len(lengths)))


def testin_rounds_hold_texts_of_similar_length_and_are_not_always_the_same() -> None:
    lengths = [10 + 7 * i % 400 for i in range(128)]
    batches = in_rounds(lengths, 16, 0)
    rounds = [[next(batches) for _ in range(8)] for _ in range(2)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in rounds[0])
    assert padded < 1.4 * sum(lengths)
    assert {frozenset(batch) for batch in rounds[0]} != {frozenset(batch) for batch in rounds[1]}
    assert [max(lengths[i] for i in batch) for batch in rounds[0]] != sorted(
        max(lengths[i] for i in batch) for batch in rounds[0]
    )
