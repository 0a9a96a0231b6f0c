"""Lists of prompts with latents that a model drew for them, as CoMat's official code writes them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_cli.adapters import load_pickle
from align_cli.data.base import Example
from align_cli.data.prompts import prompt_of
from align_cli.data.records import RecordFile
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, Posterior
from align_cli.settings import DataSettings

KEY = "file_path"
"""Of the file of the latents, or of a list of files."""


class DrawnLatents(RecordFile):
    """The prompts of a JSONL file or JSON list, in its order, each with a final latent of the original model.

    Every record is an object: the prompt (data.column, else prompt, text, caption or captions) and file_path,
    one file or a list of them, of which one is drawn at every access; relative to data.images, else to the
    folder of the list. Other keys are passed over. A file holds one tensor (C, h, w), written by torch.save,
    in the scale of the denoiser; all have one shape. Nothing but tensors is unpickled. How little is kept in
    memory: see `RecordFile`.
    Source: CoMat's training_utils/gan_dataset.py and tools/gan_gt_generate.py, which passes other keys on.
    """

    kind = "latent"
    formats = (".jsonl", ".json")
    wanted = f"--data-path of the latents dataset wants a file that ends in {' or '.join(formats)}"

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        """Look through the list `settings.path`, or through its first `settings.num_examples` records, and
        whether the files are there. Without `pictures` the list need not even name them.

        `seed` has no use here: the order of the examples is the loop's.

        Raises:
            UserError: no list, no record, no prompt or file in one of them (with its number), missing files,
                a first file that holds no latent; or split val, which a list does not have.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        if split == "val" and settings.path:
            raise UserError("all of a list of latents is for training")
        self.settings, self.pictures = settings, pictures
        self.root = Path(settings.images or Path(settings.path).parent).expanduser()
        self.num_missing, self.first_missing = 0, ""
        self.looking = pictures
        super().__init__(settings.path, most=settings.num_examples)
        self.looking = False
        if self.num_missing:
            raise UserError(
                f"{self.first_missing}; {self.num_missing} files of the list are missing: name their folder "
                "with --set data.images=FOLDER, or use fewer with --set data.num_examples=N"
            )
        self.shape: tuple[int, ...] = ()
        if pictures:
            self.shape = tuple(self._latent(0, self.record(0)[1][0]).shape)

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; `rng` chooses among the files of a record.

        Raises:
            UserError: a file is gone, holds no tensor, one of another shape, or numbers that are not finite
                (names the list's line); the list has changed or is gone.
        """
        prompt, files = self.record(index)
        if not self.pictures:
            return Example(prompt=prompt, id=index)
        x = self._latent(index, files[int(rng.integers(len(files)))])
        return Example(prompt=prompt, id=index, latents=Posterior(x, None, 1.0))

    def fingerprint(self) -> str:
        """Of the bytes of the list (up to the last record that is used), of their number and the column; the
        files are not read for it.
        """
        what = ["latents-1", self.content, len(self), self.settings.column]
        return sha256(json.dumps(what).encode()).hexdigest()[:16]

    def check_model(self, model: BaseModel) -> None:
        """UserError unless `model` has latents with as many channels."""
        if self.pictures and self.shape[0] != model.latent_channels:
            raise UserError(
                f"{self.path}: the latents have {self.shape[0]} channels, those of {model.model_id} have "
                f"{model.latent_channels}; draw them with t2ialign encode --for comat --model "
                f"{model.model_id}"
            )

    def take_header(self, names: list[str], where: str) -> None:
        raise AssertionError("no table")

    def parse(self, record: Any, where: str) -> tuple[str, list[str]]:
        """The prompt, and the names of the files (none without pictures)."""
        if not isinstance(record, dict):
            raise UserError(
                f'{where}: no object; write {{"prompt": "a red circle", "{KEY}": "latents/1.pt"}}'
            )
        prompt, _ = prompt_of(record, where, self.settings.column or None)
        if not self.pictures:
            return prompt, []
        named: Any = record.get(KEY)
        files: list[Any] = named if isinstance(named, list) else [named]
        if not files or not all(
            isinstance(file, str) and file.strip() and "\0" not in file for file in files
        ):
            raise UserError(f"{where}: {KEY} is no name of a file and no list of such, but {named!r}"[:200])
        for file in files if self.looking else ():
            if not (self.root / file).is_file():
                self.num_missing += 1
                self.first_missing = self.first_missing or f"{where}: no file {self.root / file}"
        return prompt, files

    def _latent(self, index: int, file: str) -> Tensor:
        """(C, h, w) float32."""
        path = self.root / file
        try:
            x = load_pickle(path, ())
        except UserError as error:
            raise UserError(f"{self._where(index)}: {error}") from error
        wrong = ""
        if not isinstance(x, Tensor):
            wrong = f"holds a {type(x).__name__}, not a tensor"
        elif not x.is_floating_point() or x.ndim != 3 or 0 in x.shape:
            wrong = f"holds {x.dtype} of shape {list(x.shape)}, not numbers of shape [C, h, w]"
        elif self.shape and tuple(x.shape) != self.shape:
            wrong = f"holds shape {list(x.shape)}, the first one of the list has {list(self.shape)}"
        elif not torch.isfinite(x).all():
            wrong = "holds numbers that are not finite"
        if wrong:
            raise UserError(f"{self._where(index)}: {path} {wrong}; draw it again, or take it off the list")
        found: Tensor = x.detach().float()
        return found

    def _where(self, index: int) -> str:
        """ "list.jsonl, line 7": where a record stands, for an error message."""
        if self.suffix == ".json":
            return f"{self.path}, entry {index + 1}"
        with self.path.open("rb") as file:  # it was read a moment ago
            return f"{self.path}, line {len(file.read(int(self.ends[index + 1])).splitlines())}"
