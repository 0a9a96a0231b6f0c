"""`t2ialign edit` on tiny models: what it writes, resuming, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from softrepa_helpers import save_random_adapter
from typer.testing import CliRunner

from align_cli import editing
from align_cli.cli.edit import edit_settings
from align_cli.cli.main import app
from align_cli.data.edits import fitted_size, open_picture, read_list
from align_cli.drawing import make_plan
from align_cli.errors import UserError
from align_cli.pictures import read_metadata
from align_cli.settings import EditSettings

QUICK = ("--steps", 4, "--n-start", 2, "--device", "cpu")
PROMPTS = ("--src-prompt", "a red circle", "--tgt-prompt", "a blue circle")
SOURCE, EDITED, BOTH = (
    f"001-a-blue-circle-seed42-{kind}.png" for kind in ("source", "edited", "before-after")
)


@pytest.fixture(scope="module")
def adapter(tiny_sd15_folder, tmp_path_factory) -> Path:
    """A SoftREPA adapter with its own settings of editing."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return save_random_adapter(folder, tiny_sd15_folder, "edit.steps=5", "edit.n_start=3")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of pictures: two squares, one wide, one that is none, one cut off."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in {"one.png": (32, 32), "two.png": (40, 40), "wide.png": (96, 48)}.items():
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    (folder / "text.png").write_text("this is no picture")
    whole = (folder / "two.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def call(*args: object):
    return CliRunner().invoke(app, ["edit", *(str(a) for a in args)])


def refused(*args: object) -> str:
    """The one error line of a command that must fail with exit code 2."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "loading "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def write_list(folder: Path, content: object) -> Path:
    path = folder / "edits.json"
    path.write_text(json.dumps(content))
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def three(images) -> Path:
    """A list of three edits; the last differs in size under --keep-aspect."""
    names = ["one.png", "two.png", "wide.png"]
    targets = ["a blue circle", "a green square", "two red circles\n"]
    return write_list(
        images,
        [
            {"prompt": "a red circle", "img_path": f"./{name}", "tgt_prompt": target}
            for name, target in zip(names, targets, strict=True)
        ],
    )


# ---------------------------------------------------------------- what is written


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "v", "sdxl", "sd3"])
def test_without_an_image_the_model_draws_the_source(family, request, tmp_path):
    name = "tiny_v_folder" if family == "v" else f"tiny_{family}_folder"
    out, model = tmp_path / "out", request.getfixturevalue(name)
    result = call(*PROMPTS, "--model", model, *QUICK, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in out.iterdir()) == sorted([SOURCE, EDITED, BOTH])
    assert "draws the source from --src-prompt" in result.stderr and SOURCE in result.stderr
    assert "the last 2 of 4 steps" in result.stderr
    assert f"before and after: {out / BOTH}" in result.stdout
    facts = read_metadata(out / EDITED)
    assert (facts["prompt"], facts["source prompt"]) == ("a blue circle", "a red circle")
    assert (facts["seed"], facts["adapter"], facts["model"]) == ("42", "none", str(model))
    assert "n_start 2" in facts["editing"] and facts["source"].startswith("drawn: ")
    assert pixels(out / SOURCE).shape == pixels(out / EDITED).shape == (32, 32, 3)
    assert not np.array_equal(pixels(out / SOURCE), pixels(out / EDITED))
    # the drawn source is an ordinary picture: given as --image it is edited alike
    again = call(*PROMPTS, "--image", out / SOURCE, "--model", model, *QUICK, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    edited = next((tmp_path / "again").glob("*-edited.png"))
    assert np.array_equal(pixels(edited), pixels(out / EDITED))
    assert "sha256:" in read_metadata(edited)["source"]


def test_compare_and_adapter_hash(adapter, images, tmp_path):
    result = call(*PROMPTS, "--image", images / "one.png", "--adapter", adapter, "--device", "cpu",
                  "--compare", "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "the last 3 of 5 steps" in result.stderr and f"as adapter {adapter}" in result.stderr
    stem = "001-one-a-blue-circle-seed42"
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"{stem}-{kind}.png" for kind in ("aligned", "base", "before-after")]
    base, aligned = tmp_path / f"{stem}-base.png", tmp_path / f"{stem}-aligned.png"
    assert not np.array_equal(pixels(base), pixels(aligned))
    digest = json.loads((adapter / "adapter.json").read_text())["sha256"]
    assert read_metadata(base)["adapter"] == "none"
    assert read_metadata(aligned)["adapter"] == f"{adapter} sha256:{digest}"
    off = call(*PROMPTS, "--image", images / "one.png", "--adapter", f"{adapter}@0", "--device", "cpu",
               "--out", tmp_path / "off")  # fmt: skip
    assert off.exit_code == 0, off.stderr
    assert np.array_equal(pixels(tmp_path / "off" / f"{stem}-edited.png"), pixels(base))


def test_list(tiny_sd15_folder, three, tmp_path):
    out = tmp_path / "out"
    args = ("--list", three, "--model", tiny_sd15_folder, *QUICK)
    result = call(*args, "--out", out)
    assert result.exit_code == 0, result.stderr
    stems = [
        "001-one-a-blue-circle-seed42", "002-two-a-green-square-seed42", "003-wide-two-red-circles-seed42"
    ]  # fmt: skip
    names = [f"{stem}-{kind}.png" for stem in stems for kind in ("before-after", "edited")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "sheet.png"])
    assert f"3 edits in {out}" in result.stdout and str(out / "sheet.png") in result.stdout
    assert read_metadata(out / f"{stems[2]}-edited.png")["prompt"] == "two red circles"
    assert all(pixels(out / f"{stem}-edited.png").shape == (32, 32, 3) for stem in stems), "squeezed"
    assert "drawing edited pictures: 100 %" in result.stderr
    assert "already holds 001-one" in refused(*args, "--out", out)
    more = call(*args, "--out", tmp_path / "rows", "--batch-size", 12)
    assert more.exit_code == 0, more.stderr
    for stem in stems:
        one, two = (pixels(folder / f"{stem}-edited.png").astype(int) for folder in (out, tmp_path / "rows"))
        assert np.abs(one - two).max() <= 1


@pytest.mark.slow
def test_sizes(tiny_sd15_folder, three, tmp_path):
    args = ("--list", three, "--model", tiny_sd15_folder, *QUICK)
    for number, (flags, wide) in enumerate([
        (("--keep-aspect",), (24, 44)), (("--image-size", 16), (16, 16)), (("--image-size", -1), (48, 96)),
    ]):  # fmt: skip
        out = tmp_path / str(number)
        result = call(*args, *flags, "--batch-size", 8, "--out", out)
        assert result.exit_code == 0, result.stderr
        assert pixels(next(out.glob("003-*-edited.png"))).shape == (*wide, 3), flags
        assert next(out.glob("sheet.png"))


@pytest.mark.slow
def test_resume(tiny_sd15_folder, three, tmp_path, monkeypatch):
    args = ("--list", three, "--model", tiny_sd15_folder, *QUICK)
    assert call(*args, "--out", tmp_path / "whole").exit_code == 0
    real, calls = editing.edit, []

    def stopped(*given, **options):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **options)

    out = tmp_path / "parts"
    monkeypatch.setattr(editing, "edit", stopped)
    halted = call(*args, "--out", out)
    assert halted.exit_code == 130
    hint = f"1 of 3 edits are finished and kept; go on with the same command, --resume and --out {out}"
    assert f"stopped: {hint}" in halted.stderr
    assert len(list(out.iterdir())) == 2 and not list(out.glob(".*")), (
        "one finished edit, nothing half-written"
    )
    finished = next(out.glob("001-*-edited.png"))
    before = finished.stat().st_mtime_ns
    time.sleep(0.01)
    next(out.glob("*-before-after.png")).unlink()
    result = call(*args, "--out", out, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "1 of 3 are finished" in result.stderr
    assert len(calls) == 4 and finished.stat().st_mtime_ns == before
    for path in (tmp_path / "whole").iterdir():
        assert np.array_equal(pixels(path), pixels(out / path.name)), path.name
    done = call(*args, "--out", out, "--resume")
    assert done.exit_code == 0 and "3 of 3 are finished" in done.stderr and len(calls) == 4
    assert "another editing" in (line := refused(*args, "--out", out, "--resume", "--n-start", 3)), line
    assert "--resume" in refused(*args, "--out", out, "--resume", "--overwrite")
    assert "another dtype" in refused(*args, "--out", out, "--resume", "--dtype", "bfloat16")
    finished.write_bytes(b"no picture")
    assert "is no picture" in refused(*args, "--out", out, "--resume")
    assert "does not exist; leave --resume away" in refused(*args, "--out", tmp_path / "new", "--resume")
    assert "is not a folder" in refused(*args, "--out", finished, "--resume")


def test_a_full_disk_keeps_what_is_finished(tiny_sd15_folder, three, tmp_path, monkeypatch):
    args = ("--list", three, "--model", tiny_sd15_folder, *QUICK, "--out", tmp_path / "o")
    real, room = Image.Image.save, 3  # a picture, its sheet, a picture

    def save(self, file, *given, **options):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, file, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        result = call(*args)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert "the disk is full; make room" in line and "2 of 3 edits are finished and kept" in line
    assert "--resume" in line and len(list((tmp_path / "o").iterdir())) == 3
    done = call(*args, "--resume")
    assert done.exit_code == 0 and "2 of 3 are finished" in done.stderr
    assert len(list((tmp_path / "o").iterdir())) == 7


def test_resume_from_another_place(tiny_sd15_folder, images, tmp_path, monkeypatch):
    """The content of a picture counts, not the way to it."""
    args = (*PROMPTS, "--model", tiny_sd15_folder, *QUICK, "--out", tmp_path / "o")
    assert call(*args, "--image", images / "one.png").exit_code == 0
    monkeypatch.chdir(images)
    result = call(*args, "--image", "one.png", "--resume")
    assert result.exit_code == 0 and "1 of 1 are finished" in result.stderr


def test_resume_notices_another_picture(tiny_sd15_folder, images, tmp_path):
    picture, out = tmp_path / "mine.png", tmp_path / "out"
    args = (*PROMPTS, "--image", picture, "--model", tiny_sd15_folder, *QUICK, "--out", out)
    for name, resumed in (("one.png", ()), ("two.png", ("--resume",))):
        picture.write_bytes((images / name).read_bytes())
        result = call(*args, *resumed)
    assert result.exit_code == 2
    assert "cannot resume" in result.stderr and "made with another source" in result.stderr


def test_where_settings_come_from(adapter, tmp_path):
    """Flags above what was chosen for the adapter, above the preset of the model, above class defaults."""

    def found(model=None, adapters=(), **flags):
        return edit_settings(make_plan(model, list(adapters), {}, {}), flags)

    tiny, origin = found("tiny-sd15")
    assert origin == "preset softrepa/tiny-sd15"
    assert (tiny.steps, tiny.n_start, tiny.src_guidance, tiny.tgt_guidance) == (20, 9, 1.5, 1.0)
    assert (tiny.convention, tiny.batch_size) == ("softrepa", 64)
    assert found("tiny-sd15", n_start=3) == (replace(tiny, n_start=3), f"{origin}, with --n-start")
    sd3, origin = found("sd3")
    assert origin == "preset softrepa/sd3"
    assert (sd3.steps, sd3.n_start, sd3.src_guidance, sd3.tgt_guidance, sd3.image_size) == (
        50,
        30,
        3.5,
        9,
        1024,
    )
    assert found("sd15") == (EditSettings(), "the defaults")  # its preset says nothing about editing
    recorded, origin = found(adapters=[str(adapter)], tgt_guidance=2.0)
    assert (recorded.steps, recorded.n_start, recorded.tgt_guidance) == (5, 3, 2.0)
    assert origin == f"adapter {adapter}, with --tgt-guidance"
    silent = shutil.copytree(adapter, tmp_path / "silent")  # nobody chose
    info = json.loads((silent / "adapter.json").read_text())
    info["origin"] = dict.fromkeys(info["origin"], "default")
    (silent / "adapter.json").write_text(json.dumps(info | {"model_id": "tiny-sd15"}))
    assert found(adapters=[str(silent)]) == (tiny, "preset softrepa/tiny-sd15")
    with pytest.raises(UserError, match=r"edit.n_start is that of preset softrepa/sd3: give --n-start, too"):
        found("sd3", steps=4)
    with pytest.raises(UserError, match=r"at most edit.steps \(4\), got 5$"):
        found("sd3", steps=4, n_start=5)


@pytest.mark.slow
def test_default_folder_and_seed(tiny_sd15_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = (*PROMPTS, "--model", tiny_sd15_folder, *QUICK)
    for seed in (1, 2):
        assert call(*args, "--seed", seed).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edits", "edits-2"]
    one = pixels(tmp_path / "edits" / EDITED.replace("42", "1"))
    assert not np.array_equal(one, pixels(tmp_path / "edits-2" / EDITED.replace("42", "2")))


@pytest.mark.slow
def test_the_real_command_on_the_embedded_model(tmp_path):
    """The line of the issue: two prompts are enough."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "align_cli", "edit", "--src-prompt", "a red circle", "--tgt-prompt",
               "a blue circle", "--steps", "6", "--n-start", "2", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == sorted([SOURCE, EDITED, BOTH])
    assert pixels(out / BOTH).shape[1] > 600
    assert "drawing source: 100 %" in done.stderr and "drawing edited pictures: 100 %" in done.stderr


# ---------------------------------------------------------------- mistakes


def test_bad_prompts_and_pictures(images, tmp_path):
    base = ("--model", "tiny-sd15", *QUICK, "--out", tmp_path / "o")
    one = (*base, "--image", images / "one.png")
    assert "--src-prompt is missing" in refused(*base)
    assert "--tgt-prompt is missing" in refused(*base, "--src-prompt", "a red circle")
    assert "--tgt-prompt is empty" in refused(*base, "--src-prompt", "a red circle", "--tgt-prompt", " ")
    assert "are the same" in refused(*one, "--src-prompt", "a red circle", "--tgt-prompt", "a red  circle ")
    assert "no.png does not exist" in refused(*base, *PROMPTS, "--image", images / "no.png")
    assert "is no image" in refused(*base, *PROMPTS, "--image", images / "text.png")
    assert "is broken" in refused(*base, *PROMPTS, "--image", images / "cut.png")
    assert "is a folder" in refused(*base, *PROMPTS, "--image", images)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(deep)
    assert "more than 8 bits" in refused(*base, *PROMPTS, "--image", deep)
    assert not (tmp_path / "o").exists()


def test_a_picture_that_may_not_be_read(images, monkeypatch):
    def forbidden(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(UserError, match=r"one.png cannot be read: Permission denied$"):
        open_picture(images / "one.png")


def test_bad_settings(tiny_sd15_folder, adapter, images, tmp_path):
    base = (*PROMPTS, "--model", tiny_sd15_folder, "--device", "cpu", "--out", tmp_path / "o")
    assert "edit.n_start must be at most edit.steps (4), got 5" in refused(
        *base, "--steps", 4, "--n-start", 5
    )
    assert "softrepa, flowedit" in refused(*base, "--convention", "ours")
    assert "at most 1000" in refused(*base, "--steps", 1001)
    assert "multiples of 4 pixels, got 30 x 30" in refused(*base, "--image-size", 30)
    assert "--adapter" in refused(*base, "--compare")
    assert "nothing" in refused(*base, "--adapter", tmp_path / "nothing")
    assert "choose one" in refused(*base, "--image-size", -1, "--keep-aspect")
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(
        *PROMPTS, "--model", tiny_sd15_folder, *QUICK, "--out", tmp_path / "file"
    )
    wide = write_list(images, [{"prompt": "a", "img_path": "wide.png", "tgt_prompt": "b"}])
    Image.fromarray(np.zeros((30, 32, 3), np.uint8)).save(images / "odd.png")
    odd = write_list(images, [*json.loads(wide.read_text()),
                              {"prompt": "a", "img_path": "odd.png", "tgt_prompt": "b"}])  # fmt: skip
    line = refused(
        "--list", odd, "--model", tiny_sd15_folder, *QUICK, "--image-size", -1, "--out", tmp_path / "p"
    )
    assert "entry 2: " in line and "got 32 x 30 (near: 32 x 32)" in line


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_adapter_of_another_family(family, adapter, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    line = refused(*PROMPTS, "--model", folder, "--adapter", adapter, *QUICK, "--out", tmp_path / "o")
    assert "(family sd15)" in line and f"(family {family})" in line


GOOD = {"prompt": "a red circle", "img_path": "one.png", "tgt_prompt": "a blue circle"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "is an empty list"),
        ({}, "holds an object"),
        ([GOOD, "a red circle"], "entry 2: is a text"),
        ([GOOD, {"prompt": "a", "img_path": "one.png"}], "entry 2: lacks 'tgt_prompt'"),
        ([{**GOOD, "img_path": None}], "entry 1: img_path must be a text, got null"),
        ([{**GOOD, "img_path": ""}], "entry 1: img_path is empty"),
        ([GOOD, GOOD, {**GOOD, "tgt_prompt": " "}], "entry 3: tgt_prompt is empty"),
        ([GOOD, {**GOOD, "tgt_prompt": "a red circle"}], "entry 2: prompt and tgt_prompt are the same"),
        ([GOOD, {**GOOD, "img_path": "no.png"}], "entry 2: image"),
        ([GOOD, {**GOOD, "img_path": "cut.png"}], "cut.png is broken"),
    ],
)
def test_bad_lists(content, words, images, tmp_path):
    line = refused("--list", write_list(images, content), "--model", "tiny-sd15", "--out", tmp_path / "o")
    assert (words in line and "edits.json" in line) or "cut.png" in line
    assert not (tmp_path / "o").exists()


def test_bad_list_files(images, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"prompt": ')
    assert "is not valid JSON" in refused("--list", broken)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "is not valid JSON" in refused("--list", broken)
    assert "no list" in refused("--list", tmp_path / "none.json")
    assert "cannot read the list" in refused("--list", tmp_path)
    assert "leave --image" in refused("--list", write_list(images, [GOOD]), "--image", images / "one.png")


# ---------------------------------------------------------------- pictures and sizes


def test_read_list(images):
    (request,) = read_list(write_list(images, [{**GOOD, "note": "more keys are fine"}]))
    assert asdict(request) | {"digest": "", "where": ""} == {
        "src": "a red circle", "tgt": "a blue circle", "image": images / "one.png", "size": (32, 32),
        "digest": "", "where": "",
    }  # fmt: skip


def test_open_picture(tmp_path):
    half = np.zeros((4, 8, 4), np.uint8)
    half[:, :4] = (255, 0, 0, 255)
    Image.fromarray(half).save(tmp_path / "alpha.png")
    picture = np.asarray(open_picture(tmp_path / "alpha.png"))
    assert picture.shape == (4, 8, 3)
    assert (picture[:, :4] == (255, 0, 0)).all() and (picture[:, 4:] == 255).all(), "transparent is white"
    turned = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)
    Image.fromarray(np.zeros((4, 8), np.uint8)).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png").mode == "RGB"


def test_fitted_size():
    assert fitted_size(640, 480, 1024, keep_aspect=False, factor=16) == (1024, 1024)
    assert fitted_size(640, 480, -1, keep_aspect=False, factor=16) == (640, 480)
    assert fitted_size(640, 480, 1024, keep_aspect=True, factor=16) == (1184, 880)
    assert fitted_size(1024, 1024, 1024, keep_aspect=True, factor=16) == (1024, 1024)
    assert fitted_size(5000, 10, 64, keep_aspect=True, factor=16) == (1424, 16)
