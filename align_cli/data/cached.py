"""Training from encodings that were computed once; see cache.py for their folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from align_cli import registry
from align_cli.data.base import Dataset, Example, draw_caption
from align_cli.data.cache import (
    DRAWN,
    GENERATED,
    Cache,
    differences,
    drawing_identity,
    dtype_name,
    encoder_identity,
    reading,
)
from align_cli.data.shards import READ_ERRORS, ShardReader
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, Posterior
from align_cli.settings import DataSettings


class CachedDataset:
    """The dataset that was encoded, without its pictures (layout exact: without its texts' encoders, too).

    Follows `align_cli.data.base.Dataset`. Examples have `latents` and, in layout exact, `text`. With all
    captions stored, the caption of an epoch is the one that the dataset itself would have drawn. Latents that
    a model drew for captions are `drawn`: scaled as the denoiser has them, so that their Posterior has scale
    1.
    """

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        """Open `settings.cache`.

        Raises:
            UserError: no cache, an unfinished or damaged one, or one of other data than `settings` says.
        """
        self.cache = Cache.read(Path(settings.cache).expanduser())
        about = self.cache.about
        self.drawn = about.get("pictures") == DRAWN
        now: dict[str, Any] = {"data": settings.name}
        if self.drawn:  # captions and pictures are both in the cache, whatever seed chose them
            now |= {"mixture": settings.mixture} if settings.name in GENERATED else {}
        elif settings.name in GENERATED:
            now |= {"mixture": settings.mixture, "seed": seed}
            if settings.num_examples:
                now["num_examples"] = settings.num_examples
        else:
            now |= {"image_size": settings.image_size, "interpolation": settings.interpolation}
        self._refuse(now)
        self.cache.check_whole()
        held = about["num_examples"]
        self.size = settings.num_examples or held
        if self.drawn:
            self.size = min(self.size, held)  # as of a list of prompts
        if self.size > held:
            raise UserError(
                f"data.num_examples is {self.size}, but {settings.cache} holds {held} items; leave it away, "
                "or encode more with t2ialign encode"
            )
        self.exact = about["layout"] != "captions"
        self.pictures = pictures
        index = self.cache.index
        self.source: Dataset | None = None
        if not index.items:
            wanted = replace(settings, cache="", num_examples=about["num_examples"])
            made = registry.load(registry.DATASETS, settings.name)
            self.source = made(wanted, seed=seed, split=split, pictures=False)
        self._reader = ShardReader()

    def __len__(self) -> int:
        return self.size

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Item `index`; `rng` chooses the caption as the dataset itself does."""
        latents = self._latents(index) if self.pictures else None
        if self.source is not None:
            example = self.source.get(index, rng)
            return Example(example.prompt, None, index, example.extra, latents)
        about = self.cache.index
        choices = about.items[index]
        chosen = choices[draw_caption(choices, rng) if self.cache.about["captions"] == "all" else 0]
        text = self.cache.shapes.join(self._row("captions", chosen)) if self.exact else None
        extra: dict[str, object] = {"image_id": about.ids[index]} if about.ids else {}
        return Example(about.captions[chosen], None, index, extra, latents, text)

    def fingerprint(self) -> str:
        """Of the content of the cache and of how much of it is used."""
        return sha256(f"cache-1 {self.cache.fingerprint()} {self.size}".encode()).hexdigest()[:16]

    def check_model(self, model: BaseModel) -> None:
        """UserError unless the cache was made by encoders like those of `model`.

        Their weights are compared as far as `model` holds them; if it does not hold all of them, its name
        must be that of the model that made the cache, too. Of drawn latents the family has to be the same; a
        warning says if other weights drew them, or weights of another dtype that have another name.
        """
        about = self.cache.about
        if self.drawn:
            self._check_drawn(model)
            return
        now: dict[str, Any] = {"family": model.family, "dtype": dtype_name(model.dtype)}
        if self.exact and "t5_length" in about:
            now["t5_length"] = getattr(model, "t5_length", None)
        if self.exact:
            now["text"] = reading(model)
        self._refuse(now)
        found = encoder_identity(model, text=self.exact)
        named = {} if found.keys() >= about["encoders"].keys() else {"model_id": model.model_id}
        self._refuse({"encoders": found, **named})

    def _check_drawn(self, model: BaseModel) -> None:
        about = self.cache.about
        self._refuse({"family": model.family})
        now: dict[str, Any] = {"model_id": model.model_id}
        if about["dtype"] == dtype_name(model.dtype):
            now = {"encoders": drawing_identity(model)}
        if found := differences(about, now):
            warnings.warn(
                f"the latents in {self.cache.folder} were drawn by another model than is trained: "
                f"{'; '.join(found)}",
                stacklevel=3,
            )

    def _refuse(self, now: Mapping[str, Any]) -> None:
        if found := differences(self.cache.about, now):
            raise UserError(
                f"the encodings in {self.cache.folder} do not fit this run: they were made with "
                f"{'; '.join(found)}; encode again, or give the settings that they were made with"
            )

    def _latents(self, index: int) -> Posterior:
        row, about = self._row("images", index), self.cache.about
        if "sample" in row:
            return Posterior(row["sample"], None, about["scale"], about["shift"])
        return Posterior(row["mean"], row["std"], about["scale"], about["shift"])

    def _row(self, kind: str, index: int) -> dict[str, Tensor]:
        shard, row = self.cache.place(kind, index)
        path = self.cache.folder / shard.name
        try:
            return self._reader.row(path, row)
        except READ_ERRORS as error:
            raise UserError(
                f"shard {path} cannot be read ({error}); look at the whole cache with: "
                f"t2ialign encode --verify --out {self.cache.folder}"
            ) from error
