"""What two stages did to a model, in words."""

from __future__ import annotations

from dataclasses import dataclass

from molora.answers import wilson_interval

ACQUIRED, KEPT, SLIGHTLY = 0.02, 0.02, 0.05
"""Relative changes of the general loss: *acquired* if it fell by at least the first in stage 1; *kept* if it rose by at
most the second in stage 2, *slightly declined* up to the third, *declined* beyond."""


@dataclass(frozen=True)
class Verdict:
    """Which of the recipe's expected patterns two stages show."""

    general_after_stage1: str
    """``acquired`` or ``not acquired``"""
    maths_after_stage2: str
    """``acquired``: the 95 % intervals of base and stage 2 lie apart; else ``not acquired``"""
    general_after_stage2: str
    """``kept``, ``slightly declined`` or ``declined``"""
    sentence: str


def judge(
    general_loss: tuple[float, float, float], maths_match: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
) -> Verdict:
    """Judge base, stage 1 and stage 2 by general loss per token and by (correct, asked) maths problems."""
    base, stage1, stage2 = general_loss
    fell, rose = 1 - stage1 / base, stage2 / stage1 - 1
    general1 = "acquired" if fell >= ACQUIRED else "not acquired"
    general2 = "kept" if rose <= KEPT else "slightly declined" if rose <= SLIGHTLY else "declined"
    before, after = maths_match[0], maths_match[2]
    learnt = wilson_interval(*after)[0] > wilson_interval(*before)[1]
    maths = "acquired" if learnt else "not acquired"
    sentence = (
        f"Stage 1: general ability {general1} (loss {-fell:+.1%} against base; acquired from {-ACQUIRED:.0%}). "
        f"Stage 2: maths {maths} (exact match {before[0] / before[1]:.0%} to {after[0] / after[1]:.0%}; acquired if "
        f"the 95 % intervals lie apart), general ability {general2} (loss {rose:+.1%} against stage 1; kept up to "
        f"{KEPT:+.0%}, slightly declined up to {SLIGHTLY:+.0%})."
    )
    if learnt and general2 == "declined":
        sentence += " That is overfitting to maths: train stage 2 for fewer steps or with a lower lr."
    return Verdict(general1, maths, general2, sentence)
