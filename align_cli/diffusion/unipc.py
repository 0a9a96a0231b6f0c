"""UniPC of order 2: a predictor-corrector that reaches in 10 to 25 steps what DDIM needs 50 for.

Letters: B batch, C H W latent. With alpha = sqrt(abar) and sigma = sqrt(1 - abar), the solver's time is
lambda = log(alpha / sigma), and h a difference of lambdas.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from align_cli.diffusion.process import NoiseProcess

SMALLEST_ABAR = 2.0**-24
"""In place of the 0 of zero terminal SNR, where lambda would be infinite. Source: diffusers."""


def unipc_timesteps(process: NoiseProcess, n: int, spacing: str | None = None) -> Tensor:
    """(n,) int64, descending: leading and linspace leave out the last of n + 1 timesteps, trailing takes n.

    Source: diffusers UniPCMultistepScheduler.set_timesteps. Raises ValueError as `NoiseProcess.timesteps`.
    """
    if (spacing or process.timestep_spacing) == "trailing":
        return process.timesteps(n, spacing)
    return process.timesteps(n + 1, spacing)[:-1]


class UniPC:
    """One path of the solver; it remembers the last two predictions. Differentiable in all of them.

    Source: Zhao et al., arXiv 2302.04867, in the form B(h) = expm1(h) on x0; diffusers
    UniPCMultistepScheduler with its defaults: solver_order 2, bh2, lower_order_final, final sigma 0.
    """

    def __init__(self, process: NoiseProcess, path: Tensor) -> None:
        """path: (n,) timesteps, descending."""
        self.process = replace(
            process, alphas_cumprod=process.alphas_cumprod.clamp(min=SMALLEST_ABAR)
        )  # also what the predictions are taken apart with
        self.path = path.tolist()
        abar = self.process.alphas_cumprod[path.cpu()].double()
        self.alpha = [*abar.sqrt().tolist(), 1.0]
        self.sigma = [*(1 - abar).sqrt().tolist(), 0.0]
        self.lam = [math.log(a / s) if s else math.inf for a, s in zip(self.alpha, self.sigma, strict=True)]
        self.found: list[Tensor] = []
        self.before: Tensor | None = None
        self.order = 1

    def step(self, pred: Tensor, z: Tensor, i: int) -> Tensor:
        """From z at step i to z at step i + 1 (after the last one: x0), once for i = 0, 1, ... in turn.

        Args:
            pred, z: (B, C, H, W), the prediction at z and z.
        """
        x0, _ = self.process.to_x0_eps(pred, z, self.path[i])
        if self.before is not None:
            z = self._corrected(x0, i)
        self.found, self.before = [*self.found[-1:], x0], z
        self.order = min(2, len(self.path) - i, len(self.found))
        if i + 1 == len(self.path):
            return x0
        h = self.lam[i + 1] - self.lam[i]
        grown = math.expm1(-h)
        after = self.sigma[i + 1] / self.sigma[i] * z - self.alpha[i + 1] * grown * x0
        if self.order == 2:
            after = after - self.alpha[i + 1] * grown * 0.5 * self._slope(i, h)
        return after

    def _corrected(self, x0: Tensor, i: int) -> Tensor:
        """z at step i once more, now that the prediction x0 there is known; of the order of the last step."""
        assert self.before is not None
        h, last = self.lam[i] - self.lam[i - 1], self.found[-1]
        grown = math.expm1(-h)
        plain = self.sigma[i] / self.sigma[i - 1] * self.before - self.alpha[i] * grown * last
        if self.order == 1:
            return plain - self.alpha[i] * grown * 0.5 * (x0 - last)
        first = grown / -h - 1
        second = first / -h - 0.5
        b1, b2 = first / grown, 2 * second / grown
        rest = (b1 - b2) / (1 - self._ratio(i - 1, h))
        bend = rest * self._slope(i - 1, h) + (b1 - rest) * (x0 - last)
        return plain - self.alpha[i] * grown * bend

    def _ratio(self, i: int, h: float) -> float:
        return (self.lam[i - 1] - self.lam[i]) / h

    def _slope(self, i: int, h: float) -> Tensor:
        """How the prediction changed before step i, per step of size h; `found` ends with that of step i."""
        return (self.found[-2] - self.found[-1]) / self._ratio(i, h)
