"""Settings of SoftREPA. Importing this costs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from align_cli.checks import one_of, require
from align_cli.settings import MethodConfig, TrainSettings

TABLE_ROWS = 100
"""Rows of the table of timestep offsets; row = t // TABLE_STRIDE."""
TABLE_STRIDE = 10
"""Timesteps that share a row."""
NUM_TRAIN_TIMESTEPS = TABLE_ROWS * TABLE_STRIDE
"""Timesteps of every supported base model."""


@dataclass(frozen=True, kw_only=True)
class SoftREPAConfig(MethodConfig):
    """What is trained, and with which contrastive loss. The learning rate is train.lr."""

    num_tokens: int = 4
    """Soft tokens put after the first text token (SD3: in front of the text of a block). Source: train.py
    --n_dc_tokens."""
    stages: str = "TFF"
    """Which UNet stages see them: three letters T or F for down, mid, up; unused by SD3. Source: train.py
    --apply_dc."""
    num_layers: int = 5
    """SD3: how many of its first blocks have tokens, each its own; -1 for all. Unused by UNets. Source:
    train.py --n_dc_layers."""
    token_space: str = "text"
    """text: tokens are as wide as the text encodings, and in SD3 pass its frozen context_embedder (official
    training). projected: SD3 tokens behind that, as wide as its text stream (the released ones)."""
    use_t_table: bool = False
    """Learn an offset of the tokens for every 10 timesteps. Source: train.py --use_dc_t."""
    dweight: float = 0.0
    """Weight of the ordinary denoising loss under the own caption. Source: train.py --dweight."""
    min_t: int = 0
    """Lowest training timestep. Source: train.py --min_t."""
    max_t: int = 1000
    """Training timesteps lie below this. Source: train.py --max_t."""
    temperature: float = 0.07
    """Denoising error (latent units squared) over which the similarity falls by e. Source: train.py
    ContrastiveLoss.
    """
    logit_scale: float = 4.0
    """Similarity at zero error. Source: train.py ContrastiveLoss."""
    pair_chunk: int = 16
    """Image-caption pairs per pass of the denoiser: sets its memory, not the gradient. 0: all at once."""
    noise_rows: int = 0
    """Images of the global batch that share one noise tensor (train_dist.py: --nrows); 0: all of them."""
    init: str = "bos"
    """Start of the tokens: bos (copies of the empty prompt's first encoding, as official for SD1.5), normal
    (as official for SDXL and SD3), or bos+noise (copies of equal start never separate: they stay one
    token)."""
    init_noise: float = 0.02
    """Standard deviation of init normal and of the table; for bos+noise in units of the encoding's own.
    Source: 0.02 in transformer.py."""
    hard_negatives: int = 0
    """False captions from the dataset that join each image's candidates. 0: the other captions of the batch
    only.
    """

    def __post_init__(self) -> None:
        require(self.num_tokens >= 1, f"softrepa.num_tokens must be >= 1, got {self.num_tokens}")
        require(
            len(self.stages) == 3 and set(self.stages) <= set("TF"),
            f"softrepa.stages must be three letters T or F (down, mid, up), got {self.stages!r}",
        )
        require("T" in self.stages, "softrepa.stages FFF would put the tokens nowhere; name one stage with T")
        require(
            self.num_layers >= 1 or self.num_layers == -1,
            f"softrepa.num_layers must be >= 1, or -1 for all blocks, got {self.num_layers}",
        )
        one_of("softrepa.token_space", self.token_space, ("text", "projected"))
        require(
            0 <= self.min_t < self.max_t <= NUM_TRAIN_TIMESTEPS,
            f"softrepa.min_t and softrepa.max_t must be 0 <= min_t < max_t <= {NUM_TRAIN_TIMESTEPS}, "
            f"got {self.min_t} and {self.max_t}",
        )
        for key in ("temperature", "logit_scale"):
            require(getattr(self, key) > 0, f"softrepa.{key} must be > 0, got {getattr(self, key)}")
        for key in ("dweight", "pair_chunk", "noise_rows", "hard_negatives", "init_noise"):
            require(getattr(self, key) >= 0, f"softrepa.{key} must be >= 0, got {getattr(self, key)}")
        one_of("softrepa.init", self.init, ("bos", "normal", "bos+noise"))

    def check_train(self, train: TrainSettings) -> None:
        """UserError if a batch holds no caption to contrast with."""
        require(
            train.batch_size >= 2 or self.hard_negatives > 0,
            f"softrepa contrasts captions within a batch: train.batch_size must be >= 2, got "
            f"{train.batch_size} (or softrepa.hard_negatives >= 1)",
        )
