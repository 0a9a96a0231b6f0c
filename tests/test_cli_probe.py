"""`t2ialign eval dpt-probe`: the command on tiny models, and the one line that answers a mistake."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import ok, refused
from dpt_files import SMALL, lora
from refcoco_files import make_refcoco
from softrepa_helpers import save_random_adapter

from align_cli import config
from align_cli.adapters import save_adapter
from align_cli.methods.dpt.method import DPT
from align_cli.models.loading import load_model
from align_cli.pictures import read_metadata

PROBE = ("eval", "dpt-probe")
QUICK = ("--n", 12, "--gallery", 5, "--device", "cpu")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(folder: Path, model: object, seed: int, stage: str = "probe", **flags: object) -> Path:
    """A random adapter of DPT as a run leaves it."""
    given: dict[str, Any] = {f"dpt.{key}": x for key, x in SMALL.items()}
    given |= {"model.name": str(model), "model.device": "cpu", "dpt.stage": stage, **flags}
    resolved = config.resolve("dpt", preset="none", flags=given)
    method = DPT(load_model(resolved.model), resolved.method_config, seed=seed)
    if method.lora is not None:
        method.lora.load_state(lora(method.model.denoiser))
    save_adapter(folder, method, resolved.to_dict(), resolved.origin, stage=stage)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_sd15_folder, tiny_sdxl_folder, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "sd15": save(root / "run-15" / "adapter", tiny_sd15_folder, 0),
        "tuned": save(root / "tuned", tiny_sd15_folder, 1, "tune", **{"dpt.eval_timestep": 250}),
        "sdxl": save(root / "xl", tiny_sdxl_folder, 2),
        "softrepa": save_random_adapter(root / "softrepa", tiny_sd15_folder),
    }


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory) -> Path:
    return make_refcoco(tmp_path_factory.mktemp("data") / "dpt", num=3)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_alone(adapters, tmp_path):
    said = ok(*PROBE, "--adapter", adapters["sd15"], *QUICK, "--out", "e").stdout
    assert "run-15: matching/overall" in said and "guessing gives 0.500" in said
    assert "* grounding/iou" in said and "giou-at-10" in said and "floor: guessing" in said
    assert "2 items are left out of retrieval: galleries are of 5 items each" in said
    raw = read(tmp_path / "e")
    means = {row["metric"]: row for row in raw["means"]}
    assert set(means) == set(raw["floor"]) and len(means) == 12
    assert means["matching/text"]["n"] == 12 and means["retrieval/overall"]["n"] == 10
    assert all(row["low"] <= row["mean"] <= row["high"] for row in means.values())
    assert raw["comparisons"] == [] and raw["benchmark"]["source"] == "shapes, split test"
    assert raw["models"]["run-15"]["timestep"] == 500 and raw["gallery"] == 5
    rows = list(csv.DictReader((tmp_path / "e" / "results.csv").open()))
    assert len(rows) == 12 and {row["arm"] for row in rows} == {"run-15"}
    won = [float(row["matching/text"]) for row in rows]
    assert sum(won) / 12 == pytest.approx(means["matching/text"]["mean"])
    for row, value in zip(rows, won, strict=True):
        own, hard = (float(row[f"score/own-picture-{text}-text"]) for text in ("caption", "hard"))
        assert value == (1 if own > hard else 0 if own < hard else 0.5)
    facts = read_metadata(tmp_path / "e" / rows[0]["image"])
    assert facts["arm"] == "run-15" and rows[0]["prompt"].endswith(f"[boxes: {facts['expression']}]")
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Floor (guessing: a coin for matching" in page and 'id="pictures-11"' in page


@pytest.mark.slow
def test_several_are_compared_on_the_same_items(adapters, tmp_path):
    given = [word for name in ("sd15", "tuned", "sdxl") for word in ("--adapter", adapters[name])]
    result = ok(*PROBE, *given, *QUICK, "--out", "e", "--json", "--interval", "bootstrap")
    raw = json.loads(result.stdout)
    assert raw == read(tmp_path / "e")
    assert [arm["name"] for arm in raw["arms"]] == ["run-15", "tuned", "xl"]
    assert raw["baseline"] == "run-15" and raw["interval"] == "bootstrap"
    assert {row["arm"] for row in raw["comparisons"]} == {"tuned", "xl"}
    assert [raw["models"][name]["family"] for name in ("run-15", "tuned", "xl")] == ["sd15", "sd15", "sdxl"]
    assert any("timesteps, each as it was set up" in note and "tuned 250" in note for note in raw["notes"])
    alone = ok(*PROBE, "--adapter", adapters["tuned"], *QUICK, "--out", "alone", "--json")
    own = json.loads(alone.stdout)
    for mine, row in zip(own["items"], raw["items"], strict=True):
        assert mine["prompt"] == row["prompt"]
        for key, values in mine["scores"].items():
            assert values["tuned"] == row["scores"][key]["tuned"]
    off = ok(*PROBE, "--adapter", f"{adapters['tuned']}@0", *QUICK, "--out", "off", "--json")
    assert json.loads(off.stdout)["items"][0]["scores"] != own["items"][0]["scores"]


def test_refcoco(adapters, refcoco, tmp_path):
    args = (*PROBE, "--adapter", adapters["sd15"], "--data", "refcoco", "--data-path", refcoco)
    result = ok(*args, "--split", "val", "--n", 20, "--gallery", 0, "--out", "e", "--device", "cpu")
    raw = read(tmp_path / "e")
    n = {row["metric"]: row["n"] for row in raw["means"]}
    assert n["matching/text"] + n["grounding/iou"] == 20 and min(n.values()) > 2
    assert f"{n['matching/text']} are for matching and {n['grounding/iou']} for grounding" in result.stdout
    assert not any(name.startswith("retrieval") for name in n)
    assert raw["benchmark"]["settings"]["interpolation"] == "bilinear"


@pytest.mark.slow
def test_the_same_command_makes_it_anew(adapters, tmp_path):
    args = (*PROBE, "--adapter", adapters["sd15"], *QUICK)
    ok(*args)
    (folder,) = (tmp_path / "runs").iterdir()
    before = read(folder)
    ok(*args)
    after = read(folder)
    assert [before[key] for key in ("means", "items")] == [after[key] for key in ("means", "items")]
    assert "already holds an evaluation; replace it with --overwrite" in refused(*args, "--out", folder)
    ok(*args, "--out", folder, "--overwrite", "--seed", 5)
    assert read(folder)["items"] != before["items"]


def test_mistakes(adapters, make_tiny_sd15, refcoco, tmp_path):
    one = (*PROBE, "--adapter", adapters["sd15"])
    for args, message in (
        (PROBE, "name one with --adapter, trained with t2ialign train dpt --stage probe"),
        (
            (*PROBE, "--adapter", adapters["softrepa"]),
            "is of softrepa; eval dpt-probe needs the discriminator",
        ),
        ((*PROBE, "--adapter", "nowhere"), "nowhere"),
        ((*one, "--model", "sd15"), "--model means nothing to eval dpt-probe; every adapter brings its base"),
        ((*one, "--arm", "a=b"), "--arm means nothing to eval dpt-probe"),
        ((*one, "--steps", 3), "--steps means nothing to eval dpt-probe"),
        ((*one, "--self-correct", 0.5), "--self-correct means nothing to eval dpt-probe"),
        ((*one, "--text", "segments"), "--text means nothing to eval dpt-probe"),
        ((*one, "--resume"), "--resume means nothing to eval dpt-probe"),
        ((*one, "--kind", "pair"), "--kind means nothing to eval dpt-probe"),
        ((*one, "--batch-size", 0), "--batch-size must be >= 1, got 0"),
        ((*one, "--data", "coco"), "unknown dataset 'coco'"),
        ((*one, "--data", "refcoco"), "the refcoco dataset needs --data-path"),
        ((*one, "--data-path", refcoco), "--data-path means nothing to the shapes dataset"),
        (("eval", "shapes", "--gallery", 3), "--gallery is for t2ialign eval dpt-probe; it means nothing to"),
        (("eval", "parti", "--data", "shapes"), "--data is for t2ialign eval dpt-probe"),
    ):
        assert message in refused(*args), args
    assert not (tmp_path / "runs").exists()


def test_help_names_it():
    said = " ".join(ok("eval", "--help").stdout.split())
    assert "or dpt-probe" in said and "refcoco, shapes" in said
