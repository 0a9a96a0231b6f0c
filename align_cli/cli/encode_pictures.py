"""Encoding the pictures and captions of a dataset: what `t2ialign encode` does without --for.

No torch at import.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from align_cli import config, registry
from align_cli.cli.encode import METHOD, own_preset
from align_cli.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from align_cli.data.base import Dataset
    from align_cli.data.cache import Index, Shapes
    from align_cli.data.encoding import Request, Rows
    from align_cli.models.base import BaseModel


class PictureWork:
    """See `encode_work.Work`."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def prepare(self) -> tuple[Rows, dict[str, Any]]:
        """The encoder, and what a manifest will say about it."""
        from align_cli.data.encoding import Encoder, describe, make_index, measure

        dataset = self._dataset()
        index, pixels = make_index(dataset, self.request), self._first_picture(dataset)
        model = self._model(pixels.shape[-1])
        measured = measure(model, pixels)
        about = describe(self.request, dataset, index, model, measured)
        return Encoder(model, dataset, index, measured.shapes, self.request), about

    def outline(self) -> tuple[Shapes, Index, int]:
        """Shapes, captions and number of items, if possible without a model's files."""
        from align_cli.data.cache import known_shapes
        from align_cli.data.encoding import make_index, measure

        dataset = self._dataset()
        index = make_index(dataset, self.request)
        held, pixels = self.request.model, self._first_picture(dataset)
        rows = {"clip_rows": held.segment_length} if held.text == "segments" else {}
        shapes = known_shapes(held.name, pixels.shape[-1], held.dtype, held.t5_length, held.vae, **rows)
        if shapes is None:
            shapes = measure(self._model(pixels.shape[-1]), pixels).shapes
        return shapes, index, len(dataset)

    def words(self) -> list[str]:
        """What is stored, in lines."""
        request = self.request
        again = {"all": "", "random": " in the first epoch, and later ones see the same captions again",
                 "first": ", were the first caption of each the only one"}  # fmt: skip
        same = f"the loss has the bits of encoding on the fly at the same batch size{again[request.captions]}"
        if request.model.text == "segments":  # as many rows of an encoder call as the batch has sentences
            same = f"the text is that of encoding on the fly, up to rounding{again[request.captions]}"
        if request.posterior == "sample":
            same = "all that the text encoders say is stored"
        notes = {
            "exact": f"layout exact: {same}",
            "captions": "layout captions: pictures only; training encodes the text in its loop",
        }
        drawn = {
            "mean-std": "posterior mean-std: every epoch draws its latents afresh",
            "sample": "posterior sample: one frozen draw per picture, every epoch sees the same",
        }
        return [
            f"{request.data.name} with {request.model.name}, captions: {request.captions}",
            notes[request.layout],
            drawn[request.posterior],
        ]

    def less(self) -> str:
        """What the user may do where the disk has no room."""
        from align_cli.data.filling import LESS

        return LESS

    def train_command(self, folder: Path) -> str:
        """What to type to train from encodings, with every setting of theirs that the preset has not."""
        request = self.request
        preset = own_preset(request.model.name)
        method = preset.partition("/")[0] if "/" in preset else METHOD
        found = config.resolve(method, preset=preset, flags={"model.name": request.model.name})
        words = ["t2ialign", "train", method, "--model", request.model.name]
        words += [] if "/" in preset else ["--preset", preset]
        words += ["--data", request.data.name, "--cache", str(folder)]
        generated = request.data.name == "shapes"
        sized = ("mixture", "num_examples") if generated else ("image_size", "interpolation")
        wanted = {f"model.{k}": getattr(request.model, k) for k in ("dtype", "unet", "vae", "t5_length")}
        wanted |= {f"model.{key}": value for key, value in request.model.reading_in_use().items()}
        wanted |= {f"data.{key}": getattr(request.data, key) for key in sized}
        wanted |= {"train.batch_size": request.batch_size, "train.seed": request.seed}
        own = {key: value for key, value, _ in found.values()}
        try:
            found.method_config.check_train(replace(found.train, batch_size=request.batch_size))
        except UserError:  # rows of one process of several: of these, training counts all
            del wanted["train.batch_size"]
        for key, value in wanted.items():
            if value != own[key]:
                flag = config.flag_name(key) if key.startswith("train.") else ""
                words += [flag, str(value)] if flag else ["--set", f"{key}={value}"]
        return shlex.join(words)

    def _dataset(self) -> Dataset:
        """UserError for a dataset without pictures."""
        data = self.request.data
        if data.name in registry.CAPTIONS_ONLY:
            raise registry.no_pictures(data.name, "encode stores pictures with their captions")
        table = registry.dataset_table(data.name)
        dataset: Dataset = registry.load(table, data.name)(
            replace(data, cache=""), seed=self.request.seed, split="train"
        )
        return dataset

    def _first_picture(self, dataset: Dataset) -> Tensor:
        """Pixels (3, H, W): of the size that all have."""
        from align_cli.training.order import item_rng

        pixels = dataset.get(0, item_rng(self.request.seed, 0, 0)).pixels
        assert pixels is not None
        return pixels

    def _model(self, side: int) -> BaseModel:
        """The model; UserError if it makes no pictures of this side (pixels)."""
        from align_cli.models.loading import load_model
        from align_cli.sampling import check_side
        from align_cli.training.distributed import on_rank

        model = load_model(on_rank(self.request.model), encoders_only=True)
        check_side(model, side, "--image-size")
        return model
