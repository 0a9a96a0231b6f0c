"""Where the files of a scorer are: a hub repository, a folder or one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from align_cli.errors import UserError
from align_cli.hub import fetch, reachable

WEIGHT_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


@dataclass
class Place:
    """Where one scorer looks for files.

    reward: name of the scorer, for messages. label: the place as the user or the program named it. folder: of
    this machine; file: the one file that the user named in it. repo: hub id, where there is no folder.
    """

    reward: str
    label: str
    folder: Path | None = None
    file: Path | None = None
    repo: str = ""
    _online: bool | None = field(default=None, repr=False)
    _revision: str | None = field(default=None, repr=False)

    def find(self, name: str) -> Path | None:
        """The file called `name` ("folder/file" for one in a subfolder); None if it is not there."""
        if self.folder is not None:
            return path if (path := self.folder / name).is_file() else None
        if self._online is None:
            self._online = reachable()
        found = fetch(
            self.label,
            self.repo,
            name,
            online=self._online,
            advice=f"pass a local copy with {option(self.reward)}",
            revision=self._revision,
        )
        if found is not None and "/" not in name:
            self._revision = found.parent.name  # all files of one version
        return found

    def weights(self, names: Sequence[str], what: str = "weights") -> Path:
        """The file that the user named, else the first of `names` that is there.

        Raises:
            UserError: none is there; says which files of which place, and which option.
        """
        if self.file is not None:
            return self.file
        found = next((path for name in names if (path := self.find(name)) is not None), None)
        if found is None:
            files = " or ".join(name for name in names if not name.endswith(".json"))
            raise UserError(f"{self.reward}: no {what}: {self.lacking(files)}")
        return found

    def lacking(self, files: str) -> str:
        """Words for files that are not here, and what to do."""
        if self.folder is not None:
            return f"{self.folder} holds no {files}; pass another file or folder with {option(self.reward)}"
        if self._online:
            return f"the hub's {self.repo} holds no {files}; pass a local copy with {option(self.reward)}"
        return (
            f"{files} of {self.repo} is not in the local cache and the hub cannot be reached; pass a local "
            f"copy with {option(self.reward)}"
        )


def option(reward: str) -> str:
    """The option that names other weights."""
    return f"--weights {reward}=PATH"


def place(reward: str, source: str, default: str) -> Place:
    """The place that the user named in `source`, or `default` (a hub id, or a folder) if that is "".

    Raises:
        UserError: neither a file, a folder nor a hub id.
    """
    label = source or default
    path = Path(label).expanduser()
    if path.is_dir():
        return Place(reward, label, folder=path)
    if path.is_file():
        return Place(reward, label, folder=path.parent, file=path)
    like_a_file = label.startswith((".", "~")) or path.suffix in WEIGHT_ENDINGS
    if label.count("/") == 1 and all(label.split("/")) and not like_a_file:
        return Place(reward, label, repo=label)
    raise UserError(
        f"{reward}: {label!r} is neither a file, a folder nor a hub id (org/name); check {option(reward)}"
    )


def published_source(source: str) -> str:
    """A hub id as it is; a folder of the package as "embedded:NAME"."""
    path = PurePath(source)
    return f"embedded:{path.name}" if path.is_absolute() else source
