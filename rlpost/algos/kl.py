"""Per-token estimators of KL(policy || reference) from the sampled token. Schulman, "Approximating KL", 2020.

``fn(logprobs f[L], ref_logprobs f[L]) -> f[L]``. k2 and k3 are added to the loss by ``algos.objective``. k1 has an
expected gradient of zero as a loss, so it acts only through the reward (``algos.shaping.kl_in_reward``).
"""

from __future__ import annotations

import torch

from rlpost.algos.tensor_rows import ratio_of


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """logprobs - ref_logprobs: unbiased, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """(logprobs - ref_logprobs)^2 / 2: biased value, but on-policy its expected gradient is the KL's."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1, d = ref_logprobs - logprobs: unbiased value, never negative; biased gradient.

    GRPO, arXiv 2402.03300, eq. 4. exp's argument is clamped (``rows.MAX_LOG_RATIO``).
    """
    log_ratio = ref_logprobs - logprobs
    return ratio_of(log_ratio) - log_ratio - 1
