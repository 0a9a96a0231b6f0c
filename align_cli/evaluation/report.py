"""The evaluation report: one HTML file that needs nothing else, no network and no server. No torch."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from align_cli.evaluation import report_attention
from align_cli.evaluation import report_parts as parts
from align_cli.evaluation.markup import Html, decimals_of, finite, plural, tag
from align_cli.evaluation.report_pictures import MAX_BYTES, SIDE, TYPE, Embedded, embed, picture_order
from align_cli.evaluation.report_words import headline_metrics, headlines
from align_cli.files import file_errors, write_text

FORMAT = 1
"""The results.json that is understood here."""


def write_report(
    results: Mapping[str, Any], folder: Path, path: Path, *, max_picture_bytes: int = MAX_BYTES
) -> None:
    """Write the report of an evaluation. Nothing in it is loaded from anywhere, and a policy in the page
    forbids it to; whatever comes from prompts, names and files is escaped.

    Args:
        results: the content of results.json, format 1. Numbers may be None or NaN: shown as a dash.
        folder: what the paths of its pictures start from.
        path: the HTML file; replaced if it is there.
        max_picture_bytes: of embedded pictures, as text. Beyond it pictures are left out (the first of every
            order of the picture grid are kept), and the report says how many.
    Raises:
        ValueError: results of another format.
        UserError: the file cannot be written.
    """
    if results.get("format") != FORMAT:
        raise ValueError(f"results.json must have format {FORMAT}, got {results.get('format')!r}")
    arms = [arm["name"] for arm in results["arms"]]
    order = picture_order(results["items"], arms, results["baseline"], headline_metrics(results))
    embedded = embed(results["items"], arms, folder, order, max_picture_bytes)
    with file_errors(f"cannot write {path}", "make room, or choose another folder with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = report_attention.attention(results, folder)
        write_text(path, page(results, embedded, seen).encode("utf-8", "replace").decode("utf-8"))


def page(results: Mapping[str, Any], embedded: Embedded, seen: Html | None) -> str:
    """The whole document. seen: the section of attention. Pictures of the grid stand at its end, one inert
    block per item: the words are there before they are read, and only those on view are ever decoded.
    """
    decimals = decimals_of(results)
    sections = [
        parts.summary(results, decimals),
        parts.official(results),
        parts.groups(results, decimals),
        parts.drift(results),
        parts.audit(results),
        seen,
        _pictures(results, embedded),
        parts.provenance(results),
    ]
    style, script = (_package_text(name) for name in ("report.css", "report.js"))
    blocks = [
        tag("script", Html("\n".join(texts)), type="text/plain", id=f"pictures-{i}")
        for i, texts in sorted(embedded.items.items())
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{_subject(results)} - t2ialign evaluation"),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        _top(sections),
        tag("main", _opening(results), sections, id="content", tabindex=-1),
        tag("script", _data(results, decimals), type="application/json", id="data"),
        blocks,
        tag("script", Html(script)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _subject(results: Mapping[str, Any]) -> str:
    return f"{results['benchmark']['name']}, {results['model']['id']}"


def _top(sections: Sequence[Html | None]) -> Html:
    """Links to the sections that are there, and the switch between light and dark."""
    names = ("summary", "official", "groups", "drift", "tokens", "attention", "pictures", "provenance")
    words = ("Summary", "Official", "Groups", "Drift", "Tokens", "Attention", "Pictures", "Provenance")
    links = [
        tag("a", word, href=f"#{name}")
        for name, word, part in zip(names, words, sections, strict=True)
        if part is not None
    ]
    switch = tag("button", "Dark", type="button", id="theme", class_="js")
    return tag("header", tag("nav", links, aria_label="Sections"), switch, class_="top")


def _opening(results: Mapping[str, Any]) -> Html:
    """What was measured, and the answer in words."""
    said = headlines(results)
    bench, model = results["benchmark"], results["model"]
    arms = ", ".join(arm["name"] for arm in results["arms"])
    facts = (
        f"{plural(bench['prompts'], 'prompt')}, {plural(results['per_prompt'], 'picture')} each per arm "
        f"({arms}), seed {results['seed']}; {model['dtype']} on {model['device']}; {results['created']}"
    )
    one = len(said) == 1
    title = said[0] if one else f"{len(said)} arms against {results['baseline']}"
    return tag(
        "div",
        tag("p", f"t2ialign evaluation: {bench['name']} on {model['id']}", class_="eyebrow"),
        tag("h1", title),
        None if one else tag("ul", [tag("li", text) for text in said], class_="said"),
        tag("ul", [tag("li", text) for text in results["words"]], class_="words"),
        tag("p", facts, class_="small"),
        [tag("p", f"Note: {note}", class_="small") for note in results.get("notes", ())],
        class_="opening",
    )


def _pictures(results: Mapping[str, Any], embedded: Embedded) -> Html:
    """The frame of the picture grid; the script fills it."""
    items, arms = results["items"], results["arms"]
    shown, whole = len(embedded.items), len(items)
    text = f"{plural(embedded.pictures, 'picture')} of {plural(shown, 'item')} are embedded in this file"
    if shown < whole:
        text += (
            f", of {whole:,} items in all: those that come first in every order below. The others would make "
            "the file too large; they lie in the run's folder under the name given in their place"
        )
    text += f", at most {SIDE} px wide or high (the originals are in the run's folder)."
    if embedded.missing:
        text += f" {plural(embedded.missing, 'picture')} could not be read and are marked as missing."
    hint = "Arrow keys go from picture to picture, Page Up and Page Down turn pages, Enter opens one."
    controls = tag(
        "form",
        tag("label", "Scorer ", tag("select", id="metric"), class_="field"),
        tag("label", "Arm ", tag("select", id="arm"), class_="field") if len(arms) > 2 else None,
        tag("label", "Order ", tag("select", id="order"), class_="field"),
        tag("label", "Group ", tag("select", id="group"), class_="field"),
        tag("label", "Search ", tag("input", type="search", id="search", autocomplete="off"), class_="field"),
        class_="controls js",
        role="search",
        aria_label="Pictures",
    )
    return _frame(text, hint, controls)


def _frame(text: str, hint: str, controls: Html) -> Html:
    """The grid's section: what is embedded, controls, grid, pages, and the place for one item at large."""
    pager = tag(
        "nav",
        tag("button", "Previous", type="button", id="previous"),
        tag("span", id="page"),
        tag("button", "Next", type="button", id="next"),
        class_="pager js",
        aria_label="Pages of pictures",
    )
    return parts.section(
        "pictures",
        "Pictures, side by side",
        tag("p", text, class_="small"),
        tag("noscript", tag("p", "Scripts are off: the picture grid cannot be shown.")),
        controls,
        tag("p", id="status", class_="small", role="status", aria_live="polite"),
        tag("p", hint, class_="small js"),
        tag("ul", id="grid", class_="grid", aria_label="Pictures"),
        pager,
        tag("dialog", id="viewer", aria_labelledby="viewer-title"),
    )


