"""What the measurements of a bench add up to: means, spreads, and whether a difference is more than chance."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import baselines
from .metrics import METRICS

__all__ = [
    "Comparison",
    "Record",
    "Row",
    "Spread",
    "Summary",
    "bootstrap_interval",
    "label",
    "shown_length",
    "sign_flip_p",
    "summarize",
]

SIGN_FLIPS = 1 << 14
RESAMPLES = 10_000
COSTS = ("trained_parameters", "artifact_bytes", "fit_seconds", "predict_seconds", "peak_memory_mb")
LOWER_IS_BETTER = ("nll", "ece", "brier")


@dataclasses.dataclass(frozen=True)
class Record:
    """One method, fitted once and asked once.

    Attributes
    ----------
    task, method, model : str
    shots : int
        Training texts asked for in each class; all of a class that has fewer.
    seed : int
        Draws the training texts, and is the method's random state.
    n_train, n_test : int
    accuracy, macro_f1, nll, ece, brier : float
        See `verbtune.metrics`.
    trained_parameters : int
    artifact_bytes : int
        What a task adds to the LM on disk.
    fit_seconds, predict_seconds : float
        Wall-clock time of `fit`, and of `predict_proba` on all test texts.
    split_checksum : str
        SHA-256 of training and test texts with their labels.
    prompt_length : int or None
        Soft tokens asked for; None is the method's default.
    peak_memory_mb : float
        By how much `fit` raised the process's resident memory at most, in units of 10^6 bytes, looked at
        every 5 ms; the LM is loaded before and not in it. On a GPU: what PyTorch allocated there instead.
        Elsewhere than on Linux, memory that earlier fits left to the process is missing from it.
    model_fingerprint : str
        SHA-256 of the LM's weights.
    task_checksum : str
        SHA-256 of the task spec.
    versions : dict of str to str
    method_checksum : str
        SHA-256 of the classifier's class and parameters; empty in records from before it was noted.
    """

    task: str
    method: str
    model: str
    shots: int
    seed: int
    n_train: int
    n_test: int
    accuracy: float
    macro_f1: float
    nll: float
    ece: float
    brier: float
    trained_parameters: int
    artifact_bytes: int
    fit_seconds: float
    predict_seconds: float
    split_checksum: str
    prompt_length: int | None
    peak_memory_mb: float
    model_fingerprint: str
    task_checksum: str
    versions: dict[str, str]
    method_checksum: str = ""


@dataclasses.dataclass(frozen=True)
class Spread:
    """A score over seeds: mean, standard deviation (n - 1; None for one seed), and that of the worst seed."""

    mean: float
    std: float | None
    worst: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's scores over seeds, on a task or (`task` is None) in the mean over all tasks.

    Seconds, memory, parameters and bytes are medians over the seeds; of several tasks, the mean of these.
    Texts of several tasks are added up.
    """

    task: str | None
    model: str
    method: str
    shots: int
    prompt_length: int | None
    n_seeds: int
    n_train: int
    n_test: int
    scores: dict[str, Spread]
    trained_parameters: float
    artifact_bytes: float
    fit_seconds: float
    predict_seconds: float
    peak_memory_mb: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The main method's accuracy against a baseline's, paired by task and seed.

    Attributes
    ----------
    model : str
    shots : int
    main, baseline : str
    wins, ties, losses : int
        Of the main method, over all pairs.
    difference : float
        Mean of main minus baseline over the pairs.
    low, high : float
        95 % bootstrap interval of the mean: tasks are drawn with replacement, and seeds within each.
    p_value : float
        Two-sided sign-flip permutation test over the pairs; exact for up to 14 of them.
    """

    model: str
    shots: int
    main: str
    baseline: str
    wins: int
    ties: int
    losses: int
    difference: float
    low: float
    high: float
    p_value: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows by model, shots, task and method, and the main method's comparisons."""

    seeds: tuple[int, ...]
    rows: list[Row]
    comparisons: list[Comparison]


def label(method: str, prompt_length: int | None) -> str:
    """How tables and pictures call a method.

    Examples
    --------
    >>> label("soft-prompt", 20)
    'soft-prompt, 20 tokens'
    """
    if prompt_length is None:
        return method
    return f"{method}, {prompt_length} token{'' if prompt_length == 1 else 's'}"


def summarize(records: Sequence[Record]) -> Summary:
    """Means, spreads and worst seeds of all methods, and the main method against each of the others.

    The mean over tasks is of the seeds for which the method finished all tasks; its spread is that of this
    mean over these seeds. The main method is taken at its `shown_length`.
    """
    seeds = tuple(dict.fromkeys(record.seed for record in records))
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    for (model, shots), group in _grouped(records, lambda r: (r.model, r.shots)).items():
        tasks = list(dict.fromkeys(record.task for record in group))
        methods = _grouped(group, lambda r: (r.method, r.prompt_length))
        for chosen in [*([task] for task in tasks), *([tasks] if len(tasks) > 1 else [])]:
            rows += filter(None, (_row(method, chosen) for method in methods.values()))
        comparisons += _comparisons(model, shots, methods)
    return Summary(seeds, rows, comparisons)


