"""Statistics of routing against their definitions and known values."""

from __future__ import annotations

import math

import pytest
import torch

from molora.report import statistics


def test_shares() -> None:
    counts = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(statistics.shares(counts), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_entropy_and_balance_of_known_distributions() -> None:
    given = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert statistics.entropy(given).tolist() == pytest.approx([2.0, 1.0, 0.0], abs=1e-6)
    assert statistics.load_balance(given, given).tolist() == pytest.approx([1.0, 2.0, 4.0])


def test_mutual_information_is_that_of_the_joint_distribution() -> None:
    share = torch.softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), -1)
    joint = share / 3
    product = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    expected = float((joint * torch.log2(joint / product)).sum())
    assert float(statistics.mutual_information(share)) == pytest.approx(expected, abs=1e-6)
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(statistics.mutual_information(apart)) == pytest.approx(1.0)


def test_permutations_of_rows_find_domains_and_nothing_in_noise() -> None:
    """Rows whose tokens are alike look like domains when tokens are permuted, and not when rows are."""
    draw = torch.Generator().manual_seed(1)
    domain = torch.arange(40) % 2
    rows = torch.softmax(2 * torch.randn(40, 50, 4, generator=draw), -1) * 100  # 50 routers, rows unlike each other
    noise = statistics.mutual_information(statistics.shares(statistics.sum_by(rows, domain)))
    chance = statistics.permuted_information(rows, domain, 99, seed=0)
    p = statistics.p_values(noise, chance)
    assert 0.3 < float(p.mean()) < 0.7  # uniform over 50 routers: 0.5, four standard errors are 0.16
    assert int((p <= 0.05).sum()) <= 8  # 2.5 expected
    told = rows + 200 * domain[:, None, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = statistics.mutual_information(statistics.shares(statistics.sum_by(told, domain)))
    chance = statistics.permuted_information(told, domain, 99, seed=0)
    assert statistics.p_values(found, chance).tolist() == [pytest.approx(0.01)] * 50
    assert torch.equal(chance, statistics.permuted_information(told, domain, 99, seed=0))


def test_expert_cosines_are_those_of_the_whole_matrices() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn(3 * 4, 11, generator=draw), torch.randn(7, 3 * 4, generator=draw)
    b[:, 8:] = -0.5 * b[:, :4]
    a[8:] = a[:4]  # the third expert is the first, turned round and halved
    updates = torch.stack([(b[:, i : i + 4] @ a[i : i + 4]).flatten() for i in (0, 4, 8)])
    expected = torch.nn.functional.cosine_similarity(updates[:, None], updates[None], dim=-1)
    found = statistics.expert_cosines(a, b, 3)
    torch.testing.assert_close(found, expected)
    assert float(found[0, 2]) == pytest.approx(-1)
    assert statistics.off_diagonal(found).tolist() == [found[0, 1], found[0, 2], found[1, 2]]
    assert not statistics.expert_cosines(a, torch.zeros_like(b), 3).any()


def test_drift_of_choices_gates_and_weights() -> None:
    before = torch.tensor([[[0.6, 0.4, 0.0]], [[0.5, 0.5, 0.0]]])  # (N=2, R=1, E=3)
    after = torch.tensor([[[0.6, 0.4, 0.0]], [[0.0, 0.0, 1.0]]])
    assert statistics.changed_choice(before, after).tolist() == [0.5]
    assert statistics.divergence(before.half(), after.half()).tolist() == pytest.approx([0.5], abs=1e-4)
    w = torch.tensor([[3.0, 4.0]])
    assert statistics.weight_change(w, 2 * w) == (pytest.approx(1.0), pytest.approx(1.0))
    change, cosine = statistics.weight_change(w, torch.tensor([[-4.0, 3.0]]))
    assert (change, cosine) == (pytest.approx(math.sqrt(2)), pytest.approx(0.0, abs=1e-6))
