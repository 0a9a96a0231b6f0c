"""A published protocol inside an evaluation: stopped and resumed, it reports what one whole run reports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from eval_helpers import CPU, MeanRed, prompt_set, quiet

from align_cli.errors import UserError
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.by_protocol import _Notes, draw_by_protocol
from align_cli.evaluation.protocols import averages, protocol, run
from align_cli.evaluation.store import Store, make_items
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings
from align_cli.training.distributed import Ranks

PARTI = protocol("textcraftor", "parti")
CHOSEN = replace(
    PARTI,
    sample=replace(PARTI.sample, steps=2),
    scorers=("red", "other"),
    matrix=frozenset({"other"}),
)
ITEMS = make_items(prompt_set(10), 1, 0)
ARMS = [Arm("base")]


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))


def drawn(model, folder: Path, ranks: Ranks | None = None):
    rewards = {"red": MeanRed(), "other": MeanRed("other")}
    store = Store(folder, {"seed": 0})
    missing = {"base": store.missing("base", ITEMS)}
    return draw_by_protocol(
        CHOSEN, model, ARMS, ITEMS, rewards, store, ranks or Ranks.alone(CPU), missing, quiet
    ), rewards


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_stopped_and_resumed(model, tmp_path):
    whole, rewards = drawn(model, tmp_path / "a")
    official = averages(CHOSEN, run(CHOSEN, model, [i.row.text for i in ITEMS], rewards))
    assert whole == {"base": official} and set(official) == {"red", "other"}
    assert len(files(tmp_path / "a")) == 11
    for name, lines, pictures in (("b", 2, 3), ("c", 3, 6), ("d", 4, 10)):
        out = shutil.copytree(tmp_path / "a", tmp_path / name)
        notes = out / "protocol" / "base.jsonl"
        text = notes.read_text().splitlines(True)
        notes.write_text("".join(text[:lines]) + text[min(lines, 3)][:20])  # the next one is cut off
        for item in ITEMS[pictures:]:
            (out / "images" / "base" / f"{item.stem}.png").unlink()
        again, rewards = drawn(model, out)
        assert again == whole
        assert files(out) == files(tmp_path / "a")
        assert rewards["red"].seen == {"b": 10, "c": 6, "d": 0}[name]


def test_other_scorers_are_asked_again(model, tmp_path):
    drawn(model, tmp_path)
    notes = tmp_path / "protocol" / "base.jsonl"
    head = json.loads(notes.read_text().splitlines()[0])
    head["scorers"]["red"]["version"] = "0"
    notes.write_text("\n".join([json.dumps(head), *notes.read_text().splitlines()[1:]]) + "\n")
    assert drawn(model, tmp_path)[1]["red"].seen == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mean_that_is_none_names_the_pictures(tmp_path, value):
    notes = _Notes(tmp_path / "base.jsonl", CHOSEN, {"red": MeanRed(), "other": MeanRed("other")})
    with pytest.raises(UserError, match=f"scorer red gave {value} for one of the pictures a/4.png to 7.png"):
        notes.add([Path(f"a/{i}.png") for i in range(4, 8)], {"other": 1.0, "red": value})


def test_one_process_only(model, tmp_path):
    ranks = Ranks.alone(CPU)
    ranks.world_size = 2
    with pytest.raises(UserError, match="one process"):
        drawn(model, tmp_path, ranks)
