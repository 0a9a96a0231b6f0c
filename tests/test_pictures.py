"""PNG files, contact sheets and prompt files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from align_cli.data.prompts import read_prompts
from align_cli.errors import UserError
from align_cli.pictures import MARGIN, Note, contact_sheet, read_metadata, save_png, to_uint8, wrap


def squares(n: int, side: int = 32) -> np.ndarray:
    """(n, side, side, 3) uint8: every picture of one colour of its own, upper left pixel white."""
    out = np.zeros((n, side, side, 3), np.uint8)
    out[:] = (np.arange(n, dtype=np.uint8) * 20 + 10)[:, None, None, None]
    out[:, 0, 0] = 255
    return out


def test_to_uint8_rounds_and_clamps():
    image = np.array([0.0, 0.5, 1.0, -1.0, 2.0, 1 / 255], np.float32).reshape(1, 1, 1, 6).repeat(3, axis=1)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 128, 255, 0, 255, 1]
    assert to_uint8(image).shape == (1, 1, 6, 3)
    with pytest.raises(ValueError, match="pictures must be"):
        to_uint8(np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="pictures must be"):
        to_uint8(np.zeros((1, 4, 4, 3)))


def test_png_keeps_pixels_and_metadata(tmp_path):
    path = tmp_path / "deep" / "a.png"
    facts = {"prompt": "a red \u5706 circle", "seed": 7, "guidance": 4.5}
    save_png(squares(1)[0], path, facts)
    assert np.array_equal(np.asarray(Image.open(path)), squares(1)[0])
    assert read_metadata(path) == {"prompt": "a red \u5706 circle", "seed": "7", "guidance": "4.5"}
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        save_png(squares(1)[0], tmp_path / "file" / "a.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_png(squares(1)[0], tmp_path / "taken.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.png"]


def test_sheet_enlarges_small_pictures_by_whole_pixels(tmp_path):
    images = squares(4)
    rows = [[images[0], images[1]], [images[2], images[3]]]
    contact_sheet(rows, ["first", "second"], tmp_path / "s.png", headers=("base", "aligned"), title="t")
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    for value in (10, 30, 50, 70):
        ys, xs = np.nonzero((sheet == value).all(-1))
        assert ys.max() - ys.min() == xs.max() - xs.min() == 159  # 32 px enlarged five times
        assert len(ys) == 160 * 160 - 25  # all but the one white pixel, five by five


def test_sheet_grows_with_the_caption_and_shrinks_large_pictures(tmp_path):
    long = "in this picture there is a red circle . " * 12
    contact_sheet([[squares(1)[0]]], ["short"], tmp_path / "a.png")
    contact_sheet([[squares(1)[0]]], [long], tmp_path / "b.png")
    contact_sheet([[squares(1, 512)[0]]], ["large"], tmp_path / "c.png", notes=[[Note("wrong", False)]])
    heights = [Image.open(tmp_path / f"{n}.png").height for n in "abc"]
    assert heights[0] == 160 + 3 * MARGIN
    assert heights[1] > heights[0]
    assert 384 < heights[2] < 512


def test_sheet_rejects_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([], [], tmp_path / "a.png")
    with pytest.raises(ValueError, match="captions"):
        contact_sheet([[squares(1)[0]]], ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="captions"):
        contact_sheet([[squares(1)[0]]], ["a"], tmp_path / "a.png", notes=[[Note("x"), Note("y")]])


def test_wrap_keeps_every_letter():
    font = ImageFont.load_default(16)
    text = "a red circle left of a " + "blue" * 40 + " square"
    lines = wrap(text, 120, font)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 120 for line in lines)
    assert wrap("", 120, font) == []


def test_captions_have_no_blank_before_punctuation():
    font = ImageFont.load_default(16)
    assert wrap("a red circle , a blue square . is it ? yes !", 1000, font) == [
        "a red circle, a blue square. is it? yes!"
    ]
    assert wrap("a .5 scale :) of , , commas", 1000, font) == ["a .5 scale :) of,, commas"]


def test_prompt_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red circle\r\n\n   two blue squares \n# not a comment\n\u5706".encode())
    assert read_prompts(path) == ["a red circle", "two blue squares", "# not a comment", "\u5706"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n", "holds no prompt"),
        ("fine\ncaf\u00e9".encode("latin-1"), "line 2: not UTF-8 text"),
        ("a circle".encode("utf-16"), "line 1: not UTF-8 text"),
        ("a circle".encode("utf-16-le"), "line 1: a zero byte"),
    ],
)
def test_bad_prompt_files(tmp_path, content, message):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_missing_prompt_file(tmp_path):
    with pytest.raises(UserError, match="no prompt file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path)
