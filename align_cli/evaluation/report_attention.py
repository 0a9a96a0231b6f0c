"""The report's section of attention: every shown prompt arm by arm, its words as heat on the pictures. No
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from align_cli.errors import UserError
from align_cli.evaluation.heat import heat, note_of
from align_cli.evaluation.maps import read_maps, relative
from align_cli.evaluation.markup import Html, count, interval, number, p_value, plural, signed, tag
from align_cli.evaluation.report_parts import num_head, nums, row_head, section, table
from align_cli.evaluation.report_pictures import LOSSLESS, TYPE, webp
from align_cli.evaluation.report_words import verdict_kind, verdict_text
from align_cli.evaluation.store import read_picture

SHOWN = 24
"""Prompts that are shown; the maps of all are in the run's folder."""
NAMES = {"attention/inside": "on the thing", "attention/area": "area of the thing"}


def attention(results: Mapping[str, Any], folder: Path) -> Html | None:
    """Nothing for a run without --attention. folder: what the paths in results.json start from."""
    found = results.get("attention")
    if not found:
        return None
    arms = [arm["name"] for arm in results["arms"]]
    shown = found["items"][:SHOWN]
    rest = len(found["items"]) - len(shown)
    words = (
        f"How much every place of a picture attends to words of its prompt: mean over the tokens, heads, "
        f"sampling steps and {found['layers']}. Heat is relative to the maximum of each map, so that its "
        f"place can be compared and not its strength. Words found by the parser {found['parser']}."
    )
    more = f" {plural(rest, 'more prompt')}: maps in the run's folder." if rest else ""
    return section(
        "attention",
        "Attention to the words",
        tag("p", words + more, class_="small"),
        _numbers(results, found),
        [_prompt(item, arms, folder) for item in shown],
    )


def _numbers(results: Mapping[str, Any], found: Mapping[str, Any]) -> list[Html] | None:
    """Differences, or means where nothing is compared; nothing where no nouns are found in pictures."""
    if not found["means"]:
        return None
    base = results["baseline"]
    if found["comparisons"]:
        head = ["Share of the attention", "Arm", "Verdict"]
        head += num_head("Difference", "95 % interval", base, "arm", "p adjusted", "n")
        body = [
            tag(
                "tr",
                row_head(NAMES[row["metric"]]),
                tag("td", row["arm"], None if row["held_out"] else tag("span", "trained on", class_="mark")),
                tag("td", verdict_text(row["verdict"]), class_=f"verdict {verdict_kind(row['verdict'])}"),
                nums(signed(row["difference"], 4), interval(row["low"], row["high"], 4)),
                nums(number(row["base"], 4), number(row["aligned"], 4), p_value(row["p_adjusted"])),
                nums(count(row["n"])),
            )
            for row in found["comparisons"]
        ]
    else:
        head = ["Share of the attention", "Arm", *num_head("Mean", "95 % interval", "n")]
        body = [
            tag(
                "tr",
                row_head(NAMES[row["metric"]]),
                tag("td", row["arm"]),
                nums(number(row["mean"], 4), interval(row["low"], row["high"], 4, sign=False)),
                nums(count(row["n"])),
            )
            for row in found["means"]
        ]
    words = (
        "On the thing: share of the attention to the words of a noun that lies on what it names, as the "
        "picture itself shows it. Area: the share of the picture that this takes, which attention without a "
        "preference would have. n: nouns that both arms show, and that are told apart. Trained on: "
        "CoMat's attribute concentration asks for this very number; a gain says that training worked, and "
        "not that pictures are better."
    )
    return [
        table(head, tag("tbody", body), caption="Attention on the thing", kind="wide"),
        tag("p", words, class_="small"),
    ]


def _prompt(item: Mapping[str, Any], arms: Sequence[str], folder: Path) -> Html:
    """A prompt with a row of pictures for every arm."""
    rows = [tag("div", _row(item, arm, folder), class_="looks") for arm in arms]
    none = None if item["words"] else tag("p", "No word that could be shown.", class_="small")
    return tag("article", tag("h3", item["prompt"]), none, rows, class_="look")


def _row(item: Mapping[str, Any], arm: str, folder: Path) -> list[Html]:
    """The picture of an arm, and its heat for each of the words."""
    try:
        picture = read_picture(folder / item["images"][arm])
        _, maps = read_maps(folder / item["files"][arm])
    except (UserError, OSError, SafetensorError):
        text = f"{arm}: {item['images'][arm]} or its maps cannot be read"
        return [tag("figure", tag("div", text, class_="missing"))]
    figures = [_figure(picture, arm, f"{arm}: {item['prompt']}")]
    for words, one, share in zip(item["words"], relative(maps), item["shares"][arm], strict=True):
        figures.append(
            _figure(heat(picture, one), note_of(words, share).text, f"{arm}: attention to {words}")
        )
    return figures


def _figure(picture: np.ndarray, caption: str, alt: str) -> Html:
    small = "pixels" if max(picture.shape[:2]) <= LOSSLESS else None
    source = f"data:{TYPE};base64,{webp(Image.fromarray(picture))}"
    image = tag("img", src=source, alt=alt, class_=small, decoding="async")
    return tag("figure", image, tag("figcaption", caption))
