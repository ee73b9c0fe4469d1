"""Which experts the tokens of a test choose."""

from __future__ import annotations

from torch import Tensor


def chosen_experts(preference: Tensor, k: int, experts: str) -> tuple[Tensor, Tensor, Tensor]:
    """`preference` [N, E], which is altered -> index [N, k] of the k experts that each token likes most, order [N k] of
    the choices by expert, load [E] of each expert.

    `experts` - random: as the preference has it; one: every token chooses expert E - 1 first; single: expert 1 has one
    token, expert 0 none."""
    E = preference.shape[1]
    if experts == "one":
        preference[:, E - 1] += 100
    elif experts == "single":
        preference[:, 0] -= 100
        preference[:, 1] -= 50
        preference[5, 1] += 100
    index = preference.topk(k).indices
    return index, index.flatten().sort(stable=True).indices, index.flatten().bincount(minlength=E)
