"""Drawing the captions of a dataset with the model itself: what `t2ialign encode --for comat` does.

No torch at import.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from align_cli import config, registry

if TYPE_CHECKING:
    from pathlib import Path

    from align_cli.data.base import Dataset
    from align_cli.data.cache import Index, Shapes
    from align_cli.data.drawn import DrawRequest
    from align_cli.data.encoding import Rows
    from align_cli.models.base import BaseModel


class DrawnWork:
    """See `encode_work.Work`."""

    def __init__(self, request: DrawRequest) -> None:
        self.request = request

    def prepare(self) -> tuple[Rows, dict[str, Any]]:
        """What draws, and what a manifest will say about it."""
        from align_cli.data.drawn import Drawer, describe_drawn
        from align_cli.data.encoding import make_index

        dataset = self._dataset()
        index, model = make_index(dataset, self.request), self._model()
        settings = self.request.drawing(model)
        about = describe_drawn(self.request, dataset, index, model, settings)
        return Drawer(model, index, self.request, settings), about

    def outline(self) -> tuple[Shapes, Index, int]:
        """Shapes, captions and number of items, if possible without a model's files."""
        from align_cli.data.drawn import latent_of, shapes_of
        from align_cli.data.encoding import make_index

        dataset = self._dataset()
        index, latent = make_index(dataset, self.request), self.request.known_latent()
        if latent is None:
            model = self._model(encoders_only=True)
            latent = latent_of(model, self.request.drawing(model))
        return shapes_of(latent), index, len(dataset)

    def words(self) -> list[str]:
        """What is stored, in lines."""
        request, s = self.request, self.request.sample
        flow = "; SD3 draws with euler" if request.own_sampler else ""
        other = "".join(f", {key} {name}," for key, name in request.model.others().items())
        return [
            f"{request.data.name}, drawn by {request.model.name}{other} for {request.purpose}: {s.sampler}, "
            f"{s.steps} steps, guidance {s.guidance:g}{flow}",
            f"captions: {request.captions}, one picture for each item; training encodes the text in its loop",
        ]

    def less(self) -> str:
        """What the user may do where the disk has no room."""
        return "make room, name another disk with --out, or write less: --limit N"

    def train_command(self, folder: Path) -> str:
        """What to type to train from the latents."""
        from align_cli.drawing import preset_of

        request = self.request
        words = ["t2ialign", "train", request.purpose, "--model", request.model.name]
        words += ["--unet", request.model.unet] if request.model.unet else []
        words += ["--data", request.data.name, "--cache", str(folder)]
        if request.data.name == "shapes":
            words += ["--set", f"data.mixture={request.data.mixture}"]
        own = preset_of(request.model.name, request.purpose) or ""
        preset = own if own.startswith(f"{request.purpose}/") else config.NO_PRESET
        words += ["--preset", preset] if preset == config.NO_PRESET else []
        usual = config.resolve(request.purpose, preset=preset).method_config
        words += [] if usual.latents else ["--set", f"{request.purpose}.real=stored"]
        return shlex.join(words)

    def _dataset(self) -> Dataset:
        data = self.request.data
        table = registry.dataset_table(data.name)
        dataset: Dataset = registry.load(table, data.name)(
            replace(data, cache=""), seed=self.request.seed, split="train", pictures=False
        )
        return dataset

    def _model(self, *, encoders_only: bool = False) -> BaseModel:
        from align_cli.models.loading import load_model
        from align_cli.training.distributed import on_rank

        return load_model(on_rank(self.request.model), encoders_only=encoders_only)
