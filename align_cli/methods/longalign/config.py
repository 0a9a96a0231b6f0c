"""Settings of LongAlign. Importing this costs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from align_cli.checks import one_of, require
from align_cli.errors import UserError
from align_cli.rewards.spec import check_weights
from align_cli.settings import MethodConfig, TrainSettings

STANDS_ON: dict[str, tuple[str, ...]] = {
    "align": (), "reward": ("align",), "lcm": ("align", "reward"), "reward-lcm": ("lcm",),
}  # fmt: skip
"""Stage -> the stages of which one is just below it."""
STAGES = tuple(STANDS_ON)
EARLIER = ("align", "reward", "lcm")
"""Stages that another may stand on, in the order of their LoRAs: groups of an adapter's tensors."""
OWN, ADAPTER = "unet", "adapter"
"""Groups of the LoRA that the stage itself trains, and of the text adapter."""
WITH_PICTURES = ("align", "lcm")
"""Stages that train on pictures with captions; the others on captions alone."""
WITH_REWARD = ("reward", "reward-lcm")


@dataclass(frozen=True, kw_only=True)
class LongAlignConfig(MethodConfig):
    """How long text is read, and what a stage trains. The learning rate is train.lr."""

    stage: str = "align"
    """align: denoiser and text adapter learn to read segments. reward: decomposed preference. lcm: distilled
    to a few steps. reward-lcm: decomposed preference in those few steps. Source: README of the official code.
    """
    from_adapter: str = ""
    """Adapter folder of the stage before, on which this one stands; align needs none."""
    token_length: int = 240
    """Rows of the CLIP part of the text, and tokens of the T5 part. Source: official commands."""
    splitter: str = "official"
    """How a caption is cut into segments: official (to the letter), or sentences (also at ! ; and line ends,
    not inside numbers and names)."""
    t5: str = "google-t5/t5-large"
    """Hub id or folder of the T5 that reads the whole caption; empty for segments of CLIP alone (the ablation
    of figure 4)."""
    text_adapter: str = ""
    """Folder of the text adapter that stage align starts from (official: LaVi-Bridge's t5_unet/adapter);
    empty for a random one."""
    adapter_width: int = 896
    """Width between the two layers of a random text adapter. Source: LaVi-Bridge, t5_unet."""
    adapter_dropout: float = 0.1
    """Dropout in the text adapter while it trains. Source: LaVi-Bridge, modules/adapters.py."""
    lora_rank: int = 32
    """Rank of the LoRA on the denoiser. Source: official default."""
    lora_dropout: float = 0.1
    """Dropout on what the LoRA adds while it trains. Source: modules/lora.py."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one. Source: MY_ENVIRON_DROP, 0.0 after stage align."""
    loss: str = "l2"
    """align, lcm: l2 or huber. Source: official commands, l2 in align and huber in lcm."""
    huber_c: float = 0.001
    """Where huber goes from square to absolute. Source: official default."""
    steps: int = 50
    """reward: sampling steps of a training picture; reward-lcm: 4. Source: official code."""
    guidance: float = 7.5
    """reward: classifier-free guidance of a training picture; lcm: of the teacher. Source: official code."""
    grad_stride: int = 10
    """reward: every how many steps one carries gradient, the first of them drawn anew; 5 of 50. Source:
    official code, after DRTune."""
    skip: int = 20
    """lcm: timesteps between student and target, 1000 // 50. Source: official code."""
    first_timestep: int = 10
    """lcm: the smallest timestep that is drawn. Source: official code."""
    rewards: dict[str, float] = field(default_factory=dict)
    """reward, reward-lcm: reward -> weight of its loss. CLIP-like ones alone have the text vectors that are
    decomposed. Source: official code, denscore, of weight 1."""
    reward_weights: dict[str, str] = field(default_factory=dict)
    """Reward -> hub id, folder or file of its weights, where it is not the published place."""
    reward_preprocessing: str = "longalign"
    """How pictures reach the rewards: longalign (a random crop of 504 pixels, bilinear), or official (each
    author's own). Source: loss.py."""
    reward_dtype: str = "float32"
    """Weights of the rewards: float32, float16 or bfloat16."""
    omega: float = 0.3
    """Factor on the part of the text that all texts share; 1 is the plain reward, 0 the text-relevant part
    alone. Source: REWEIGHT."""
    image_size: int = 0
    """reward, reward-lcm: pixels of the square training picture; 0 takes the model's own size."""
    decode_chunk: int = 1
    """Pictures decoded and scored at a time; 0 takes all. Changes memory and time, not the gradient."""

    @property
    def whole(self) -> str:
        """Why every process needs the whole UNet, if it does."""
        return "the LoRA of --from is merged into the UNet" if self.from_adapter else ""

    @property
    def pictures(self) -> bool:
        """Whether the stage trains on pictures with captions."""
        return self.stage in WITH_PICTURES

    @property
    def cached_text(self) -> bool:
        """Captions are read anew in every step: some are dropped, and the text adapter trains."""
        return False

    def __post_init__(self) -> None:
        one_of("longalign.stage", self.stage, STAGES)
        one_of("longalign.splitter", self.splitter, ("official", "sentences"))
        one_of("longalign.loss", self.loss, ("l2", "huber"))
        one_of("longalign.reward_preprocessing", self.reward_preprocessing, ("longalign", "official"))
        one_of("longalign.reward_dtype", self.reward_dtype, ("float32", "float16", "bfloat16"))
        if self.rewards:
            check_weights("longalign.rewards", self.rewards)
        for name in self.reward_weights:
            require(
                name in self.rewards,
                f"longalign.reward_weights names {name}, which is not among longalign.rewards",
            )
        for key in ("adapter_width", "lora_rank", "steps", "grad_stride", "skip"):
            require(getattr(self, key) >= 1, f"longalign.{key} must be >= 1, got {getattr(self, key)}")
        for key in ("adapter_dropout", "lora_dropout", "caption_dropout"):
            require(
                0 <= getattr(self, key) < 1, f"longalign.{key} must be in [0, 1), got {getattr(self, key)}"
            )
        for key in ("guidance", "image_size", "decode_chunk", "first_timestep"):
            require(getattr(self, key) >= 0, f"longalign.{key} must be >= 0, got {getattr(self, key)}")
        require(self.token_length >= 2, f"longalign.token_length must be >= 2, got {self.token_length}")
        require(self.huber_c > 0, f"longalign.huber_c must be > 0, got {self.huber_c}")
        require(0 <= self.omega <= 1, f"longalign.omega must be in [0, 1], got {self.omega}")
        require(
            self.stage != "reward" or self.grad_stride <= self.steps,
            f"longalign.grad_stride must be at most longalign.steps ({self.steps}), got {self.grad_stride}",
        )

    def check_train(self, train: TrainSettings) -> None:
        if self.stage in WITH_REWARD and not self.rewards:
            raise UserError(f"stage {self.stage} climbs a reward: name one, --reward denscore=1")
        if self.stage == "align" and self.from_adapter:
            raise UserError("stage align stands on no other: leave --from away, or name another --stage")
        if self.stage != "align" and self.t5 and not self.from_adapter:
            raise UserError(
                f"stage {self.stage} stands on an earlier one: give its adapter with --from (official: "
                f"{'lcm' if self.stage == 'reward-lcm' else 'align'}), or train on segments of CLIP alone "
                "with --set 'longalign.t5=\"\"'"
            )
