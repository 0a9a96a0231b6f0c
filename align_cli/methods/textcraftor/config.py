"""Settings of TextCraftor. Importing this costs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from align_cli.checks import one_of, require
from align_cli.rewards.spec import check_weights
from align_cli.settings import MethodConfig

STAGES = ("text", "unet", "joint")
OFFICIAL_STEPS = 25
"""The number of steps that the official loop's split is written for, whatever the number that it runs."""


@dataclass(frozen=True, kw_only=True)
class TextCraftorConfig(MethodConfig):
    """What is trained, on which rewards, through how many sampling steps. The learning rate is train.lr."""

    stage: str = "text"
    """text: the text encoders. unet: the denoiser, under the frozen tuned text encoders of from_adapter (the
    model's own without one). joint: both. Source: README of the official code."""
    from_adapter: str = ""
    """Adapter folder of TextCraftor whose tensors training starts from; empty for the model's own. Its text
    encoders that this stage does not train stay as they are there."""
    rewards: dict[str, float] = field(
        default_factory=lambda: {"clip-g14": 100.0, "aesthetic": 1.0, "pickscore": 1.0, "hpsv2": 100.0}
    )
    """Reward -> weight in the loss, -sum of weight times mean reward. Source: paper, appendix B."""
    reward_weights: dict[str, str] = field(default_factory=dict)
    """Reward -> hub id, folder or file of its weights, where it is not the published place."""
    reward_preprocessing: str = "textcraftor"
    """How pictures reach the rewards: textcraftor (adaptive average pooling) or official (each author's
    own). Source: standard_process of the official code."""
    reward_dtype: str = "float32"
    """Weights of the rewards: float32, float16 or bfloat16."""
    pickscore_pairing: str = "diagonal"
    """diagonal: PickScore of a picture under its own prompt; batch: mean over all prompts of the batch (of
    train.batch_size, on all processes together), as the released code does over the 4 of one process."""
    steps: int = 25
    """Sampling steps of a training picture. Source: official pipeline."""
    guidance: float = 7.5
    """Classifier-free guidance of a training picture; gradient flows through both branches (SDXL's negative
    is zeros: through one). Source: official pipeline."""
    spacing: str = "lead"
    """Timesteps of a training picture: lead (the official 999 down in equal whole steps), or leading,
    trailing, linspace. Unused by flow-matching models."""
    image_size: int = 0
    """Pixels of the square training picture; 0 takes the model's own size."""
    grad_steps: int = 5
    """K: the last sampling steps that use the tuned text encoder and carry gradient. Source: --grad_steps."""
    test_grad_steps: int = 15
    """When drawing: the last steps that use the tuned text encoder. Source: test_parti.sh."""
    literal_split: bool = False
    """Steps below 25 - K (whatever the number of steps) use the frozen encoder, as in the official loop;
    else those below steps - K."""
    encoders: tuple[str, ...] = ()
    """Text encoders that are tuned: text_encoder, text_encoder_2, text_encoder_3; empty for every CLIP."""
    lr_unet: float = 0.0
    """Learning rate of the denoiser in stage joint; 0 takes train.lr. Source: --lr_unet."""
    lora_rank: int = 0
    """Train LoRA of this rank on the attention layers; 0 trains all weights, as in the paper."""
    lora_alpha: float = 0.0
    """LoRA is scaled by lora_alpha / lora_rank; 0 takes lora_rank."""
    detach_input: bool = False
    """Cut the denoiser's input from the path: gradient reaches a step through the arithmetic of the later
    steps alone. Steadier for a large grad_steps; not the official gradient."""
    kept_steps: int = 1
    """Of the gradient steps, the last ones whose activations are kept; those of the others are computed again
    in the backward pass: less memory, more time, the same gradient. Source: the official pipeline keeps none.
    """
    decode_chunk: int = 1
    """Pictures that are decoded and scored in one graph: sets memory, not the gradient. 0: all at once."""
    checkpoint_vae: bool = False
    """Compute the activations of the autoencoder's blocks again in the backward pass: less memory for large
    pictures, more time, the same gradient."""

    def __post_init__(self) -> None:
        one_of("textcraftor.stage", self.stage, STAGES)
        check_weights("textcraftor.rewards", self.rewards)
        for name in self.reward_weights:
            require(
                name in self.rewards,
                f"textcraftor.reward_weights names {name}, which is not among textcraftor.rewards",
            )
        one_of("textcraftor.reward_preprocessing", self.reward_preprocessing, ("textcraftor", "official"))
        one_of("textcraftor.reward_dtype", self.reward_dtype, ("float32", "float16", "bfloat16"))
        one_of("textcraftor.pickscore_pairing", self.pickscore_pairing, ("diagonal", "batch"))
        one_of("textcraftor.spacing", self.spacing, ("lead", "leading", "trailing", "linspace"))
        require(self.steps >= 1, f"textcraftor.steps must be >= 1, got {self.steps}")
        most = OFFICIAL_STEPS if self.literal_split else self.steps
        require(
            1 <= self.grad_steps <= most,
            f"textcraftor.grad_steps must be between 1 and {most} (the sampling steps), got "
            f"{self.grad_steps}",
        )
        require(
            self.first_tuned(self.steps, self.grad_steps) < self.steps,
            f"textcraftor.literal_split leaves no step of {self.steps} to the tuned encoder with grad_steps "
            f"{self.grad_steps}",
        )
        require(
            self.test_grad_steps >= 1,
            f"textcraftor.test_grad_steps must be >= 1, got {self.test_grad_steps}",
        )
        require(self.guidance >= 0, f"textcraftor.guidance must be >= 0, got {self.guidance}")
        for name in self.encoders:
            one_of("textcraftor.encoders", name, ("text_encoder", "text_encoder_2", "text_encoder_3"))
        for key in ("lr_unet", "lora_rank", "lora_alpha", "decode_chunk", "image_size", "kept_steps"):
            require(getattr(self, key) >= 0, f"textcraftor.{key} must be >= 0, got {getattr(self, key)}")

    @property
    def pictures(self) -> bool:
        """False: it draws its own."""
        return False

    def first_tuned(self, steps: int, tuned: int) -> int:
        """Index of the first of `steps` sampling steps that sees the tuned encoder, for `tuned` such steps at
        the end. Source: loop_unet_cus, `i < 25 - grad_steps`, which with literal_split holds for any number
        of steps.
        """
        return max(0, (OFFICIAL_STEPS if self.literal_split else steps) - tuned)
