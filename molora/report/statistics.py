"""What can be said about routers from what they did: pure functions of counts, gates and weights.

Shape letters: D domains, S rows, N tokens, R routers, E experts, P permutations, r rank, K and N features.
Information is in bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shares(counts: Tensor) -> Tensor:
    """Counts (..., E) of tokens per expert as shares that sum to 1; equal shares where nothing was counted."""
    total = counts.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp(min=1), 1 / counts.shape[-1])


def entropy(distribution: Tensor) -> Tensor:
    """(...,) bits of distributions (..., E)."""
    return -torch.xlogy(distribution, distribution).sum(-1) / torch.log(torch.tensor(2.0))


def load_balance(share: Tensor, probabilities: Tensor) -> Tensor:
    """``E sum_e f_e P_e`` of shares and mean probabilities (..., E): the load-balance loss's value, 1 is balance."""
    return share.shape[-1] * (share * probabilities).sum(-1)


def mutual_information(share: Tensor) -> Tensor:
    """(...,) bits between domain and expert from each domain's shares (D, ..., E), every domain weighted equally.

    The plug-in estimate, which is also the Jensen-Shannon divergence of the domains: entropy of the mean less mean of
    the entropies. It is at most log2 of the smaller of D and E, and above 0 even by chance: hence the baseline.
    """
    return entropy(share.mean(0)) - entropy(share).mean(0)


def permuted_information(counts: Tensor, domain: Tensor, permutations: int, seed: int) -> Tensor:
    """(P, R): :func:`mutual_information` after the domain labels were dealt out anew among the rows.

    Rows and not tokens are permuted, because the tokens of a row are alike for reasons other than their domain.

    Args:
        counts: (S, R, E), tokens of each row that chose each expert.
        domain: (S,) int64, each row's domain.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(permutations):
        dealt = domain[torch.randperm(len(domain), generator=generator)]
        found.append(mutual_information(shares(sum_by(counts, dealt))))
    return torch.stack(found)


def sum_by(counts: Tensor, group: Tensor) -> Tensor:
    """(groups, ...) sums of counts (S, ...) over the rows of each group (S,)."""
    return torch.zeros(int(group.max()) + 1, *counts.shape[1:]).index_add_(0, group, counts)


def p_values(observed: Tensor, permuted: Tensor) -> Tensor:
    """(R,): how often chance (P, R) does at least as well as observed (R,), itself counted (Phipson and Smyth 2010)."""
    # A permutation that swaps whole domains gives the observed value again, up to rounding.
    as_good = (permuted >= observed - 1e-6).sum(0)
    return (1 + as_good) / (1 + len(permuted))


def expert_cosines(lora_a: Tensor, lora_b: Tensor, experts: int) -> Tensor:
    """(E, E): cosine between the updates ``B_i A_i`` and ``B_j A_j`` of two experts, as (N K)-vectors; 0 for an expert
    whose update is zero.

    ``<B_i A_i, B_j A_j> = tr((B_j^T B_i)(A_i A_j^T))``, so that no N x K matrix is formed.

    Args:
        lora_a: (E r, K). lora_b: (N, E r).
    """
    a, b = lora_a.detach().double(), lora_b.detach().double()
    inner = ((b.T @ b) * (a @ a.T)).unflatten(0, (experts, -1)).unflatten(2, (experts, -1)).sum((1, 3))
    norm = inner.diagonal().clamp(min=0).sqrt()
    scale = norm[:, None] * norm
    return torch.where(scale > 0, inner / scale, 0.0).float()


def off_diagonal(square: Tensor) -> Tensor:
    """The elements (E (E - 1) / 2,) above the diagonal."""
    return square[torch.triu(torch.ones_like(square, dtype=torch.bool), diagonal=1)]


def changed_choice(before: Tensor, after: Tensor) -> Tensor:
    """(R,): share of tokens whose set of chosen experts differs between gates (N, R, E)."""
    return ((before > 0) != (after > 0)).any(-1).float().mean(0)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """(R,) bits: Jensen-Shannon divergence between a token's gates (N, R, E) before and after, mean over tokens."""
    both = torch.stack([before.float(), after.float()])
    both = both / both.sum(-1, keepdim=True).clamp(min=1e-12)
    return mutual_information(both).mean(0)


def weight_change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Relative change ``|after - before| / |before|`` (Frobenius) of a router's weights, and their cosine."""
    norms = before.norm() * after.norm()
    cosine = float((before * after).sum() / norms) if norms > 0 else 0.0
    return float((after - before).norm() / before.norm().clamp(min=1e-30)), cosine
