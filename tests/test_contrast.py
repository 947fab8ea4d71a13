"""Contrast of texts by class: the loss against the plain slow way, and who meets whom in a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verbtune.contrast import TEMPERATURE, contrast, in_groups


def slowly(points: torch.Tensor, y: list[int]) -> list[float]:
    """The loss of each point, pair by pair."""
    unit = [p / p.norm() for p in points]
    losses = []
    for i, label in enumerate(y):
        others = [j for j in range(len(y)) if j != i]
        alike = {j: math.exp(float(unit[i] @ unit[j]) / TEMPERATURE) for j in others}
        each = [-math.log(alike[j] / sum(alike.values())) for j in others if y[j] == label]
        losses.append(sum(each) / len(each) if each else 0.0)
    return losses


def test_each_draws_those_of_its_class_from_all_others() -> None:
    torch.manual_seed(0)
    points, y = torch.randn(7, 5), [0, 0, 0, 1, 1, 2, 3]
    found = contrast(points, torch.tensor(y))
    np.testing.assert_allclose(found, slowly(points, y), rtol=1e-5)
    assert found[:5].min() > 0
    np.testing.assert_array_equal(found[5:], 0)  # nobody else is of their class


def test_only_angles_count() -> None:
    torch.manual_seed(0)
    points, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    sizes = torch.tensor([[1.0], [9.0], [0.1], [2.0], [30.0], [4.0]])
    torch.testing.assert_close(contrast(sizes * points, y), contrast(points, y))


@pytest.mark.parametrize("y", [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
def test_the_gradient_is_finite(y: list[int]) -> None:
    points = torch.eye(4).requires_grad_()
    contrast(points, torch.tensor(y)).mean().backward()
    assert points.grad is not None
    assert torch.isfinite(points.grad).all()


@given(
    y=st.lists(st.integers(0, 40), min_size=1, max_size=80), size=st.sampled_from([2, 8, 32]), seed=st.integers(0, 9)
)
def test_a_batch_is_some_texts_of_some_classes(y: list[int], size: int, seed: int) -> None:
    codes = np.array(y)
    lengths = [7 * i % 11 for i in range(len(y))]
    batches = in_groups(codes, lengths, size, seed)
    again = in_groups(codes, lengths, size, seed)
    for _ in range(3):
        batch = next(batches)
        assert batch == next(again)
        assert len(set(batch)) == len(batch)
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)
        met = {c: sum(y[i] == c for i in batch) for c in {y[i] for i in batch}}
        n = max(2, size // len(set(y)))
        assert len(met) == min(size // n, len(set(y)))
        assert all(found == min(n, y.count(c)) for c, found in met.items())
        assert len(batch) <= size


def test_every_text_comes_in_the_end() -> None:
    y = np.arange(90) % 30
    batches = in_groups(y, [1] * 90, 32, 0)
    assert {i for _ in range(60) for i in next(batches)} == set(range(90))