def _data(results: Mapping[str, Any], decimals: Mapping[str, int]) -> Html:
    """What the script reads, as JSON that cannot end its own element."""
    arms = [arm["name"] for arm in results["arms"]]
    items = results["items"]
    first = headline_metrics(results)
    metrics = list(dict.fromkeys([*first, *(m for item in items for m in item["scores"])]))
    held = {(row["arm"], row["metric"]): bool(row["held_out"]) for row in results["comparisons"]}
    data = {
        "arms": arms,
        "baseline": results["baseline"],
        "metrics": metrics,
        "decimals": [decimals.get(m, 3) for m in metrics],
        "trained": [[not held.get((arm, m), True) for m in metrics] for arm in arms],
        "several": results["per_prompt"] > 1,
        "type": TYPE,
        "items": [
            {
                "id": item["id"],
                "prompt": item["prompt"],
                "groups": item["groups"],
                "k": item["k"],
                "seed": item["seed"],
                "files": [item["images"].get(arm) for arm in arms],
                "scores": [[_six(item["scores"].get(m, {}).get(arm)) for arm in arms] for m in metrics],
            }
            for item in items
        ],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(text)


def _six(value: object) -> float | None:
    """Six significant figures."""
    x = finite(value)
    return None if x is None else float(f"{x:.6g}")


def _package_text(name: str) -> str:
    return files("align_cli.evaluation").joinpath("page", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content security: this style and this script run, by their hashes, and nothing else is ever loaded."""
    hashes = [b64encode(sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
