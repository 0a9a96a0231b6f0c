"""Long work survives kill -9: killed at random moments and gone on with, it ends with the same bits."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from fault_helpers import Warm, leftovers, survive_kills
from PIL import Image

KILLS = 20


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as process:
        yield process


def content(folder: Path, pattern: str) -> dict[str, str]:
    """Name -> sha256 of every file."""
    found = {
        p.relative_to(folder).as_posix(): sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob(pattern)
        if p.is_file()
    }
    assert found, f"no {pattern} in {folder}"
    return found


def rows(out: Path) -> list[dict[str, object]]:
    """metrics.jsonl but for the wall clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "guard_seconds")} for row in lines]


def numbers(path: Path) -> dict[str, object]:
    """results.json but for what a clock, a command line and a folder say."""
    found = json.loads(path.read_text())
    for key in ("command", "created", "seconds", "memory"):
        del found[key]
    for arm in found["arms"]:
        del arm["adapters"]
    return found


class Killed:
    """A command that is killed and gone on with in one folder, and runs through in another."""

    def __init__(self, warm: Warm, command: list[object], begun: str, folder: Path) -> None:
        """begun: the file from which on --resume is the way to go on."""
        self.warm, self.command, self.begun = warm, command, begun
        self.whole, self.cut, self.log = folder / "whole", folder / "cut", folder / "log"

    def words(self, out: Path) -> list[object]:
        resume = ["--resume"] if (out / self.begun).exists() else []
        return [*self.command, "--out", out, *resume]

    def run(self, same: Callable[[Path, Path], None], *, seed: int, share: float = 0.6) -> None:
        """Run both. same: (cut, whole) have to be alike. share: of the seconds of the whole run, within which
        every run of the other is killed.
        """
        begun = time.monotonic()
        assert self.warm.run(self.words(self.whole), self.log) == 0, self.log.read_text()[-2000:]
        seconds = time.monotonic() - begun
        self.log.unlink()
        survive_kills(
            lambda: self.words(self.cut),
            lambda words: [self.warm.start(words, self.log)],
            self.warm.finished,
            self.cut,
            whole=lambda: same(self.cut, self.whole),
            kills=KILLS,
            window=share * seconds,
            seed=seed,
        )
        assert self.warm.run(self.words(self.cut), self.log) == 0, self.log.read_text()[-2000:]
        said = self.log.read_text()
        assert "Traceback" not in said and "error:" not in said and "damaged" not in said, said[-2000:]
        same(self.cut, self.whole)


def training(model: Path, *, steps: int = 24, batch: int = 3) -> list[object]:
    sets = {
        "data.num_workers": 0, "data.num_examples": 32, "train.log_every": 2, "train.save_every": 1,
        "sample.steps": 2, "sample.guidance": 1.0, "sample.batch_size": 8, "eval.num_prompts": 8,
        "softrepa.temperature": 0.3, "softrepa.use_t_table": "true", "train.num_threads": 1,
        "train.ema_decay": 0.9, "train.grid_every": 10, "guard.num_prompts": 10,
    }  # fmt: skip
    given = ["--model", model, "--preset", "none", "--steps", steps, "--batch-size", batch]
    return ["train", "softrepa", *given, *(w for k, v in sets.items() for w in ("--set", f"{k}={v}"))]


def assert_same_run(cut: Path, whole: Path) -> None:
    assert (cut / "adapter/adapter.safetensors").read_bytes() == (
        whole / "adapter/adapter.safetensors"
    ).read_bytes()
    assert rows(cut) == rows(whole)
    for pattern in ("grids/*.png", "best/*/state.pt"):
        assert content(cut, pattern) == content(whole, pattern)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )
    assert leftovers(cut) == leftovers(whole) == []
    assert numbers(cut / "eval/results.json")["items"] == numbers(whole / "eval/results.json")["items"]
    first, second = (json.loads((p / "result.json").read_text()) for p in (cut, whole))
    for key in ("step", "adapter_step", "last_metrics"):
        assert first[key] == second[key]