def _grouped(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _spread(metric: str, values: Sequence[float]) -> Spread:
    worst = max(values) if metric in LOWER_IS_BETTER else min(values)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, worst)


def _row(records: Sequence[Record], tasks: Sequence[str]) -> Row | None:
    """Sum up one method on one or several tasks, by the seeds that have them all; None if none has."""
    own = [record for record in records if record.task in tasks]
    by_seed = [rs for rs in _grouped(own, lambda r: r.seed).values() if len(rs) == len(tasks)]
    if not by_seed:
        return None
    by_task = _grouped([r for rs in by_seed for r in rs], lambda r: r.task).values()
    scores = {metric: [statistics.fmean(getattr(r, metric) for r in rs) for rs in by_seed] for metric in METRICS}
    costs = {
        cost: statistics.fmean(statistics.median(getattr(r, cost) for r in rs) for rs in by_task) for cost in COSTS
    }
    first = own[0]
    return Row(
        task=tasks[0] if len(tasks) == 1 else None,
        model=first.model,
        method=first.method,
        shots=first.shots,
        prompt_length=first.prompt_length,
        n_seeds=len(by_seed),
        n_train=sum(rs[0].n_train for rs in by_task),
        n_test=sum(rs[0].n_test for rs in by_task),
        scores={metric: _spread(metric, values) for metric, values in scores.items()},
        **costs,
    )


def shown_length(method: str, records: Sequence[Record] | Sequence[Row]) -> int | None:
    """Choose the prompt length at which a method is shown: the default one if it was run, otherwise the first."""
    lengths = [record.prompt_length for record in records if record.method == method]
    return None if None in lengths or not lengths else lengths[0]


def _comparisons(
    model: str, shots: int, methods: Mapping[tuple[str, int | None], Sequence[Record]]
) -> Iterator[Comparison]:
    main = baselines.MAIN, shown_length(baselines.MAIN, [r for records in methods.values() for r in records])
    if main not in methods:
        return
    ours = {(r.task, r.seed): r.accuracy for r in methods[main]}
    for key, records in methods.items():
        if key[0] == baselines.MAIN or key[1] not in (None, main[1]):
            continue
        theirs = {(r.task, r.seed): r.accuracy for r in records}
        pairs = [pair for pair in ours if pair in theirs]
        if len(pairs) < 2:
            continue
        difference = np.array([ours[pair] - theirs[pair] for pair in pairs])
        low, high = bootstrap_interval(difference, [task for task, _ in pairs])
        yield Comparison(
            model=model,
            shots=shots,
            main=label(*main),
            baseline=label(*key),
            wins=int((difference > 0).sum()),
            ties=int((difference == 0).sum()),
            losses=int((difference < 0).sum()),
            difference=float(difference.mean()),
            low=low,
            high=high,
            p_value=sign_flip_p(difference),
        )


def sign_flip_p(difference: NDArray[np.float64]) -> float:
    """Two-sided p-value of paired differences: how many ways to swap the pairs give a mean as far from 0.

    Exact for up to 14 pairs, otherwise from 16,384 swaps of which one is the pairs as they are.

    Examples
    --------
    >>> sign_flip_p(np.array([0.1, 0.2, 0.1]))  # 2 of the 8 ways
    0.25
    """
    n = len(difference)
    if 2**n <= SIGN_FLIPS:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))  # (2^n, n)
    else:
        signs = np.random.default_rng(0).choice((1, -1), (SIGN_FLIPS, n))
        signs[0] = 1
    return float((np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9).mean())


def bootstrap_interval(difference: NDArray[np.float64], tasks: Sequence[str]) -> tuple[float, float]:
    """95 % percentile interval of the mean difference: tasks drawn with replacement, then seeds within each."""
    rng = np.random.default_rng(0)
    by_task = [difference[[t == task for t in tasks]] for task in dict.fromkeys(tasks)]
    sizes = np.array([len(d) for d in by_task])
    padded = np.stack([np.resize(d, sizes.max()) for d in by_task])  # (T, S)
    drawn = rng.integers(len(by_task), size=(RESAMPLES, len(by_task), 1))
    seeds = (rng.random((RESAMPLES, len(by_task), sizes.max())) * sizes[drawn]).astype(int)
    real = np.arange(sizes.max()) < sizes[drawn]  # a task counts by as many pairs as it has
    means = padded[drawn, seeds].mean(axis=(1, 2), where=real)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
