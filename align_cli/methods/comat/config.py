"""Settings of CoMat. Importing this costs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from align_cli import registry
from align_cli.checks import one_of, require
from align_cli.grounding.parsing import PARSERS
from align_cli.rewards.spec import check_weights
from align_cli.settings import MethodConfig, TrainSettings

ENTITIES = ("mended", "official")
REAL = ("stored", "drawn")
_LAYER = re.compile(r"(down|mid|up|joint)_\d+")


@dataclass(frozen=True, kw_only=True)
class CoMatConfig(MethodConfig):
    """How training pictures are drawn, what is asked of them, and what is tuned. The learning rate of the
    LoRA is train.lr."""

    from_adapter: str = ""
    """Adapter folder of CoMat whose LoRA training starts from; empty for none. The discriminator starts
    afresh."""
    lora_rank: int = 128
    """Rank of the LoRA on to_q, to_k, to_v and to_out of every attention, of SD3 also on those of the text's
    stream; alpha = rank. Source: both scripts (argument default 32)."""

    steps: int = 50
    """T: sampling steps (DDPM; Euler for SD3) of a training picture. Source: --total_step of both scripts."""
    grad_steps: int = 5
    """K: of these, equally spaced ones from a random start carry gradient. Source: --K."""
    guidance: float = 7.5
    """Classifier-free guidance; gradient flows through both branches. Source: --cfg_scale."""
    image_size: int = 0
    """Pixels of the square training picture; 0 takes the model's own size. Source: --resolution 512, for SDXL
    too."""
    detach_input: bool = False
    """Cut the denoiser's input from the path: gradient reaches earlier steps through the arithmetic of the
    steps alone. The official code does so for SDXL, and not for SD1.5."""

    rewards: dict[str, float] = field(default_factory=lambda: {"blip-caption": 1.0})
    """Concept matching: captioner -> weight; other differentiable rewards may stand beside it. Source:
    --caption_model, --reward_weights."""
    reward_weights: dict[str, str] = field(default_factory=dict)
    """Reward -> hub id, folder or file of its weights, where it is not the published place."""
    reward_preprocessing: str = "official"
    """How pictures reach the rewards: official (each author's own)."""
    reward_dtype: str = "float32"
    """Weights of the rewards, and of what finds the nouns in a picture: float32, float16 or bfloat16. Source:
    float16 there, of the captioner."""
    crop: bool = True
    """Rewards see a crop that is size // 224 pixels smaller, at a random place. Source: caption_blip.py."""
    norm_grad: bool = False
    """Bring the gradient that rewards have in the pictures to the norm 1e4. Source: --norm_grad."""
    official_range: bool = False
    """Rewards and masks get pictures in [-1, 1], as in the official SDXL code with fidelity loss, a bug."""

    token_weight: float = 1e-3
    """Attribute concentration: weight of the token loss. Source: --mask_token_loss_weight."""
    pixel_weight: float = 5e-5
    """Attribute concentration: weight of the pixel loss. Source: --mask_pixel_loss_weight."""
    attention_steps: int = 2
    """Gradient steps, drawn with replacement (at most grad_steps), whose attention is looked at. Source:
    --attrcon_train_steps of both scripts (argument default 5)."""
    attention_layers: tuple[str, ...] = ()
    """Layers whose attention is looked at, place and side of the map: mid_8, up_16, ..., of SD3 joint_64 (all
    blocks); empty for all of these but those of the way down. Source: mid_8, up_16, up_32, up_64 of SD1.5,
    mid_16, up_16, up_32 of SDXL."""
    parser: str = "auto"
    """What finds nouns and their attributes: spacy, spacy:MODEL, shapes (the grammar of the shapes world),
    plain (word lists); auto takes spacy where it is installed, else plain, and for embedded models first
    shapes."""
    entities: str = "mended"
    """mended: with capital letters, with the noun of "the dog is red", with every relative clause; official:
    as the official code has it."""
    masker: str = "auto"
    """What finds the nouns in a picture: grounded-sam (GroundingDINO and SAM), or shapes (the oracle); auto
    takes shapes for embedded models."""
    detector: str = "IDEA-Research/grounding-dino-tiny"
    """GroundingDINO: hub id or folder."""
    segmenter: str = "facebook/sam-vit-base"
    """SAM: hub id or folder. Source: FastSAM-x there, which needs a package outside transformers."""
    box_threshold: float = 0.3
    """Least score of a box. Source: gsam_interface.py."""
    text_threshold: float = 0.25
    """Least score of a word in a box's phrase. Source: gsam_interface.py."""

    fidelity_weight: float = 1.0
    """Weight of the adversarial loss; 0 for no discriminator. Source: --gan_loss_weight, 0.5 for SDXL."""
    real: str = "stored"
    """Latents that the original model made of the same prompts: stored (t2ialign encode --for comat, or the
    official list as --data latents), or drawn in every step, which takes the time of a second picture."""
    discriminator: str = ""
    """Model whose denoiser, with a LoRA of its own, is the discriminator: alias, hub id or folder; empty for
    the trained model's own. Source: SD1.5, for SDXL too."""
    discriminator_rank: int = 0
    """Rank of its LoRA; 0 takes lora_rank."""
    lr_discriminator: float = 2e-5
    """Its learning rate. Source: sd15.sh; 5e-5 in sdxl.sh."""
    discriminator_beta1: float = 0.0
    """AdamW beta 1 of the discriminator. Source: --adam_beta1_D of both scripts."""
    discriminator_grad_norm: float = 1.0
    """Gradient norm above which its gradients are scaled down; 0: never. Source: --max_grad_norm_D."""

    decode_chunk: int = 1
    """Pictures that are decoded and scored in one graph: sets memory, not the gradient. 0: all at once."""
    checkpoint_vae: bool = False
    """Compute the activations of the autoencoder's blocks again in the backward pass: less memory for large
    pictures, more time, the same gradient."""

    def __post_init__(self) -> None:
        if self.concept:
            check_weights("comat.rewards", self.rewards)
        for name in self.reward_weights:
            require(
                name in self.rewards, f"comat.reward_weights names {name}, which is not among comat.rewards"
            )
        one_of("comat.reward_dtype", self.reward_dtype, ("float32", "float16", "bfloat16"))
        one_of("comat.entities", self.entities, ENTITIES)
        one_of("comat.real", self.real, REAL)
        for key in ("steps", "grad_steps", "lora_rank"):
            require(getattr(self, key) >= 1, f"comat.{key} must be >= 1, got {getattr(self, key)}")
        require(
            self.grad_steps <= self.steps,
            f"comat.grad_steps must be at most comat.steps ({self.steps}), got {self.grad_steps}",
        )
        for key in (
            "guidance", "image_size", "token_weight", "pixel_weight", "attention_steps", "fidelity_weight",
            "discriminator_rank", "lr_discriminator", "discriminator_grad_norm", "decode_chunk",
        ):  # fmt: skip
            require(getattr(self, key) >= 0, f"comat.{key} must be >= 0, got {getattr(self, key)}")
        for key in ("box_threshold", "text_threshold", "discriminator_beta1"):
            value = getattr(self, key)
            require(0 <= value < 1, f"comat.{key} must be >= 0 and < 1, got {value}")
        require(
            self.parser in PARSERS or re.fullmatch(r"spacy:.+", self.parser) is not None,
            f"comat.parser must be one of {', '.join(PARSERS)} or spacy:MODEL, got {self.parser!r}",
        )
        one_of("comat.masker", self.masker, ("auto", *registry.MASKERS))
        for name in self.attention_layers:
            require(
                _LAYER.fullmatch(name) is not None,
                "comat.attention_layers must be places with the side of their maps, like mid_8 or up_16 (of "
                f"SD3 joint_64), got {name!r}",
            )
        require(
            bool(self.concept or self.concentration or self.fidelity_weight),
            "nothing is asked of the pictures: give comat.rewards, comat.token_weight, comat.pixel_weight or "
            "comat.fidelity_weight a weight > 0",
        )
        require(
            not (self.norm_grad and self.decode_chunk),
            "comat.norm_grad needs all pictures in one graph: give --set comat.decode_chunk=0",
        )

    @property
    def concept(self) -> bool:
        """Whether pictures are matched with their prompts."""
        return any(self.rewards.values())

    @property
    def concentration(self) -> bool:
        """Whether attention is led to where things are."""
        return bool(self.attention_steps and (self.token_weight or self.pixel_weight))

    @property
    def pictures(self) -> bool:
        """False: it draws its own."""
        return False

    @property
    def whole(self) -> str:
        """Why every process needs the whole UNet."""
        return "LoRA is merged into the UNet to draw, and captions decide how often a process calls it"

    @property
    def latents(self) -> bool:
        """Whether it wants stored latents of the original model."""
        return bool(self.fidelity_weight) and self.real == "stored"

    def idle(self) -> dict[str, str]:
        """Settings that were changed and do nothing -> why."""
        found: dict[str, str] = {}

        def mark(reason: str, *keys: str) -> None:
            changed = (key for key in keys if getattr(self, key) != getattr(CoMatConfig, key))
            found.update({f"comat.{key}": reason for key in changed})

        if not self.concept:
            mark("without rewards", "crop", "norm_grad", "reward_preprocessing")
        if not self.concentration:
            mark(
                "without attribute concentration (token_weight, pixel_weight, attention_steps)",
                "attention_layers", "parser", "entities", "masker", "detector", "segmenter",
                "box_threshold", "text_threshold",
            )  # fmt: skip
        if not self.concept and not self.concentration:
            mark("without rewards and without attribute concentration", "reward_dtype", "official_range")
        if not self.fidelity_weight:
            mark(
                "without fidelity loss (fidelity_weight)",
                "real", "discriminator", "discriminator_rank", "lr_discriminator", "discriminator_beta1",
                "discriminator_grad_norm",
            )  # fmt: skip
        return found

    def check_train(self, train: TrainSettings) -> None:
        """UserError for settings of the training loop that it cannot work with."""
        require(
            not (self.norm_grad and train.precision == "fp16"),
            "comat.norm_grad does not go with fp16 gradients; give --set train.precision=bf16",
        )
