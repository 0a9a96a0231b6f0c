"""Loss functions of the methods: pure, float32, each under its formula and its source.

Shape letters: I images, T texts (candidates of an image), B batch, C h w latent. DPT: B pictures, J
candidates of a picture, Q queries, D width, K class slots (the last: no object), L tokens, H aligned width.
CoMat: M maps, H heads, r side of a map, P tokens, N nouns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align_cli.grounding.boxes import paired_giou, to_corners
from align_cli.grounding.matching import Match, joined, matched_tokens
from align_cli.grounding.targets import Targets

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


# ---------------------------------------------------------------- DPT


def matching_logits(embeddings: Tensor, texts: Tensor) -> Tensor:
    """s_j = max_q cos(E_jq, p_j): how well a picture fits each candidate, by the query that fits best.

    Args:
        embeddings: (B, J, Q, D), of one picture under each of J texts, or of J pictures under one text.
        texts: (B, J, D), or (B, 1, D) for one text.
    Returns:
        (B, J) float32 in [-1, 1]. Gradient flows through the best query alone.
    Source: DPT models/loss.py, ContrastiveLoss_V1_MaxQueryMatching. Deviations: float32, there float16.
    """
    cosines = F.normalize(embeddings.float(), dim=-1) * F.normalize(texts.float(), dim=-1)[:, :, None]
    return cosines.sum(-1).max(-1).values


def matching_loss(logits: Tensor, log_scale: Tensor) -> Tensor:
    """mean_b -log softmax_j(exp(log_scale) s_bj) at j = 0: the true candidate comes first.

    Args:
        logits: (B, J). log_scale: ().
    Returns:
        () float32 in nats: log J if all candidates fit alike.
    Source: DPT models/loss.py, ContrastiveLoss_V1_MaxQueryMatching: no negatives of other rows.
    """
    true = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits.float() * log_scale.float().exp(), true)


def soft_token_loss(
    logits: Tensor, matches: Sequence[Match], targets: Targets, count: float, eos_weight: float = 0.1
) -> Tensor:
    """sum_bq w_bq (-sum_k y_bqk log softmax(logits)_bqk) / count, y the tokens of the query's phrase or, for
    a query without box, no object.

    Args:
        logits: (B, Q, K). count: boxes per process, >= 1. eos_weight: w of queries without box; 1 for others.
    Returns:
        () float32 in nats. A phrase of n tokens counts n times.
    Source: DPT models/criterion.py, loss_labels_st. Deviations: none.
    """
    wanted = torch.zeros_like(logits, dtype=torch.float32)
    wanted[..., -1] = 1
    weight = torch.full_like(wanted[..., 0], eos_weight)
    picture, query, target = joined(matches, targets.counts)
    wanted[picture, query] = targets.classes[target]
    weight[picture, query] = 1
    return -((wanted * logits.float().log_softmax(-1)).sum(-1) * weight).sum() / count


def box_losses(
    boxes: Tensor, matches: Sequence[Match], targets: Targets, count: float
) -> tuple[Tensor, Tensor]:
    """Sums over the pairs of |box - target|_1 and of 1 - GIoU, each / count.

    Args:
        boxes: (B, Q, 4) centres relative to the picture. count: boxes per process, >= 1.
    Returns:
        () float32 twice; 0 without pairs.
    Source: DPT models/criterion.py, loss_boxes. Deviations: none.
    """
    picture, query, target = joined(matches, targets.counts)
    found, wanted = boxes[picture, query].float(), targets.boxes[target]
    apart = 1 - paired_giou(to_corners(found), to_corners(wanted))
    return (found - wanted).abs().sum() / count, apart.sum() / count


def align_loss(
    queries: Tensor,
    tokens: Tensor,
    matches: Sequence[Match],
    targets: Targets,
    count: float,
    temperature: float = 0.07,
) -> Tensor:
    """Contrastive loss between queries and the tokens of their phrases, both ways, halved, / count.

        S = queries . tokens / temperature
        one way: sum over rows with positives of logsumexp(S) - sum_positives S / (positives + 1e-6)

    Args:
        queries: (B, Q, H) and tokens: (B, L, H) of unit length; padding tokens count as negatives.
        count: boxes per process, >= 1.
    Returns:
        () float32 in nats.
    Source: DPT models/criterion.py, loss_contrastive_align. Deviations: blanks, see targets.token_spans.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    with torch.autocast(queries.device.type, enabled=False):
        similar = queries.float() @ tokens.float().mT / temperature
    positive = matched_tokens(matches, targets, queries.shape[1])
    return (_one_way(similar, positive) + _one_way(similar.mT, positive.mT)) / 2 / count


