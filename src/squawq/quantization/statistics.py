"""What the search needs of a linear's inputs: mean |x| and the Gram matrix X'X, summed while the layer runs once."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass and no copy, unlike torch.isfinite."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


class InputStatistics:
    """Sums over all calibration tokens of one input [tokens, features]. Memory: features^2 float32.

    Rows with a non-finite value are left out and counted in `dropped`.
    """

    def __init__(self, features: int, device: str) -> None:
        self.rows = 0
        self.dropped = 0
        self.absolute = torch.zeros(features, dtype=torch.float64, device=device)
        self.gram = torch.zeros(features, features, device=device)

    def update(self, x: Tensor) -> None:
        """Add inputs of any leading shape."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not all_finite(x):
            finite = torch.isfinite(x).all(-1)
            self.dropped += int((~finite).sum())
            x = x[finite]
        self.rows += len(x)
        self.absolute += x.abs().sum(0, dtype=torch.float64)
        self.gram.addmm_(x.T, x)

    @property
    def mean_absolute(self) -> Tensor:
        """float32 [features]."""
        return (self.absolute / max(1, self.rows)).float()

    @property
    def has_signal(self) -> bool:
        """Whether any input was ever finite and not zero."""
        return self.rows > 0 and bool((self.absolute > 0).any()) and all_finite(self.gram)

    def gram_blocks(self, group: int, scales: Tensor | None = None) -> Tensor:
        """The Gram matrix's diagonal blocks [groups, group, group], for inputs divided by `scales` if given."""
        count = self.gram.shape[0] // group
        blocks = torch.stack(
            [self.gram[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(count)]
        )
        if scales is None:
            return blocks
        inverse = (1 / scales).view(count, group)
        return blocks * inverse[:, :, None] * inverse[:, None, :]
