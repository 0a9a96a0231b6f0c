"""Settings of DPT. Importing this costs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from align_cli.checks import one_of, require
from align_cli.errors import UserError
from align_cli.settings import MethodConfig

STAGES = ("probe", "tune")
DISCRIMINATOR = "discriminator"
"""Group of the discriminator's tensors; those of the LoRA of stage tune are called as the denoiser is."""
LOSSES = ("class", "box", "giou", "align", "i2t", "t2i", "denoise")
"""Terms of the loss. class, box, giou, align: where a phrase is in the picture. i2t, t2i: which text fits a
picture, and which picture a text. denoise: of stage tune alone."""
GROUNDING = LOSSES[:4]
"""Those of where a phrase is."""
_BLOCK = re.compile(r"bottom\d|mid|up\d|block\d{1,2}")
_FUSED = re.compile(r"all-(\d{1,4})-(\d{1,3})")


@dataclass(frozen=True, kw_only=True)
class DPTConfig(MethodConfig):
    """What the discriminator looks at, what it is made of, and what is tuned. The learning rate is
    train.lr."""

    stage: str = "probe"
    """probe: a discriminator on the frozen model. tune: discriminator and LoRA of the denoiser."""
    from_adapter: str = ""
    """Adapter folder of DPT whose tensors training starts from; empty for a random discriminator. Source:
    --qformer_ckpt, of which logit_scale is restored here, too."""
    feature: str = ""
    """What the discriminator sees: bottom0 ... (down blocks), mid, up0 ...; of SD3 block0 ..., the picture's
    stream; several joined by _ (of the same size; concatenated); or all-C-S: all of them, resized to S x S,
    through a convolution to C channels each, and summed. Empty: up1, or up0 where the UNet has fewer than
    four levels; of SD3 the block after two thirds of them. Source: --unet_feature up1."""
    hidden_dim: int = 256
    """Width of the discriminator."""
    num_heads: int = 8
    """Of its attention."""
    feedforward_dim: int = 2048
    """Width between the linear layers of its blocks."""
    num_encoder_layers: int = 1
    """Blocks over the picture's positions."""
    num_decoder_layers: int = 1
    """Blocks of the queries."""
    dropout: float = 0.1
    """Of the discriminator, in training."""
    pre_norm: bool = False
    """Normalise before attention, not after it."""
    position: str = "sine"
    """Code of positions: sine or learned."""
    num_matching_queries: int = 10
    """Queries whose best one says how well a text fits."""
    num_grounding_queries: int = 100
    """Queries that each give a box."""
    phrase_encoder: str = "FacebookAI/roberta-base"
    """RoBERTa that reads referring expressions: hub id, folder, or embedded:tiny-roberta. Source:
    --text_encoder_type, frozen."""
    phrase_dim: int = 64
    """Width in which queries and tokens of an expression are compared. Source: --contrastive_loss_hdim."""
    temperature: float = 0.07
    """Of that comparison. Source: --temperature_NCE."""
    weights: dict[str, float] = field(default_factory=dict)
    """Term of the loss -> weight, where it is not the official one: class 1, box 5, giou 2, align 1, i2t 1,
    t2i 1, denoise 1."""
    match_class: float = 1.0
    """Weight of the class in choosing the query of a box. Source: --set_cost_class."""
    match_box: float = 5.0
    """Of the distance. Source: --set_cost_bbox."""
    match_giou: float = 2.0
    """Of the generalised IoU. Source: --set_cost_giou."""
    no_object_weight: float = 0.1
    """Weight of queries without a box in the class loss. Source: --eos_coef."""
    noise_offset: float = 0.0
    """Share of noise that is constant over a channel."""
    snr_gamma: float = 0.0
    """min-SNR weight of the denoising loss; 0 for none, and of SD3 always. Source: --snr_gamma."""
    lora_rank: int = 4
    """Stage tune: rank of the LoRA on to_q, to_k, to_v and to_out of every attention, of SD3 also on those of
    the text's stream; alpha = rank."""
    only_lora: bool = False
    """Stage tune: leave the discriminator as it is, without dropout. Source: --only_train_lora."""
    detach_after: str = ""
    """Stage tune: the denoising loss stops at this block (bottom0, ..., mid, up0, ..., block0, ...) on its
    way back, but for skip connections, and at a block before the feature so do the other losses of the same
    pass, the true picture under its caption; empty for none. Source: --detach_unet_feature."""
    eval_timestep: int = 500
    """Noise level at which a probe is measured. Source: evaluation.py, --fix_timestep."""
    fixed_timestep: int = -1
    """Train at this timestep alone; -1 for all. Source: --fix_timestep."""

    def __post_init__(self) -> None:
        one_of("dpt.stage", self.stage, STAGES)
        one_of("dpt.position", self.position, ("sine", "learned"))
        for key in (
            "hidden_dim", "num_heads", "feedforward_dim", "num_encoder_layers", "num_decoder_layers",
            "num_matching_queries", "num_grounding_queries", "phrase_dim", "lora_rank",
        ):  # fmt: skip
            require(getattr(self, key) >= 1, f"dpt.{key} must be >= 1, got {getattr(self, key)}")
        require(
            self.hidden_dim % self.num_heads == 0 and self.hidden_dim % 4 == 0,
            f"dpt.hidden_dim must be a multiple of 4 and of dpt.num_heads ({self.num_heads}), got "
            f"{self.hidden_dim}",
        )
        require(0 <= self.dropout < 1, f"dpt.dropout must be >= 0 and < 1, got {self.dropout}")
        require(self.temperature > 0, f"dpt.temperature must be > 0, got {self.temperature}")
        for key in (
            "match_class", "match_box", "match_giou", "no_object_weight", "noise_offset", "snr_gamma",
        ):  # fmt: skip
            require(getattr(self, key) >= 0, f"dpt.{key} must be >= 0, got {getattr(self, key)}")
        for name, weight in self.weights.items():
            one_of("dpt.weights", name, LOSSES)
            require(weight >= 0, f"dpt.weights: {name} must be >= 0, got {weight}")
        require(
            any(self.weight(name) for name in LOSSES if name != "denoise" or self.stage == "tune"),
            "dpt.weights leaves no loss: give at least one of "
            f"{', '.join(LOSSES[: None if self.stage == 'tune' else -1])} a weight > 0",
        )
        require(
            0 <= self.eval_timestep <= 999, f"dpt.eval_timestep must be in [0, 999], got {self.eval_timestep}"
        )
        require(
            -1 <= self.fixed_timestep <= 999,
            f"dpt.fixed_timestep must be in [0, 999], or -1 for all, got {self.fixed_timestep}",
        )
        if self.feature:
            feature_names(self.feature)

    @property
    def grounded(self) -> bool:
        """True: it trains on pictures with boxes and with false captions and pictures."""
        return True

    def weight(self, name: str) -> float:
        """Of a term of the loss."""
        official = {"box": 5.0, "giou": 2.0}
        return self.weights.get(name, official.get(name, 1.0))

    def idle(self, *, gradient_checkpointing: bool) -> dict[str, str]:
        """Settings that were changed and do nothing in a training -> why. gradient_checkpointing: of it."""
        found: dict[str, str] = {}

        def mark(reason: str, *keys: str) -> None:
            changed = (key for key in keys if getattr(self, key) != getattr(DPTConfig, key))
            found.update({f"dpt.{key}": reason for key in changed})

        if not any(map(self.weight, GROUNDING)):
            matching = ("match_class", "match_box", "match_giou", "no_object_weight", "temperature")
            mark("without the losses class, box, giou and align", *matching)
        if not self.weight("denoise"):
            mark("without the loss denoise", "detach_after", "snr_gamma")
        if self.stage == "probe":
            mark("in stage probe", "only_lora", "detach_after", "snr_gamma", "lora_rank")
            if self.weights.get("denoise"):
                found["dpt.weights: denoise"] = "in stage probe"
            if gradient_checkpointing:
                found["train.gradient_checkpointing"] = "in stage probe, whose denoiser has no gradient"
        return found


def feature_names(feature: str) -> list[str]:
    """Blocks that a feature is made of; none named for all-C-S.

    Raises:
        UserError: it is none of the forms.
    """
    fused = fused_shape(feature)
    if fused and min(fused) >= 1:
        return []
    names = feature.split("_")
    if len(set(names)) < len(names) or not all(map(_BLOCK.fullmatch, names)):
        raise UserError(
            "dpt.feature must be blocks like bottom0, mid, up1, block15, several joined by _ (bottom1_up0), "
            f"each once, or all-C-S (all-1280-8), C and S >= 1, got {feature!r}"
        )
    return names


def fused_shape(feature: str) -> tuple[int, int] | None:
    """(C, S) of a feature all-C-S, else None."""
    found = _FUSED.fullmatch(feature)
    return (int(found[1]), int(found[2])) if found else None
