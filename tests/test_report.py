"""The evaluation report as text: what it says, that it escapes everything, that it needs nothing else. What
its script does is in test_report_browser.py.
"""

from __future__ import annotations

import copy
import json
import math
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_helpers import drawn

from align_cli.errors import UserError
from align_cli.evaluation import report_charts as charts
from align_cli.evaluation.markup import Html, interval, number, p_value, percent, signed, tag
from align_cli.evaluation.report import write_report
from align_cli.evaluation.report_pictures import picture_order
from align_cli.evaluation.report_words import headlines

HOSTILE = (
    """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'"&<!--\u2028 \\"""
)


class Read(HTMLParser):
    """Elements, attributes, texts and what is inside scripts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.words: list[str] = []
        self._inside: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        self._inside = name if name not in ("script", "style") else dict(attrs).get("id") or name

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.scripts[str(self._inside)] = self.scripts.get(str(self._inside), "") + data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts["data"])


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of pictures and its results. Do not change either."""
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, drawn(folder, 24)


def report(example: tuple[Path, dict[str, Any]], path: Path, **changes: Any) -> Read:
    folder, results = example
    write_report({**copy.deepcopy(results), **changes}, folder, path / "report.html")
    return Read((path / "report.html").read_text(encoding="utf-8"))


def test_stands_alone(example, tmp_path):
    page = report(example, tmp_path)
    names = {name for name, _ in page.elements}
    assert not names & {"link", "iframe", "object", "embed", "base"}
    for name, attributes in page.elements:
        for key in ("src", "href", "action", "data", "poster", "srcset", "background", "formaction"):
            if key in attributes:
                assert name == "a" and (attributes[key] or "").startswith("#"), (name, attributes)
        assert not any(key.startswith("on") or key == "style" for key in attributes), (name, attributes)
    assert "url(" not in page.scripts["style"] and "@import" not in page.scripts["style"]
    for text in (page.scripts["style"], page.scripts["script"]):
        assert "http:" not in text and "https:" not in text and "//" not in re.sub(r"//[^\n]*", "", text)


