"""What the measurements of a bench add up to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.stats import permutation_test

from verbtune.summary import Record, Spread, bootstrap_interval, sign_flip_p, summarize


def record(**changes: Any) -> Record:
    plain: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(Record)} | {
        "task": "tone",
        "method": "verbtune",
        "model": "m",
        "shots": 16,
        "split_checksum": "c",
        "prompt_length": None,
        "peak_memory_mb": 1.0,
        "model_fingerprint": "f",
        "task_checksum": "t",
        "versions": {},
        "method_checksum": "p",
    }
    return Record(**plain | changes)


def test_a_summary_has_mean_spread_and_worst_seed() -> None:
    summary = summarize([record(seed=s, accuracy=a, nll=a, fit_seconds=a) for s, a in ((1, 0.5), (2, 0.7), (3, 0.9))])
    (row,) = summary.rows
    assert row.scores["accuracy"] == Spread(pytest.approx(0.7), pytest.approx(0.2), 0.5)
    assert row.scores["nll"].worst == 0.9  # lower is better
    assert (row.n_seeds, row.fit_seconds, summary.seeds) == (3, 0.7, (1, 2, 3))


def test_one_seed_has_no_spread() -> None:
    assert summarize([record()]).rows[0].scores["accuracy"].std is None


def test_the_mean_over_tasks_takes_the_seeds_that_have_them_all() -> None:
    records = [
        record(task=task, seed=seed, accuracy=accuracy, n_test=10)
        for task, seed, accuracy in (("a", 1, 0.4), ("b", 1, 0.6), ("a", 2, 0.6), ("b", 2, 0.8), ("a", 3, 1.0))
    ]
    overall = summarize(records).rows[-1]
    assert overall.task is None
    assert overall.n_seeds == 2
    assert overall.n_test == 20
    assert overall.scores["accuracy"].mean == pytest.approx(0.6)
    assert overall.scores["accuracy"].std == pytest.approx(np.std([0.5, 0.7], ddof=1))


def test_a_method_that_lacks_a_task_has_no_mean() -> None:
    records = [record(task="a"), record(task="b"), record(task="a", method="tfidf")]
    assert [row.method for row in summarize(records).rows if row.task is None] == ["verbtune"]


def test_the_main_method_is_compared_with_each_baseline_by_task_and_seed() -> None:
    pairs = [(task, seed) for task in "ab" for seed in (1, 2, 3)]
    records = [record(task=t, seed=s, accuracy=0.8) for t, s in pairs]
    records += [record(task=t, seed=s, accuracy=0.8 - 0.1 * (t == "a"), method="tfidf") for t, s in pairs]
    records += [record(task=t, seed=s, accuracy=0.9, prompt_length=5) for t, s in pairs]
    (comparison,) = summarize(records).comparisons
    assert (comparison.main, comparison.baseline) == ("verbtune", "tfidf")
    assert (comparison.wins, comparison.ties, comparison.losses) == (3, 3, 0)
    assert comparison.difference == pytest.approx(0.05)
    assert comparison.p_value == 0.25  # 2 of 2^3 ways, the ties apart
    assert comparison.low == pytest.approx(0)
    assert comparison.high == pytest.approx(0.1)


def test_nothing_is_compared_without_the_main_method_or_pairs() -> None:
    assert summarize([record(method="tfidf")]).comparisons == []
    assert summarize([record(), record(method="tfidf")]).comparisons == []


@pytest.mark.parametrize("n", [2, 8, 14, 20])
def test_the_sign_flip_test_agrees_with_scipy(n: int) -> None:
    difference = np.random.default_rng(n).normal(0.02, 0.04, n)
    zeros = np.zeros(n)
    expected = permutation_test(
        (difference, zeros), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    assert sign_flip_p(difference) == pytest.approx(expected, abs=1e-9 if n <= 14 else 0.02)


def test_equal_methods_have_p_one() -> None:
    assert sign_flip_p(np.zeros(20)) == 1


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tasks = [t for t in range(12) for _ in range(3)]
    covered = 0
    for _ in range(40):
        effect = rng.normal(0.05, 0.03, 12)
        difference = effect[tasks] + rng.normal(0, 0.02, len(tasks))
        low, high = bootstrap_interval(difference, [str(t) for t in tasks])
        covered += low <= 0.05 <= high
    assert covered >= 33
