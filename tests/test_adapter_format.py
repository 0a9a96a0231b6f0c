"""docs/adapter-format.md says what saved adapters hold: fields, tensors, and how to read them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from pipeline_files import CASES, save_any

from align_cli.adapters import FORMAT_VERSION, INFO, AdapterInfo, load_adapter
from align_cli.registry import METHODS

TEXT = (Path(__file__).parents[1] / "docs" / "adapter-format.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """Rows of the table below a heading."""
    part = TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def patterns(method: str, family: str) -> list[str]:
    found = []
    for name, families, tensors, _ in table("Tensors"):
        if name == method and (families == "all" or family in families.split(", ")):
            found += re.findall(r"`([^`]+)`", tensors)
    return found


def test_every_field_is_there_and_no_other():
    named = [row[0].strip("`") for row in table("adapter.json")]
    assert named == [f.name for f in fields(AdapterInfo)]
    assert f"version of this format, now {FORMAT_VERSION}" in TEXT
    assert {row[0] for row in table("Tensors")} == set(METHODS)


@pytest.mark.filterwarnings("ignore:adapter")
@pytest.mark.parametrize(("method", "family"), CASES)
def test_saved_adapters_hold_what_is_written(tiny_models, tiny_sd3_folder, tmp_path, method, family):
    for options in [{}, {"lora_rank": 2, "stage": "joint"}] if method == "textcraftor" else [{}]:
        folder = tmp_path / str(len(options))
        save_any(folder, method, tiny_models[family], tiny_sd3_folder, **options)
        adapter = load_adapter(folder)
        known = patterns(method, family)
        stray = [key for key in adapter.state if not any(fnmatchcase(key, p) for p in known)]
        assert not stray, stray[:3]
        raw = json.loads((folder / INFO).read_text())
        kinds = {"number": (int, float), "text": str, "object": dict}
        for name, kind, _ in table("adapter.json"):
            assert isinstance(raw[name.strip("`")], kinds[kind])


def test_the_code_reads_an_adapter(tiny_models, tmp_path):
    save_any(tmp_path / "adapter", "comat", tiny_models["sd15"], "")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    count = len(load_adapter(tmp_path / "adapter").state)
    assert done.stdout == f"comat sd15 {count} tensors\n", done.stderr
    file = tmp_path / "adapter" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "damaged" in done.stderr