def test_policy_names_the_style_and_the_script(example, tmp_path):
    page = report(example, tmp_path)
    policy = next(a["content"] for n, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
    for name in ("style", "script"):
        digest = b64encode(sha256(page.scripts[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_links_lead_somewhere_and_ids_are_single(example, tmp_path):
    page = report(example, tmp_path)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for n, a in page.elements if n == "a"} <= set(ids)
    assert sum(name == "h1" for name, _ in page.elements) == 1


def test_tables_have_headers_and_names(example, tmp_path):
    page = report(example, tmp_path)
    kinds = [name for name, _ in page.elements if name in ("table", "caption")]
    assert kinds == ["table", "caption"] * (len(kinds) // 2) and kinds
    assert all(a.get("scope") in ("col", "row", "rowgroup") for n, a in page.elements if n == "th")


def test_everything_is_escaped(example, tmp_path):
    folder, results = example
    hostile = copy.deepcopy(results)
    hostile["arms"][1]["name"] = HOSTILE
    for row in [*hostile["means"], *hostile["comparisons"], *hostile["drift"]]:
        row["arm"] = HOSTILE if row["arm"] == "aligned" else row["arm"]
        row["metric"] = HOSTILE if row.get("metric") == "pickscore" else row.get("metric")
        row["group"] = [HOSTILE, HOSTILE] if row.get("group") == ["Challenge", "Basic"] else row.get("group")
        row["feature_of"] = HOSTILE
        row["verdict"] = HOSTILE
    hostile["scorers"][1] = {**dict.fromkeys(hostile["scorers"][1], HOSTILE), "metrics": [HOSTILE]}
    hostile["benchmark"] = {**hostile["benchmark"], "name": HOSTILE, "source": HOSTILE, HOSTILE: HOSTILE}
    hostile["model"] = dict.fromkeys(hostile["model"], HOSTILE)
    hostile["audit"][1] = {**hostile["audit"][1], "name": HOSTILE, "what": HOSTILE}
    hostile["audit"][1]["examples"] = [{"id": HOSTILE, "lost": HOSTILE}]
    hostile["words"] = hostile["command"] = [HOSTILE]
    item = hostile["items"][0]
    item |= {"id": HOSTILE, "prompt": HOSTILE, "groups": {HOSTILE: HOSTILE}}
    item["images"] = {"base": HOSTILE, HOSTILE: item["images"]["aligned"]}
    item["scores"] = {HOSTILE: {"base": 1.0, HOSTILE: 2.0}}
    (tmp_path / "plain").mkdir()
    plain = report(example, tmp_path / "plain")
    write_report(hostile, folder, tmp_path / "report.html")
    page = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    for name in ("script", "img", "style"):
        assert [n for n, _ in page.elements].count(name) == [n for n, _ in plain.elements].count(name), name
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert HOSTILE in "".join(page.words)
    first = page.data["items"][0]
    assert (first["id"], first["prompt"], first["groups"]) == (HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    assert first["files"][0] == HOSTILE and HOSTILE in page.data["metrics"]


def test_text_that_is_no_text_is_written(example, tmp_path):
    items = copy.deepcopy(example[1]["items"])
    items[0]["prompt"] = "half a pair \ud800 and nothing \x00"
    assert "half a pair ? and nothing" in report(example, tmp_path, items=items).data["items"][0]["prompt"]


def test_no_number_is_a_dash(example, tmp_path):
    results = copy.deepcopy(example[1])
    empty = dict.fromkeys(("mean", "low", "high", "base", "aligned", "difference", "win_rate", "sign_p"))
    for row in [*results["means"], *results["comparisons"]]:
        row |= {key: value for key, value in empty.items() if key in row}
    results["comparisons"][0] |= {"difference": math.nan, "high": math.inf, "p_adjusted": None}
    results["items"][0]["scores"]["clip"] = {"base": None, "aligned": math.nan}
    results["drift"][0] |= {"feature_distance": None, "feature_of": None, "saturation": None, "clipped": None}
    results["audit"][0] |= {"limit": None, "of": 0}
    results["items"][1]["seed"] = None
    page = report(example, tmp_path, **results)
    assert not re.search(r"\b(nan|None|null|inf)\b", page.text)
    cells = [a for n, a in page.elements if n == "td" and a.get("class") == "num none"]
    assert len(cells) > 10 and "\u2013" in page.text
    clip = page.data["metrics"].index("clip")
    assert page.data["items"][0]["scores"][clip] == [None, None]


def test_held_out_scorers_come_first_and_the_others_are_marked(example, tmp_path):
    text = report(example, tmp_path).text
    held, trained = text.index("Held-out scorers"), text.index("Scorers that an adapter was trained on")
    assert held < text.index("shapes/all", held) < text.index("pickscore", held) < trained
    assert trained < text.index("clip trained on", trained) < text.index("By group")
    assert "shapes/count" not in text[held:trained]


def test_summary_shows_the_numbers_of_the_results(example, tmp_path):
    text = report(example, tmp_path).text
    row = next(r for r in example[1]["comparisons"] if r["metric"] == "pickscore" and r["group"] is None)
    line = text[text.index("pickscore", text.index("Held-out")) :]
    line = line[: line.index("Scorers that")]
    cells = (signed(row["difference"], 2), interval(row["low"], row["high"], 2), number(row["base"], 2))
    assert row["verdict"] in line and all(cell in line for cell in cells)
    assert f"{row['up']} / {row['down']} ({percent(row['win_rate'])})" in line
    assert p_value(row["sign_p"]) in line and line.split()[-1] == str(row["n"])


def test_provenance_is_whole(example, tmp_path):
    page, results = report(example, tmp_path, extra={"protocol": "textcraftor"}), example[1]
    assert "t2ialign eval 'my prompts.txt' --adapter runs/a/adapter --vs base" in page.text
    wanted = [results["benchmark"]["fingerprint"], results["created"], *results["versions"].values()]
    wanted += [h for arm in results["arms"] for h in arm["hashes"]]
    wanted += [s[key] for s in results["scorers"] for key in ("version", "source", "preprocessing", "scale")]
    for text in [*wanted, "textcraftor", "guidance 4"]:
        assert text in page.text
    assert all(item["seed"] for item in page.data["items"])


def test_what_only_some_runs_have(example, tmp_path):
    """Floor, notes and the official table are optional in results.json."""
    row = {"metric": "hpsv2", "arm": "base", "label": "anime", "value": 0.2744, "std": 0.0021, "n": 800}
    page = report(
        example,
        tmp_path,
        official=[{**row, "how": "mean of 10 groups of 80"}, {**row, "std": None, "how": "<b>"}],
        floor={"shapes/all": 0.5},
        notes=["3 pictures are missing"],
    )
    assert "hpsv2 base anime 0.2744 0.0021 800 mean of 10 groups of 80" in page.text
    assert "hpsv2 base anime 0.2744 \u2013 800 <b>" in page.text
    assert "Floor" in page.text and "shapes/all 0.50" in page.text
    assert "Note: 3 pictures are missing" in page.text


def test_audit_names_the_lost_words(example, tmp_path):
    rows = copy.deepcopy(example[1]["audit"])
    rows[1]["examples"][0]["lost"] = "word " * 9_999
    text = report(example, tmp_path, audit=rows).text
    assert rows[1]["examples"][1]["lost"] in text and "12.5 %" in text
    assert "more characters" in text and text.count("word word") < 100
    assert "No prompt was cut" in report(example, tmp_path, audit=rows[:1]).text


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ((("gain", True), ("gain", True)), "a: better than base on all 2 held-out scorers."),
        ((("loss", True),), "a: worse than base on the held-out scorer."),
        ((("gain", False), ("no significant change", True)), "a: no significant change on the held-out"),
        ((("gain", False),), "a: every scorer was trained on, so no gain can be claimed."),
        ((("too few prompts", True), ("too few prompts", True)), "a: too few prompts to tell."),
        (
            (("gain", True), ("loss", True), ("no significant change", True)),
            "a: better on 1 and worse on 1 of 3 held-out scorers, no significant change on 1 (against base).",
        ),
    ],
)
def test_headline(verdicts, said):
    rows = [
        {"arm": "a", "metric": str(i), "group": None, "verdict": verdict, "held_out": held}
        for i, (verdict, held) in enumerate(verdicts)
    ]
    results = {
        "arms": [{"name": "base"}, {"name": "a"}],
        "baseline": "base",
        "scorers": [{"headline": str(i)} for i in range(len(rows))],
        "comparisons": rows,
    }
    assert headlines(results)[0].startswith(said)


def test_one_arm_alone(example, tmp_path):
    results = copy.deepcopy(example[1])
    results |= {"arms": results["arms"][:1], "comparisons": [], "drift": []}
    results["means"] = [row for row in results["means"] if row["arm"] == "base"]
    page = report(example, tmp_path, **results)
    assert "base: measured alone, compared with nothing." in page.text
    assert "Drift" not in page.text and page.data["arms"] == ["base"]
    row = next(r for r in results["means"] if r["metric"] == "clip" and r["group"] is None)
    assert number(row["mean"], 4) in page.text


def test_memory_has_a_unit_and_weights_a_hash(example, tmp_path):
    scorers = [s | {"weights": "ab" * 32} for s in example[1]["scorers"]]
    memory = {"process": 3 * 2**29, "gpu": 0}
    text = report(example, tmp_path, memory=memory, scorers=scorers).text
    assert "process 1,536 MiB; gpu 0 MiB" in text and "1610612736" not in text
    assert "ab" * 32 in text


def test_pictures_without_a_score_are_not_called_measured(example, tmp_path):
    results = copy.deepcopy(example[1])
    results |= {"scorers": [], "comparisons": [], "means": [], "drift": []}
    for item in results["items"]:
        item["scores"] = {}
    assert "base, aligned: drawn, not scored." in report(example, tmp_path, **results).text


def test_many_arms(tmp_path):
    results = drawn(tmp_path, 12, ("base", "aligned", "b", "c"))
    write_report(results, tmp_path, tmp_path / "report.html")
    page = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "3 arms against base" in page.text
    for name in ("aligned", "b", "c"):
        assert f"{name}: " in page.text
    assert page.data["arms"] == ["base", "aligned", "b", "c"]
    assert len(page.scripts["pictures-0"].split("\n")) == 4


# Pictures


def decoded(text: str) -> Image.Image:
    image = Image.open(BytesIO(b64decode(text)))
    assert image.format == "WEBP"
    return image


def test_small_pictures_keep_every_pixel(example, tmp_path):
    page = report(example, tmp_path)
    for i, arm in enumerate(("base", "aligned")):
        inside = np.asarray(decoded(page.scripts["pictures-5"].split("\n")[i]))
        there = np.asarray(Image.open(example[0] / f"images/{arm}/00005.png"))
        np.testing.assert_array_equal(inside, there)


def test_large_pictures_are_reduced(tmp_path):
    results = drawn(tmp_path, 4, side=400)
    Image.new("RGBA", (800, 300), (200, 30, 30, 128)).save(tmp_path / "images/base/00000.png")
    Image.new("L", (300, 1000), 77).save(tmp_path / "images/base/00001.png")
    write_report(results, tmp_path, tmp_path / "report.html")
    page = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    sizes = [decoded(page.scripts[f"pictures-{i}"].split("\n")[0]).size for i in range(3)]
    assert sizes == [(256, 96), (77, 256), (256, 256)]


def test_missing_and_broken_pictures_are_counted(example, tmp_path):
    items = copy.deepcopy(example[1]["items"])
    (example[0] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    items[0]["images"]["aligned"] = None
    items[1]["images"]["aligned"] = "nowhere.png"
    items[2]["images"]["aligned"] = "broken.png"
    del items[3]["images"]["aligned"]
    page = report(example, tmp_path, items=items)
    assert "44 pictures of 24 items" in page.text
    assert "4 pictures could not be read and are marked as missing." in page.text
    assert page.scripts["pictures-0"].endswith("\n")


def test_limit_keeps_the_first_of_every_order_and_says_so(example, tmp_path):
    folder, results = example
    whole = report(example, tmp_path)
    sizes = [len(whole.scripts[f"pictures-{i}"]) for i in range(24)]
    write_report(results, folder, tmp_path / "report.html", max_picture_bytes=sum(sizes) // 3)
    page = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    held = {int(name.removeprefix("pictures-")) for name in page.scripts if name.startswith("pictures-")}
    assert 4 <= len(held) < 12
    assert f"{2 * len(held)} pictures of {len(held)} items are embedded" in page.text
    assert "of 24 items in all" in page.text
    assert len(page.data["items"]) == 24
    gains = [x["scores"]["pickscore"]["aligned"] - x["scores"]["pickscore"]["base"] for x in results["items"]]
    assert {0, int(np.argmax(gains)), int(np.argmin(gains))} <= held


def test_order_of_pictures_takes_turns():
    items = [{"scores": {"m": {"base": 0.0, "a": x}}} for x in (0.0, 5.0, None, -7.0, 1.0)]
    # prompt order begins with 0, gain with 1, loss with 3; the baseline's scores are equal
    order = picture_order(items, ["base", "a"], "base", ["m"])
    assert order[:4] == [0, 4, 1, 3] and sorted(order) == [0, 1, 2, 3, 4]


# Files and mistakes


def test_other_format_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match="format 1, got 2"):
        report(example, tmp_path, format=2)


def test_unwritable_place_is_a_user_error(example, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*report.html: .*; make room, or choose"):
        write_report(example[1], example[0], tmp_path / "file" / "report.html")


# Markup and charts


def test_tag_escapes_texts_and_attributes():
    made = tag("p", "<b>", tag("i", 'x"&'), None, ["a", 1], class_='"<', data_x=1, hidden=True, id=None)
    assert made == '<p class="&quot;&lt;" data-x="1" hidden>&lt;b&gt;<i>x&quot;&amp;</i>a1</p>'
    assert tag("br") == "<br>" and isinstance(made, Html)


def test_numbers():
    assert number(-1234.5, 1) == "\u22121,234.5" and number(None) == number(math.nan) == "\u2013"
    assert signed(0.0004, 3) == "+0.000" and signed(-0.0004, 3) == "\u22120.000" and signed(0, 2) == "0.00"
    assert interval(-1, 2, 1) == "[\u22121.0, +2.0]" and interval(-1, math.inf) == "\u2013"
    assert p_value(0.0002) == "< 0.001" and p_value(0.25) == "0.250" and percent(0.125, 1) == "12.5 %"


def test_scale_holds_zero_and_has_round_ticks():
    scale = charts.Scale([0.02, 0.09])
    assert scale.at(0) == 0 and scale.at(0.09) < 100
    steps = np.diff(scale.ticks)
    assert len(scale.ticks) >= 3 and np.allclose(steps, steps[0])
    for low, high in ((-0.0448, 0.0438), (0, 1), (-3e-5, 2e-4), (-700, 1), (0, 0.3), (-9.9, -1)):
        assert 3 <= len(charts.Scale([low, high]).ticks) <= 8
    assert number(charts.Scale([0, 0.3]).ticks[1], charts.Scale([0, 0.3]).decimals) == "0.1"
    both = charts.Scale([-3.0, 1.0])
    assert both.at(-3.0) > 0 and both.at(-100) == 0 and 0.0 in both.ticks
    assert charts.Scale([]).at(0) == 50


def test_bar_reaches_from_zero_to_its_value():
    scale = charts.Scale([-1.0, 1.0])
    drawn_bar = charts.bar(scale, 0.5, 0.2, 0.8, "gain")
    x, width = (
        float(v) for v in re.search(r'<rect x="([\d.]+)%" y="4" width="([\d.]+)%"', drawn_bar).groups()
    )
    assert x == 50 and abs(x + width - scale.at(0.5)) < 0.01
    ends = [float(v) for v in re.search(r'<line x1="([\d.]+)%" x2="([\d.]+)%" y1="11', drawn_bar).groups()]
    np.testing.assert_allclose(ends, [scale.at(0.2), scale.at(0.8)], atol=0.01)
    assert "whisker" not in charts.bar(scale, 0.5, None, None, "gain")
    assert "rect" not in charts.bar(scale, None, None, None, "none")


def test_one_wide_interval_does_not_squeeze_the_rest():
    scale = charts.difference_scale([(0.1, 0.05, 0.15), (0.12, 0.1, 0.14), (0.1, -90.0, 90.0)])
    assert scale.at(0.1) - scale.at(0) > 5
    wide = charts.bar(scale, 0.1, -90.0, 90.0, "none")
    assert 'x1="0.00%" x2="100.00%"' in wide and wide.count("whisker") == 1