@pytest.mark.slow
def test_a_training_survives_twenty_kills(warm, tiny_sd15_folder, tmp_path):
    guard = ["--guard", "shapes", "--guard-every", 8, "--keep", "best"]
    job = Killed(warm, [*training(tiny_sd15_folder), *guard], "run.json", tmp_path)
    job.run(assert_same_run, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "log", "whole"]


@pytest.mark.slow
def test_an_encoding_survives_twenty_kills(warm, tiny_sd15_folder, tmp_path):
    sizes = ["--limit", 160, "--batch-size", 4, "--shard-items", 8]
    command = ["encode", "--model", tiny_sd15_folder, "--preset", "none", "--data", "shapes", *sizes]
    job = Killed(warm, command, "manifest.json", tmp_path)

    def same(cut: Path, whole: Path) -> None:
        assert content(cut, "*.safetensors") == content(whole, "*.safetensors")
        assert (cut / "items.json").read_bytes() == (whole / "items.json").read_bytes()
        first, second = (json.loads((p / "manifest.json").read_text()) for p in (cut, whole))
        assert first == second and first["complete"]
        assert leftovers(cut) == leftovers(whole) == [".lock"]

    job.run(same, seed=2)


@pytest.mark.slow
def test_an_evaluation_survives_twenty_kills(warm, tiny_sd15_folder, tmp_path):
    drawing = ["--n", 40, "--steps", 2, "--guidance", 1, "--batch-size", 4]
    command = ["eval", "shapes", "--model", tiny_sd15_folder, *drawing]
    job = Killed(warm, command, "eval.json", tmp_path)

    def same(cut: Path, whole: Path) -> None:
        assert content(cut, "images/*/*.png") == content(whole, "images/*/*.png")
        assert numbers(cut / "results.json") == numbers(whole / "results.json")
        assert (cut / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
        assert leftovers(cut) == leftovers(whole) == []

    job.run(same, seed=3)


@pytest.mark.slow
def test_a_list_of_edits_survives_twenty_kills(warm, tiny_sd15_folder, tmp_path):
    colours = ("green", "blue", "yellow", "white", "black", "pink", "brown", "grey")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    edits = [
        {"prompt": "a red circle", "img_path": "red.png", "tgt_prompt": f"a {x} circle"} for x in colours
    ]
    place = tmp_path / "edits.json"
    place.write_text(json.dumps(edits))
    command = ["edit", "--list", place, "--model", tiny_sd15_folder, "--steps", 6, "--n-start", 4]
    job = Killed(warm, command, "nothing", tmp_path)
    job.words = lambda out: [*command, "--out", out, *(["--resume"] if out.exists() else [])]

    def same(cut: Path, whole: Path) -> None:
        assert content(cut, "*.png") == content(whole, "*.png")
        assert leftovers(cut) == leftovers(whole) == []

    job.run(same, seed=4)


@pytest.mark.slow
def test_two_processes_that_train_together_survive_kills(warm, tiny_sd15_folder, tmp_path):
    """Both are killed at once, as a machine that goes down does it."""
    command = training(tiny_sd15_folder, steps=12, batch=4)
    job = Killed(warm, command, "run.json", tmp_path)

    def start(words) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [warm.start(words, job.log, env) for env in ranks]

    begun = time.monotonic()
    assert [warm.wait(pid) for pid in start(job.words(job.whole))] == [0, 0], job.log.read_text()[-2000:]
    seconds = time.monotonic() - begun
    survive_kills(
        lambda: job.words(job.cut), start, warm.finished, job.cut,
        whole=lambda: assert_same_run_of_two(job.cut, job.whole), kills=8, window=0.5 * seconds, seed=5,
    )  # fmt: skip
    assert [warm.wait(pid) for pid in start(job.words(job.cut))] == [0, 0], job.log.read_text()[-2000:]
    assert_same_run_of_two(job.cut, job.whole)


def assert_same_run_of_two(cut: Path, whole: Path) -> None:
    assert (cut / "adapter/adapter.safetensors").read_bytes() == (
        whole / "adapter/adapter.safetensors"
    ).read_bytes()
    assert rows(cut) == rows(whole) and leftovers(cut) == []
