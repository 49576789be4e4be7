"""Perplexity and KL divergence from logits: summed over rows, or over slices of the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Score:
    """Sums over predicted tokens. `divergence` holds KL(reference || model) in nats, one value a token."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    agreed: int = 0
    divergence: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add rows: logits and reference of any float dtype [rows, vocab], targets int64 [rows]."""
        log_p = logits.float().log_softmax(-1)
        self.tokens += len(targets)
        self.loss -= float(log_p.gather(1, targets[:, None]).sum(dtype=torch.float64))
        if reference is not None:
            log_r = reference.float().log_softmax(-1)
            self.reference_loss -= float(log_r.gather(1, targets[:, None]).sum(dtype=torch.float64))
            self.agreed += int((log_p.argmax(-1) == log_r.argmax(-1)).sum())
            self.divergence.append((log_r.exp() * (log_r - log_p)).sum(-1).clamp(min=0).cpu())

    def summary(self) -> dict[str, Any]:
        """tokens, perplexity and, against a reference, reference_perplexity, kl_mean, kl_p99 (nats), top1_agreement."""
        result: dict[str, Any] = {"tokens": self.tokens, "perplexity": math.exp(self.loss / self.tokens)}
        if self.divergence:
            kl = torch.cat(self.divergence)
            result |= {
                "reference_perplexity": math.exp(self.reference_loss / self.tokens),
                "kl_mean": float(kl.mean(dtype=torch.float64)),
                "kl_p99": float(kl.kthvalue(math.ceil(0.99 * len(kl))).values),
                "top1_agreement": self.agreed / self.tokens,
            }
        return result


class SlicedDivergence:
    """KL divergence from logits that come by slices of the vocabulary.

    Keeps a few values of each position: no row of logits needs to be in memory.
    """

    def __init__(self, positions: int, device: str) -> None:
        self._log_sums = torch.full((2, positions), -math.inf, device=device)  # of exp(logits), so far
        self._tops = self._log_sums.clone()
        self._tokens = torch.zeros(2, positions, dtype=torch.int64, device=device)
        self._ratio = torch.zeros(positions, device=device)  # mean of reference - model under the reference, so far
        self._seen = 0

    def add(self, logits: Tensor) -> None:
        """Add the next tokens of the vocabulary: float32 [2, positions, tokens], the reference's logits first."""
        log_sums = torch.logaddexp(self._log_sums, logits.logsumexp(-1))
        share = (logits[0] - log_sums[0, :, None]).exp()
        self._ratio *= (self._log_sums[0] - log_sums[0]).exp()
        self._ratio += (share * (logits[0] - logits[1])).sum(-1)
        self._log_sums = log_sums
        tops, tokens = logits.max(-1)
        self._tokens = torch.where(tops > self._tops, tokens + self._seen, self._tokens)
        self._tops = torch.maximum(tops, self._tops)
        self._seen += logits.shape[-1]

    def result(self) -> tuple[float, float]:
        """Mean KL(reference || model) in nats, NaN if a logit was not finite; share of equal most likely tokens."""
        kl = (self._ratio - self._log_sums[0] + self._log_sums[1]).clamp(min=0).cpu()
        return float(kl.mean(dtype=torch.float64)), float((self._tokens[0] == self._tokens[1]).float().mean())
