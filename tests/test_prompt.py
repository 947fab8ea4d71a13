"""Soft prompts: they start where they should, they can learn, and one seed is one prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verbtune.prompt import REPARAMETERIZATIONS, SoftPrompt, from_labels, from_random, from_vocabulary

TABLE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 0.3
every = pytest.mark.parametrize("reparameterization", REPARAMETERIZATIONS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(reparameterization: str, seed: int = 0) -> SoftPrompt:
    return SoftPrompt(TABLE[:5], scale=0.5, reparameterization=reparameterization, rank=2, generator=seeded(seed))


# -- parametrisations --------------------------------------------------------------------------------------------------


@every
def test_before_training_the_prompt_is_its_start(reparameterization: str) -> None:
    assert torch.equal(make(reparameterization)(), TABLE[:5])


@every
def test_every_vector_gets_a_gradient_and_training_reaches_a_target(reparameterization: str) -> None:
    prompt = make(reparameterization)
    # A target that one shift of all vectors reaches, so that no parametrisation is too narrow for it.
    target = (
        TABLE[:5].detach() + (0.3 * prompt.left @ torch.ones(2, 8)).detach()
        if reparameterization == "low_rank"
        else TABLE[5:10]
    )
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.05, weight_decay=0)
    losses = []
    for step in range(300):
        vectors = prompt()
        vectors.retain_grad()
        loss = (vectors - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert (vectors.grad.norm(dim=1) > 0).all()
            assert prompt.theta.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@every
def test_one_seed_is_one_prompt_after_training_too(reparameterization: str) -> None:
    def train(seed: int) -> Tensor:
        prompt = make(reparameterization, seed)
        optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            prompt().pow(3).sum().backward()
            optimizer.step()
        return prompt().detach()

    assert torch.equal(train(1), train(1))
    assert torch.equal(train(1), train(2)) == (reparameterization == "direct")  # which has no random factor


@every
def test_the_start_is_a_copy_and_is_not_trained(reparameterization: str) -> None:
    table = TABLE.clone()
    prompt = SoftPrompt(table[:5], scale=1.0, reparameterization=reparameterization, generator=seeded())
    table.zero_()
    assert torch.equal(prompt(), TABLE[:5])
    assert not prompt.start.requires_grad
    assert all(p is not prompt.start for p in prompt.parameters())


def test_a_step_is_measured_in_units_of_the_scale() -> None:
    prompt = SoftPrompt(TABLE[:5], scale=0.25)
    with torch.no_grad():
        prompt.theta.fill_(2.0)
    torch.testing.assert_close(prompt(), TABLE[:5] + 0.5)


def test_a_low_rank_change_has_low_rank() -> None:
    prompt = make("low_rank")
    with torch.no_grad():
        prompt.theta.normal_()
    change = prompt().detach() - TABLE[:5]
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
    assert sum(p.numel() for p in prompt.parameters()) == 5 * 2 + 2 * 8


def test_an_unknown_parametrisation_is_refused() -> None:
    with pytest.raises(ValueError, match="reparameterization='lstm' is unknown; use one of direct, mlp, low_rank"):
        make("lstm")


# -- where prompts start -----------------------------------------------------------------------------------------------


def test_vocabulary_vectors_are_real_tokens_none_special_none_twice() -> None:
    special = [0, 1, 2, 3, 39]
    vectors = from_vocabulary(TABLE, 35, exclude=special, generator=seeded())
    found = [int((v == TABLE).all(dim=1).nonzero().item()) for v in vectors]
    assert sorted(found) == list(range(4, 39))


def test_a_prompt_longer_than_the_vocabulary_repeats_tokens() -> None:
    vectors = from_vocabulary(TABLE[:6], 20, exclude=[0], generator=seeded())
    assert vectors.shape == (20, 8)
    assert not (vectors == TABLE[0]).all(dim=1).any()


def test_label_vectors_go_round_the_words_each_the_mean_of_its_pieces() -> None:
    vectors = from_labels(TABLE, 5, words=[(7,), (8, 9, 10)])
    several = TABLE[[8, 9, 10]].mean(dim=0)
    torch.testing.assert_close(vectors, torch.stack([TABLE[7], several, TABLE[7], several, TABLE[7]]))


def test_random_vectors_have_the_mean_norm_of_real_ones_and_point_anywhere() -> None:
    vectors = from_random(TABLE, 50, generator=seeded())
    torch.testing.assert_close(vectors.norm(dim=1), TABLE.norm(dim=1).mean().expand(50))
    assert torch.linalg.matrix_rank(vectors) == 8


@pytest.mark.parametrize("n", [0, 1, 7])
def test_initialisers_give_n_vectors_and_one_seed_gives_the_same(n: int) -> None:
    for make_vectors in (
        lambda seed: from_random(TABLE, n, generator=seeded(seed)),
        lambda seed: from_vocabulary(TABLE, n, exclude=[0], generator=seeded(seed)) if n else TABLE[:0],
    ):
        assert make_vectors(3).shape == (n, 8)
        assert torch.equal(make_vectors(3), make_vectors(3))
        assert n == 0 or not torch.equal(make_vectors(3), make_vectors(4))


def test_initial_vectors_are_copies_of_the_embeddings() -> None:
    table = TABLE.clone().requires_grad_()
    for vectors in (
        from_vocabulary(table, 3, exclude=[], generator=seeded()),
        from_labels(table, 3, words=[(1,)]),
    ):
        assert not vectors.requires_grad
        vectors.zero_()
    assert torch.equal(table, TABLE)
