"""Lists of prompts with drawn latents, in the layout of CoMat's official code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align_cli import config
from align_cli.data.base import Fitted, collate
from align_cli.data.latents import DrawnLatents
from align_cli.data.training import check_data, open_data
from align_cli.errors import UserError
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.settings import DataSettings

RNG = np.random.default_rng(0)


def latent(seed: int) -> torch.Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def root(tmp_path) -> Path:
    """latents/0.pt to 3.pt, and a list of three records as gan_gt_generate.py and its reader have them."""
    (tmp_path / "latents").mkdir()
    for i in range(4):
        torch.save(latent(i), tmp_path / "latents" / f"{i}.pt")
    records = [
        {"prompt": "a red circle", "file_path": "latents/0.pt"},
        {"prompt": "a dog", "file_path": ["latents/1.pt", "latents/2.pt"], "image": "x.png", "score": 1},
        {"prompt": "a red circle", "file_path": str(tmp_path / "latents" / "3.pt")},
    ]
    write(tmp_path, records)
    return tmp_path


def write(root: Path, records: list[object], name: str = "list.jsonl") -> Path:
    path = root / name
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    return path


def opened(root: Path, **changes) -> DrawnLatents:
    return DrawnLatents(DataSettings(name="latents", **{"path": str(root / "list.jsonl"), **changes}))


def test_records_in_order_with_one_of_their_files(root):
    data = opened(root)
    assert len(data) == 3 and data.shape == (4, 8, 8)
    examples = [data.get(i, np.random.default_rng(0)) for i in range(3)]
    assert [e.prompt for e in examples] == ["a red circle", "a dog", "a red circle"]
    found = collate(examples).latents
    assert found is not None and found.std is None and (found.scale, found.shift) == (1.0, 0.0)
    assert torch.equal(found.mean[0], latent(0)) and torch.equal(found.mean[2], latent(3))
    drawn = [data.get(1, np.random.default_rng(seed)).latents for seed in range(20)]
    seen = {next(i for i in range(4) if torch.equal(x.mean, latent(i))) for x in drawn}
    assert seen == {1, 2}


def test_a_json_list_another_column_another_root(root, tmp_path):
    path = tmp_path / "elsewhere" / "list.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"words": "a cat", "prompt": "no", "file_path": "2.pt"}]))
    data = opened(root, path=str(path), column="words", images=str(root / "latents"))
    example = data.get(0, RNG)
    assert example.prompt == "a cat" and torch.equal(example.latents.mean, latent(2))


def test_half_precision_becomes_float32(root):
    torch.save(latent(0).half(), root / "latents" / "0.pt")
    assert opened(root).get(0, RNG).latents.mean.dtype == torch.float32


def test_without_latents_the_list_need_not_name_them(root):
    write(root, [{"prompt": "a red circle"}])
    settings = DataSettings(name="latents", path=str(root / "list.jsonl"))
    assert DrawnLatents(settings, pictures=False).get(0, RNG).latents is None


def test_the_fingerprint_is_that_of_the_list(root):
    before = opened(root).fingerprint()
    assert opened(root).fingerprint() == before != opened(root, num_examples=2).fingerprint()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (["a", "b"], r"line 3: no object; write \{\"prompt\""),
        ({"text": 3, "file_path": "latents/0.pt"}, "line 3: the prompt is no text but 3"),
        ({"caption": "x"}, "line 3: file_path is no name of a file and no list of such, but None"),
        ({"prompt": "x", "file_path": []}, "line 3: file_path is no name"),
        ({"prompt": "x", "file_path": ["latents/0.pt", 3]}, "line 3: file_path is no name"),
        (
            {"prompt": "x", "file_path": "latents/9.pt"},
            "line 3: no file .*9.pt; 1 files .* data.images=FOLDER",
        ),
    ],
)
def test_bad_records_are_named_when_the_list_is_opened(root, record, said):
    write(root, [{"prompt": "a", "file_path": "latents/0.pt"}, record])
    with pytest.raises(UserError, match=said):
        opened(root)


class Code:
    """Something that runs when it is unpickled."""

    def __reduce__(self):
        return print, ("never",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            torch.zeros(1, 4, 8, 8),
            r"holds torch.float32 of shape \[1, 4, 8, 8\], not numbers of shape \[C, h",
        ),
        (torch.zeros(4, 8, 8, dtype=torch.int64), "holds torch.int64 of shape"),
        (torch.zeros(4, 16, 16), r"holds shape \[4, 16, 16\], the first one of the list has \[4, 8, 8\]"),
        (torch.full((4, 8, 8), torch.nan), "holds numbers that are not finite"),
        ({"latents": torch.zeros(4, 8, 8)}, "holds a dict, not a tensor"),
        (Code(), "is no PyTorch file that can be read safely"),
    ],
)
def test_bad_files_are_named_with_their_line(root, capsys, content, said):
    torch.save(content, root / "latents" / "3.pt")
    data = opened(root)
    with pytest.raises(UserError, match=rf"list.jsonl, line 5: .*3.pt {said}"):
        data.get(2, RNG)
    assert "never" not in capsys.readouterr().out


def test_a_file_that_is_cut_off_or_gone(root):
    data = opened(root)
    whole = (root / "latents" / "1.pt").read_bytes()
    (root / "latents" / "1.pt").write_bytes(whole[: len(whole) // 2])
    (root / "latents" / "2.pt").unlink()
    for seed in range(4):
        with pytest.raises(UserError, match=r"line 3: .*latents/(1.pt is no PyTorch|2.pt does not exist)"):
            data.get(1, np.random.default_rng(seed))


def test_no_list_no_format_no_split(root):
    with pytest.raises(UserError, match=r"no list of latents is named.*\.jsonl or \.json"):
        opened(root, path="")
    with pytest.raises(UserError, match="the name does not tell the format"):
        opened(root, path=str(root / "list.txt"))
    with pytest.raises(UserError, match="no prompt file"):
        opened(root, path=str(root / "other.jsonl"))
    settings = DataSettings(name="latents", path=str(root / "list.jsonl"))
    with pytest.raises(UserError, match="all of a list of latents is for training"):
        DrawnLatents(settings, split="val")


def test_whose_latents_they_are(root, tiny_models):
    data = opened(root)
    assert isinstance(data, Fitted)
    data.check_model(tiny_models["sd15"])
    for i in range(4):
        torch.save(torch.zeros(16, 8, 8), root / "latents" / f"{i}.pt")
    with pytest.raises(UserError, match="have 16 channels, those of .* have 4; draw them with"):
        opened(root).check_model(tiny_models["sd15"])


# ------------------------------------------------------------------ what train makes of it


def resolved(method: str, root: Path):
    flags = {"data.name": "latents", "data.path": root / "list.jsonl", "data.num_examples": 0}
    return config.resolve(method, flags=flags)


def test_methods_with_pictures_are_refused(root):
    with pytest.raises(UserError, match="the latents dataset has latents that a model drew; name another"):
        check_data(resolved("softrepa", root))


def test_methods_without_read_the_prompts_alone(root, monkeypatch):
    chosen = resolved("textcraftor", root)
    check_data(chosen)
    assert open_data(chosen).get(0, RNG).latents is None
    monkeypatch.setattr(TextCraftorConfig, "latents", True)
    assert open_data(chosen).get(0, RNG).latents is not None


def test_latents_that_the_settings_do_not_use_are_said_aloud(root, capsys):
    given = {"data.name": "latents", "data.path": str(root / "list.jsonl"), "model.name": "tiny-sd15"}
    for real, said in (("drawn", True), ("stored", False)):
        resolved = config.resolve("comat", sets=[f"comat.real={real}"], flags=given)
        example = open_data(resolved).get(0, RNG)
        assert (example.latents is None) == said
        assert ("alone with these settings, not its latents" in capsys.readouterr().err) == said
