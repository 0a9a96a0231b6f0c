"""The sections of a run's configuration that do not belong to one method. Importing this costs no torch.

One TOML layout serves presets, `--config` files and `config.toml` beside every artefact:

    method = "softrepa"      # which method; its own section has the method's name
    [model]  [data]  [train]  [guard]  [sample]  [edit]  [eval]  [softrepa]
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from align_cli import registry
from align_cli.checks import one_of, require, require_multiple
from align_cli.sentences import SPLITTERS

PROMPT_KINDS = ("single", "pair", "count", "triple", "long")
"""Of captions of the shapes world; see shapes/captions.py."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which base model, and how it is held."""

    name: str = "tiny-sd15"
    """Alias (tiny-sd15, sd15, sdxl, sd3, sd35-medium, ...), hub id, or path of a diffusers folder."""
    dtype: str = "float32"
    """Weights of the frozen model: float32, float16 or bfloat16."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps."""
    encoder_device: str = ""
    """Of the text encoders and the autoencoder: cpu, cuda, cuda:N or mps; offload: they rest on the CPU and
    are on model.device only while they work; empty for model.device.
    """
    unet: str = ""
    """Path or hub id of a separately tuned denoiser (UNet, or the transformer of SD3) to use in place of the
    pipeline's own; empty for none. A path is kept in full.
    """
    vae: str = ""
    """Path or hub id of an autoencoder to use in place of the pipeline's own; empty for none. SDXL's own
    overflows in float16: madebyollin/sdxl-vae-fp16-fix does not.
    """
    t5_length: int = 512
    """SD3: rows of the T5 part of the text, at most what its tokenizer allows. 0 leaves T5 unloaded: as
    many zeros as CLIP has rows stand in its place. Source: SoftREPA sampler.py (diffusers' pipeline has 256).
    """
    text: str = "plain"
    """How prompts are read: plain, as the pipeline does (77 tokens of CLIP); or segments, sentence by
    sentence (LongAlign; SD1.x, SD2.x and SDXL).
    """
    segment_length: int = 240
    """segments: tokens of a prompt that are kept. Source: LongAlign's scripts."""
    splitter: str = "official"
    """segments: where sentences end. official: LongAlign's pattern, which its weights know (every full stop
    and question mark, also in 3.5); sentences: as a reader sees it (also ! ; and ends of lines, not in 3.5).
    """

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, ("float32", "float16", "bfloat16"))
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device)
        require(
            known is not None,
            f"model.device must be one of auto, cpu, cuda, cuda:N, mps, got {self.device!r}",
        )
        require(
            re.fullmatch(r"|cpu|cuda(:\d+)?|mps|offload", self.encoder_device) is not None,
            "model.encoder_device must be one of cpu, cuda, cuda:N, mps, offload, or empty for model.device, "
            f"got {self.encoder_device!r}",
        )
        require(bool(self.name), "model.name must not be empty")
        for key, name in self.others().items():
            object.__setattr__(self, key, registry.model_id(name))
        require(
            0 <= self.t5_length <= 512, f"model.t5_length must be between 0 and 512, got {self.t5_length}"
        )
        one_of("model.text", self.text, ("plain", "segments"))
        one_of("model.splitter", self.splitter, tuple(SPLITTERS))
        require(self.segment_length >= 1, f"model.segment_length must be >= 1, got {self.segment_length}")

    def facts(self) -> dict[str, Any]:
        """What fixes the pictures, as plain JSON: not the devices, and of reading text what is in use."""
        found = asdict(replace(self, device="auto", encoder_device=""))
        return {k: v for k, v in found.items() if k not in self.reading()} | self.reading_in_use()

    def others(self) -> dict[str, str]:
        """The parts that are not the pipeline's own, by their settings."""
        return {key: name for key in ("unet", "vae") if (name := getattr(self, key))}

    def reading(self) -> dict[str, Any]:
        """The settings of how prompts are read."""
        return {key: getattr(self, key) for key in ("text", "segment_length", "splitter")}

    def reading_in_use(self) -> dict[str, Any]:
        """The same; nothing where prompts are read plainly, as the pipeline does."""
        return {} if self.text == "plain" else self.reading()


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Training data."""

    name: str = "shapes"
    """Registered dataset: shapes, coco, captions (a list that names pictures), prompts (a list without
    pictures), or latents (a list that names latents of the original model, in CoMat's layout); refcoco or
    shapes for methods that tell pictures and texts apart.
    """
    path: str = ""
    """Root folder of the dataset (coco: holds coco/train2017 and coco/annotations; refcoco: coco/images, ReC
    and ITM), or its file (captions, prompts: .csv, .tsv, .jsonl or .json; prompts also .txt; latents: .jsonl
    or .json); unused by shapes.
    """
    expressions: str = "refall"
    """Refcoco only: refall, refcoco, refcoco+ or refcocog; or a JSON file in MDETR's layout, in whose path
    {split} stands for train, val or test.
    """
    negatives: str = ""
    """Refcoco only: folder or .tsv file of captions with their hard negatives, {split} as above; empty for
    the place that DPT's data have them at.
    """
    column: str = ""
    """Prompts, captions and latents only: the column or key of the text; empty for prompt, text, caption or
    captions (dataset captions: caption, text or prompt), whichever is there first; prompts: else the first
    column of a table.
    """
    images: str = ""
    """Captions and latents only: folder that the names of the files begin at; empty for that of the list."""
    image_size: int = 512
    """Pixels of the square training image (shapes: fixed by the world)."""
    interpolation: str = "bicubic"
    """Resize filter: bicubic, bilinear or lanczos."""
    num_workers: int = 4
    """Loader processes; 0 loads in the training process."""
    num_examples: int = 0
    """Use only the first N examples; 0 uses all (shapes: size of the generated set)."""
    mixture: str = "all"
    """Shapes world only: all kinds of scenes; pairs (two-object scenes and more); or long (of these, captions
    of five sentences alone, which have more tokens than the embedded models read).
    """
    cache: str = ""
    """Folder of encodings made by `t2ialign encode`, read in place of the pictures; empty to encode on the
    fly.
    """

    def __post_init__(self) -> None:
        one_of("data.interpolation", self.interpolation, ("bicubic", "bilinear", "lanczos"))
        one_of("data.mixture", self.mixture, ("all", "pairs", "long"))
        require(self.image_size >= 8, f"data.image_size must be >= 8 pixels, got {self.image_size}")
        require(self.num_workers >= 0, f"data.num_workers must be >= 0, got {self.num_workers}")
        require(self.num_examples >= 0, f"data.num_examples must be >= 0, got {self.num_examples}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training loop, the same for every method."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 4
    """Image-caption pairs per optimiser step over all processes (one accumulation slice)."""
    accumulation: int = 1
    """Batches whose gradients are averaged before one optimiser step."""
    lr: float = 1e-3
    """AdamW learning rate."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    adam_beta1: float = 0.9
    """AdamW beta 1."""
    adam_beta2: float = 0.999
    """AdamW beta 2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    lr_schedule: str = "constant"
    """constant, cosine (to lr_min over all steps) or cosine-restarts (a staircase, see lr_every and
    lr_period).
    """
    lr_warmup: int = 0
    """Steps of linear warm-up."""
    lr_min: float = 0.0
    """Learning rate at the bottom of a cosine."""
    lr_every: int = 1
    """cosine-restarts: optimiser steps per tread of the staircase."""
    lr_period: int = 10
    """cosine-restarts: treads until the rate restarts."""
    max_grad_norm: float = 0.0
    """Gradient norm above which gradients are scaled down; 0 leaves them alone."""
    precision: str = "fp32"
    """Autocast of the forward pass: fp32, fp16 (with loss scaling) or bf16."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's blocks in the backward pass: less memory, more time, the same gradient."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the trained tensors; 0 keeps none."""
    seed: int = 42
    """The only source of randomness of a run."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    log_every: int = 10
    """Steps between lines of the log."""
    grid_every: int = 0
    """Steps between sample grids; 0 draws none."""
    tracker: str = "none"
    """none, tensorboard, wandb or trackio (through accelerate); metrics.jsonl is always written."""
    num_threads: int = 0
    """CPU threads per process; 0 leaves torch's choice."""
    shard: str = "none"
    """none: every process holds the whole model. frozen: the frozen weights of denoiser and text encoders are
    spread over the processes (FSDP2), a block's are whole only while it works; what is trained stays whole.
    """

    def __post_init__(self) -> None:
        one_of("train.shard", self.shard, ("none", "frozen"))
        one_of("train.lr_schedule", self.lr_schedule, ("constant", "cosine", "cosine-restarts"))
        one_of("train.precision", self.precision, ("fp32", "fp16", "bf16"))
        one_of("train.tracker", self.tracker, ("none", "tensorboard", "wandb", "trackio"))
        for key in (
            "steps",
            "batch_size",
            "accumulation",
            "lr_every",
            "lr_period",
            "save_every",
            "keep_checkpoints",
            "log_every",
        ):
            require(getattr(self, key) >= 1, f"train.{key} must be >= 1, got {getattr(self, key)}")
        for key in (
            "weight_decay",
            "lr_warmup",
            "lr_min",
            "max_grad_norm",
            "grid_every",
            "num_threads",
            "seed",
        ):
            require(getattr(self, key) >= 0, f"train.{key} must be >= 0, got {getattr(self, key)}")
        require(self.lr > 0, f"train.lr must be > 0, got {self.lr}")
        require(self.adam_eps > 0, f"train.adam_eps must be > 0, got {self.adam_eps}")
        for key in ("adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, key) < 1, f"train.{key} must be in [0, 1), got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What is measured while a method trains: does it get better, or only better at pleasing its reward?

    Base and aligned model draw the same held-out prompts from the same noise, with the settings of [sample].
    """

    every: int = 0
    """Optimiser steps between measurements, the last step is measured besides; 0: none at all."""
    scorers: tuple[str, ...] = ()
    """Registered scorers. The first one that the run is not trained on decides which step is the best."""
    weights: dict[str, str] = field(default_factory=dict)
    """Scorer -> hub id, folder or file of its weights, where it is not the published place."""
    prompts: str = ""
    """Benchmark or file of held-out prompts, as t2ialign eval takes them; empty for the validation split of
    the data (models of the shapes world: of that world, of the kinds in eval.kinds).
    """
    num_prompts: int = 32
    """Held-out prompts."""
    seed: int = 1
    """Seed of prompts and start noise; not eval.seed, so that the step to keep is not chosen on the pictures
    that are reported.
    """
    keep: str = "last"
    """What the adapter holds: last, the last step; or best, the step with the best held-out score. The run
    folder has both, so that a run that goes on, or has ended, may be resumed with the other one.
    """

    def __post_init__(self) -> None:
        one_of("guard.keep", self.keep, ("last", "best"))
        for name in self.scorers:
            registry.path_of(registry.REWARDS, name)
            require(self.scorers.count(name) == 1, f"guard.scorers names {name} twice")
        for name in self.weights:
            require(name in self.scorers, f"guard.weights names {name}, which is not among guard.scorers")
        require(self.every >= 0, f"guard.every must be >= 0, got {self.every}")
        require(self.seed >= 0, f"guard.seed must be >= 0, got {self.seed}")
        require(
            self.num_prompts >= 10,
            f"guard.num_prompts must be >= 10 (fewer tell nothing from chance), got {self.num_prompts}",
        )
        if self.keep == "best":
            require(
                self.every > 0 and bool(self.scorers),
                "guard.keep best needs measurements by a held-out scorer: give --guard NAME and "
                "--guard-every N, or --keep last",
            )


OWN_SPACING = {"lcm": "lcm", "unipc": "linspace"}
"""Samplers that are made for one spacing, whatever the model's own is."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How pictures are drawn."""

    sampler: str = "ddim"
    """ddim, ddpm, unipc (order 2, 10 to 25 steps) or lcm (for models distilled to 1 to 8 steps, with
    guidance 1); euler for flow-matching models (SD3), which have no other.
    """
    spacing: str = "leading"
    """Timestep spacing: leading, trailing, linspace, lead (TextCraftor's; not for unipc) or lcm (for that
    sampler alone, of at most 50 steps). Where none is chosen: lcm for lcm, linspace for unipc, else the
    model's own.
    """
    steps: int = 30
    """Denoiser evaluations along the path (NFE)."""
    guidance: float = 7.0
    """Classifier-free guidance scale s in u + s (c - u); 1 skips the unconditional pass (what LongAlign's
    LCM sampling calls guidance 0), and 0 leaves out the prompt.
    """
    eta: float = 0.0
    """DDIM eta: 0 is deterministic."""
    image_size: int = 0
    """Pixels of the square picture; 0 takes the model's own size."""
    batch_size: int = 4
    """Pictures per forward pass. Does not change the pictures."""
    from_step: int = -1
    """Adapters on text encoders work from this step on (0 is the first); -1: from the step they were made
    for."""
    self_correct: float = 0.0
    """Scale of DPT's self-correction: in every step the latent is moved so far along the gradient of the
    score that the adapter's discriminator gives it; 0 for none. Source: txt2img.py, 0.5 (and 0.1).
    """
    correction: str = "eps"
    """What is moved. eps: what the prompt's branch of the guidance sees, as in the official code; latent: the
    latent itself; official: eps, with the discriminator's dropout on and without the last step, as the
    official script has it.
    """

    def __post_init__(self) -> None:
        one_of("sample.sampler", self.sampler, ("ddim", "ddpm", "unipc", "lcm", "euler"))
        one_of("sample.spacing", self.spacing, ("leading", "trailing", "linspace", "lead", "lcm"))
        one_of("sample.correction", self.correction, ("eps", "latent", "official"))
        require(self.self_correct >= 0, f"sample.self_correct must be >= 0, got {self.self_correct}")
        require(
            self.correction != "official" or self.steps >= 2,
            "sample.correction official leaves out the last step: sample.steps must be >= 2 for it, got "
            f"{self.steps}",
        )
        require(
            self.spacing != "lcm" or self.sampler == "lcm",
            f"sample.spacing lcm is for sampler lcm alone, got sampler {self.sampler}; name another spacing",
        )
        require(
            self.spacing != "lead" or self.sampler != "unipc",
            "sample.spacing lead is not for sampler unipc; take linspace, leading or trailing",
        )
        require(self.steps >= 1, f"sample.steps must be >= 1, got {self.steps}")
        require(
            self.spacing != "lcm" or self.steps <= 50,
            f"sample.steps must be at most 50 with spacing lcm, got {self.steps}",
        )
        require(self.batch_size >= 1, f"sample.batch_size must be >= 1, got {self.batch_size}")
        require(self.guidance >= 0, f"sample.guidance must be >= 0, got {self.guidance}")
        require(0 <= self.eta <= 1, f"sample.eta must be in [0, 1], got {self.eta}")
        require(self.image_size >= 0, f"sample.image_size must be >= 0, got {self.image_size}")
        require(
            -1 <= self.from_step < self.steps,
            f"sample.from_step must be between 0 and {self.steps - 1} (sample.steps - 1), or -1, got "
            f"{self.from_step}",
        )

    def words(self) -> str:
        """The settings that mean something, in one line."""
        idle = {"spacing", "eta"} if self.sampler == "euler" else set()
        idle |= {"eta"} if self.sampler in OWN_SPACING else set()
        idle |= {"from_step"} if self.from_step < 0 else set()
        idle |= set() if self.self_correct else {"self_correct", "correction"}
        return ", ".join(f"{key} {value}" for key, value in vars(self).items() if key not in idle)

    def check_model(self, model: str, vae_factor: int, num_train_timesteps: int) -> None:
        """UserError for a picture size or a number of steps that a model of these facts cannot draw with.

        Args:
            vae_factor: pixels per latent position along one side.
        """
        require_multiple("sample.image_size", self.image_size, vae_factor, model)
        most = num_train_timesteps - (self.sampler == "unipc")
        require(self.steps <= most, f"sample.steps must be at most {most} for {model}, got {self.steps}")
        require(
            self.spacing != "lcm" or num_train_timesteps >= 50,
            f"sample.spacing lcm needs 50 timesteps, {model} has {num_train_timesteps}; name another spacing",
        )


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How pictures are edited (FlowEdit). Defaults: SoftREPA's edit_sd3.py, for its tokens on SD3.

    Without tokens the official values are n_start 33 and tgt_guidance 13.5.
    """

    steps: int = 50
    """Timesteps of the whole path from noise to picture (NFE); only the last n_start of them are run."""
    n_start: int = 30
    """Steps that are run. Fewer stay closer to the source; 0 returns it."""
    n_min: int = 0
    """Of those, the last ones that sample under the target prompt alone (FlowEdit's second phase)."""
    n_avg: int = 1
    """Noises averaged in every step."""
    src_guidance: float = 3.5
    """Guidance scale of the source prompt; 1 skips its unconditional pass."""
    tgt_guidance: float = 9.0
    """Guidance scale of the target prompt, in the form that `convention` says."""
    convention: str = "softrepa"
    """How tgt_guidance enters: softrepa is v + s (v - u), flowedit is u + s (v - u), so that softrepa's s
    is flowedit's s + 1.
    """
    image_size: int = 0
    """Pixels per side that a picture is resized to; 0 takes the model's own, -1 leaves its size alone."""
    keep_aspect: bool = False
    """Resize to the area of image_size x image_size in place of that square."""
    batch_size: int = 4
    """Rows of one denoiser call. An edit has four (source and target, each with and without its prompt), so
    8 makes two edits at once and 1 one call after the other.
    """

    def __post_init__(self) -> None:
        one_of("edit.convention", self.convention, ("softrepa", "flowedit"))
        for name, least in {"steps": 1, "n_start": 0, "n_min": 0, "n_avg": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            require(value >= least, f"edit.{name} must be >= {least}, got {value}")
        require(
            self.n_start <= self.steps,
            f"edit.n_start must be at most edit.steps ({self.steps}), got {self.n_start}",
        )
        require(
            self.n_min <= self.n_start,
            f"edit.n_min must be at most edit.n_start ({self.n_start}), got {self.n_min}",
        )
        for name in ("src_guidance", "tgt_guidance"):
            require(getattr(self, name) >= 0, f"edit.{name} must be >= 0, got {getattr(self, name)}")
        require(self.image_size >= -1, f"edit.image_size must be >= -1, got {self.image_size}")
        require(
            not (self.keep_aspect and self.image_size == -1),
            "edit.keep_aspect resizes, edit.image_size -1 does not: choose one of them",
        )


def check_kinds(key: str, kinds: tuple[str, ...]) -> None:
    """Raise `UserError` unless these are kinds of prompts of the shapes world, each once, at least one."""
    require(bool(kinds), f"{key} must name at least one kind of prompts: {', '.join(PROMPT_KINDS)}")
    for kind in kinds:
        one_of(key, kind, PROMPT_KINDS)
        require(kinds.count(kind) == 1, f"{key} names {kind} twice")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The paired evaluation that closes a training run."""

    num_prompts: int = 512
    """Held-out prompts; 0 skips the evaluation."""
    seed: int = 0
    """Seed of prompts and start noise, the same for base and aligned model."""
    split: str = "test"
    """Held-out compositions: val while settings are being chosen, test for the number that is reported."""
    kinds: tuple[str, ...] = ("pair", "triple", "long")
    """Kinds of prompts: pair, triple, long (five sentences); also single and count, which hold no composition
    that was kept from training. The guard's prompts of the shapes world are of these kinds, too.
    """

    def __post_init__(self) -> None:
        check_kinds("eval.kinds", self.kinds)
        one_of("eval.split", self.split, ("val", "test"))
        require(self.num_prompts >= 0, f"eval.num_prompts must be >= 0, got {self.num_prompts}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the settings of every method have in common."""

    @property
    def pictures(self) -> bool:
        """Whether it trains on pictures with captions; else captions alone are enough, and no picture is
        read.
        """
        return True

    @property
    def grounded(self) -> bool:
        """Whether it learns to tell pictures and texts apart, and where things are: its datasets are those
        of `registry.GROUNDED`.
        """
        return False

    @property
    def latents(self) -> bool:
        """Whether it wants the latents of a cache although it trains on no pictures: as examples of what the
        original model draws. A method that trains on pictures reads them anyhow.
        """
        return False

    @property
    def cached_text(self) -> bool:
        """Whether encodings of text that were computed beforehand stand in for the text encoders."""
        return self.pictures

    @property
    def whole(self) -> str:
        """Why every process needs the whole frozen weights with these settings; "" if it does not."""
        return ""

    def check_train(self, train: TrainSettings) -> None:
        """UserError for settings of the training loop that the method cannot work with."""
