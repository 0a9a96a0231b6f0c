"""Arms from the command line, and what their adapters were trained on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from softrepa_helpers import save_random_adapter

from align_cli.adapters import read_adapter
from align_cli.errors import UserError
from align_cli.evaluation.arms import ALIGNED, BASE, baseline, make_arms, rewards_of


@pytest.fixture(scope="module")
def adapter(tiny_sd15_folder, tmp_path_factory):
    return save_random_adapter(tmp_path_factory.mktemp("a") / "one", tiny_sd15_folder)


def test_stacks_and_names(adapter, tmp_path):
    arms = make_arms([str(adapter)], [f"half={adapter}@0.5", f"both={adapter}+{adapter}@0.2"])
    assert [arm.name for arm in arms] == [BASE, ALIGNED, "half", "both"]
    assert arms[0].adapters == () and arms[2].adapters == (f"{adapter}@0.5",)
    assert arms[3].adapters == (str(adapter), f"{adapter}@0.2")
    assert arms[3].hashes == (read_adapter(adapter)[1].sha256,) * 2
    plus = shutil.copytree(adapter, tmp_path / "a+b")
    assert make_arms([], [f"x={plus}@0.5"])[1].adapters == (f"{plus}@0.5",)
    assert [arm.name for arm in make_arms([], [])] == [BASE]


def test_what_an_arm_was_trained_on(adapter, tmp_path):
    assert [arm.trained_on for arm in make_arms([str(adapter)], [], ["clip", "clip"])] == [(), ("clip",)]
    rewarded = shutil.copytree(adapter, tmp_path / "rewarded")
    info = json.loads((rewarded / "adapter.json").read_text())
    info["config"]["softrepa"]["rewards"] = {"hpsv2": 1.0, "aesthetic": 0.0}
    (rewarded / "adapter.json").write_text(json.dumps(info))
    assert make_arms([str(rewarded)], [], ["clip"])[1].trained_on == ("hpsv2", "clip")
    one = read_adapter(adapter)[1]
    for found, names in ((["a", "b"], ("a", "b")), ("a", ("a",)), ("", ()), (3, ())):
        assert rewards_of(replace(one, config={"softrepa": {"rewards": found}})) == names


def test_bad_arms(adapter):
    for named, part in (
        ("half", "NAME=FOLDER"),
        ("=x", "cannot name an arm"),
        ("a/b=x", "cannot name an arm"),
        (f"base={adapter}", "the arm without adapters"),
        ("x=/nowhere", "does not exist"),
        (f"x={adapter}@lots", "lots"),
    ):
        with pytest.raises(UserError, match=part):
            make_arms([], [named])
    with pytest.raises(UserError, match="given twice"):
        make_arms([], [f"x={adapter}", f"x={adapter}"])
    assert baseline(["base", "half"], None) == "base"
    assert baseline(["base", "half"], "half") == "half"
    with pytest.raises(UserError, match="did you mean 'half'"):
        baseline(["base", "half"], "hafl")
