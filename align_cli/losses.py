"""Loss functions of the methods: pure, float32, each under its formula and its source.

Shape letters: I images, T texts (candidates of an image), B batch, C h w latent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- denoising


def denoising_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each prediction, (B, C, h, w) twice -> (B,) float32, in latent units squared."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def huber_loss(pred: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """mean(sqrt((pred - target)^2 + c^2)) - c: square below c, absolute value beyond it; 0 where equal.

    Args:
        pred, target: of the same shape. c: > 0, in the unit of both.
    Returns:
        () float32.
    Source: LongAlign unet_lcm.py and unet_align_ct5.py (loss_type huber), c = 0.001. Deviations: none.
    """
    if c <= 0:
        raise ValueError(f"c must be > 0, got {c}")
    return ((pred.float() - target.float()).square() + c**2).sqrt().mean() - c


# ---------------------------------------------------------------- SoftREPA


class SoftREPATerms(NamedTuple):
    """Terms of the loss per image, float32.

    ce_I: (I,) nats. own_I: (I,) denoising error under the own text. logits_IT: (I, T).
    """

    ce_I: Tensor
    own_I: Tensor
    logits_IT: Tensor


def softrepa_logits(err_IT: Tensor, temperature: float = 0.07, logit_scale: float = 4.0) -> Tensor:
    """L_ij = logit_scale * exp(-E_ij / temperature): a similarity in (0, logit_scale], flat where E >>
    temperature.

    Args:
        err_IT: (I, T) mean squared denoising errors of image i under text j.
    Returns:
        (I, T) float32.
    Source: SoftREPA train.py, ContrastiveLoss (0.07 and 4.0 are never trained there).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return logit_scale * torch.exp(-err_IT.float() / temperature)


def softrepa_terms(
    err_IT: Tensor, own: Tensor | None = None, *, temperature: float = 0.07, logit_scale: float = 4.0
) -> SoftREPATerms:
    """Cross-entropy over texts for each image: it should be denoised best under its own text.

        ce_i = -log softmax_j(L_ij) at j = own_i,  L as in `softrepa_logits`

    Args:
        err_IT: (I, T) errors, T >= 2. own: (I,) int64 column of each image's own text; None: column i for row
        i.
    Raises:
        ValueError: err_IT is no matrix, or own is not given where it needs to be.
    Source: SoftREPA train.py and train_dist.py, ContrastiveLoss. No text-side softmax there, nor here.
    """
    if err_IT.ndim != 2:
        raise ValueError(f"err_IT must be a matrix, got shape {tuple(err_IT.shape)}")
    if own is None:
        if err_IT.shape[0] > err_IT.shape[1]:
            raise ValueError(f"{err_IT.shape[0]} images with {err_IT.shape[1]} texts: give the own columns")
        own = torch.arange(err_IT.shape[0], device=err_IT.device)
    logits = softrepa_logits(err_IT, temperature, logit_scale)
    ce = F.cross_entropy(logits, own, reduction="none")
    return SoftREPATerms(ce, err_IT.float().gather(1, own[:, None])[:, 0], logits)


def softrepa_loss(
    err_IT: Tensor,
    own: Tensor | None = None,
    *,
    temperature: float = 0.07,
    logit_scale: float = 4.0,
    dweight: float = 0.0,
) -> Tensor:
    """mean_i ce_i + dweight * mean_i E_i,own.

    Returns:
        () float32. The first term lies in [log(1 + (T - 1) exp(-logit_scale)), log(1 + (T - 1)
        exp(logit_scale))] and is log T where all errors are equal.
    Source: SoftREPA train.py, class SoftREPA.
    """
    terms = softrepa_terms(err_IT, own, temperature=temperature, logit_scale=logit_scale)
    return terms.ce_I.mean() + dweight * terms.own_I.mean()


# ---------------------------------------------------------------- LongAlign


def common_direction(texts: Tensor, others: Tensor | None = None) -> Tensor:
    """V = m / |m|, m the mean text vector: what all texts have in common.

    Args:
        texts: (B, D) text vectors as the reward uses them. others: (P, D) the means of P other processes;
        each counts as much as this one's.
    Returns:
        (D,) float32 unit vector.
    Source: LongAlign loss.py, dense_score. Deviations: none.
    """
    mean = texts.float().mean(0)
    if others is not None and len(others):
        mean = torch.cat([mean[None], others.float()]).mean(0)
    return F.normalize(mean, dim=0)


def reweight_text(texts: Tensor, direction: Tensor, omega: float) -> Tensor:
    """t' = t - (1 - omega) (t . V) V: the part along V, which rates pictures whatever the text, damped.

    Args:
        texts: (B, D). direction: (D,) unit vector V. omega: 1 leaves the texts, 0 keeps what is orthogonal to
        V.
    Returns:
        (B, D) float32, not renormalised.
    Source: LongAlign loss.py, dense_score. Deviations: none.
    """
    eta = texts.float() @ direction
    return texts.float() - (1 - omega) * eta[:, None] * direction


def preference_loss(scores: Tensor, omega: float) -> Tensor:
    """0.5 (1 - mean score) - 0.09 (1 - omega). The last term is constant: it keeps values of different omega
    comparable.

    Args:
        scores: (B,) cosines of pictures with their reweighted texts.
    Source: LongAlign unet_reward.py. Deviations: none.
    """
    return 0.5 * (1 - scores.float().mean()) - 0.09 * (1 - omega)


# ---------------------------------------------------------------- gradients that are known


def with_gradient(loss: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """The loss (), as if it had been computed from `x` and this were its gradient (shaped as x)."""
    result: Tensor = _Known.apply(x, loss, gradient)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer[0] * gradient).to(ctx.dtype), None, None  # scaled first, so that it fits float16