def _one_way(similar: Tensor, positive: Tensor) -> Tensor:
    """Sum over the rows that have positives; (B, R, S) similarities and bool."""
    mean = (similar * positive).sum(-1) / (positive.sum(-1) + 1e-6)
    return ((similar.logsumexp(-1) - mean) * positive.any(-1)).sum()


def cardinality_error(logits: Tensor, targets: Targets) -> Tensor:
    """Mean over pictures of |queries that say an object - boxes|, () float32; for the log alone.

    Args:
        logits: (B, Q, K).
    Source: DPT models/criterion.py, loss_cardinality.
    """
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1).float()
    return F.l1_loss(found, found.new_tensor(targets.counts))


def snr_weighted_error(pred: Tensor, target: Tensor, snr: Tensor, gamma: float) -> Tensor:
    """mean_b min(snr_b, gamma) / snr_b * |pred_b - target_b|^2: less weight where there is little noise.

    Args:
        pred, target: (B, C, h, w). snr: (B,) alphas_cumprod / (1 - alphas_cumprod), >= 0. gamma: > 0; 0 is no
        weighting.
    Returns:
        () float32, in latent units squared.
    Source: Min-SNR (arXiv 2303.09556) as in DPT models/loss.py, MSELoss. Deviations: the weight is 1
    where snr is 0.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    error = denoising_error(pred, target)
    return (error * (gamma / snr.float()).clamp(max=1) if gamma else error).mean()


# ---------------------------------------------------------------- CoMat


def mask_at(masks: Tensor, side: int) -> Tensor:
    """Masks (N, h, w) bool at the side of a map, (N, r, r) bool: every cell that is touched counts.

    Source: CoMat, attn_utils/tc_loss_utils.py: torchvision's antialiased bilinear resize, then > 0.
    """
    size = (side, side)
    resized = F.interpolate(
        masks[:, None].float(), size, mode="bilinear", antialias=True, align_corners=False
    )
    return resized[:, 0] > 0


def attention_losses(maps: Tensor, words: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the attention on the words of a noun is outside its mask, and how unlike the mask it is.

        token = 1/N sum_m sum_n 1/|P_n| sum_{p in P_n} (1 - a_mp)^2,
                a_mp = mean over heads of sum(A_p mask_n) / sum(A_p)
        pixel = 1/N sum_n mean over cells of BCE(sum_{p in P_n} mean over maps and heads of A_p, mask_n)

    Args:
        maps: (M, H, r, r, P) attention probabilities of one layer of one picture. words: (N, P) bool, which
        tokens are those of a noun; at least one each. masks: (N, r, r) bool, N >= 1.
    Returns:
        () float32 twice. A noun that was not found has the token loss 1 per map, without gradient.
    Source: CoMat, attn_utils/tc_loss_utils.py, from TokenCompose. Deviations: a token that nothing looks at
    (a sum of 0) counts as outside, where the official code has NaN.
    """
    count = len(masks)
    with torch.autocast(maps.device.type, enabled=False):
        flat, mask, own = maps.float().flatten(2, 3), masks.flatten(1).float(), words.float()
        inside = torch.einsum("mhxp,nx->mhnp", flat, mask)
        total = flat.sum(2)[:, :, None]
        share = (inside / total.clamp(min=torch.finfo(total.dtype).tiny)).mean(1)
        token = ((1 - share).square() * own / own.sum(1, keepdim=True)).sum() / count
        seen = flat.mean((0, 1)) @ own.T
        pixel = F.binary_cross_entropy(seen.T.clamp(max=1), mask, reduction="none").mean(1).sum() / count
    return token, pixel


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
