"""Two gloo processes with half the batch each against one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import refused
from training_helpers import LinearMap, Points, scripted, settings
from two_processes import GRADIENTS, LONGALIGN, comat, dpt, longalign, shown, softrepa, textcraftor

from align_cli.errors import UserError
from align_cli.launched import is_main
from align_cli.training.distributed import Ranks, leave_group, rank_device
from align_cli.training.log import read_metrics
from align_cli.training.loop import train

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_sd15_folder) -> tuple[Path, list[dict]]:
    """The folder and the reports of both processes of two_processes.py."""
    return run_two(tmp_path_factory.mktemp("two"), str(tiny_sd15_folder))


def run_two(out: Path, *words: str) -> tuple[Path, list[dict]]:
    """Both processes to their end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        }  # fmt: skip
        command = [sys.executable, str(HERE / "two_processes.py"), str(out), *words]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    texts = []
    for process in processes:
        text, _ = process.communicate(timeout=900)
        texts.append(text.decode())
    assert [p.returncode for p in processes] == [0, 0], "\n".join(texts)
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def assert_same_gradients(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """Of every trained tensor, in the first step. tolerance: as a share of the largest gradient."""
    first, second = (torch.load(folder / GRADIENTS) for folder in (one, two))
    assert [g is None for g in first] == [g is None for g in second]
    a, b = (torch.cat([g.flatten() for g in given if g is not None]) for given in (first, second))
    largest = float(a.abs().max())
    assert largest > 0
    torch.testing.assert_close(b, a, rtol=0, atol=tolerance * largest)


def test_gather_and_average_by_hand(two):
    for rank, report in enumerate(two[1]):
        assert report["world"] == 2 and report["main"] == (rank == 0)
        assert report["gathered"] == [1, 1, 2, 2]
        assert report["own_gradient"] == ([1, 2] if rank == 0 else [3, 4])
        assert report["flags"] == [1, 2]
        assert report["p"] == [0.5, 0.5] and report["q"] == [2, 2] and report["r"] is True


def test_an_error_of_the_main_process_is_one_of_all(two):
    assert [report["error"] for report in two[1]] == ["the disk is full"] * 2


def test_processes_that_see_another_folder_say_so(two):
    for report in two[1]:
        assert "do not see the same step to go on from (0, 4); --out has to be" in report["agreed"]["differs"]
        assert report["agreed"]["same"] == 7


def test_a_tracker_leaves_the_processes_together(two):
    """What comes after it in two_processes.py works, too: averages, the end."""
    assert [report["tracked"] for report in two[1]] == [[1, 2, 3], []]


def test_the_loss_that_is_shown_is_that_of_one_process(two):
    alone = shown(Ranks(torch.device("cpu")))
    assert [report["shown"] for report in two[1]] == pytest.approx([alone, alone], rel=1e-6)


def test_two_processes_give_the_result_of_one(two, tmp_path):
    """Also after a Ctrl-C that reached the second process only, and a resume."""
    out, reports = two
    assert [r["stopped"] for r in reports] == [7, 7] and [r["step"] for r in reports] == [12, 12]
    assert [r["signal"] for r in reports] == [signal.SIGINT] * 2
    method = LinearMap()
    changes = {"log_every": 5, "accumulation": 2}
    train(method, Points(), settings(**changes), tmp_path / "one", config={"method": "linear"})
    one, both = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "one", out / "two"))
    assert [r["step"] for r in one] == [r["step"] for r in both] == [5, 10, 12]
    for a, b in zip(one, both, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
        assert b["noise"] == pytest.approx(a["noise"], abs=1e-6)
    for report in reports:
        torch.testing.assert_close(torch.tensor(report["weight"]), method.weight.detach(), rtol=0, atol=1e-6)
    assert reports[0]["weight"] == reports[1]["weight"]


def test_the_best_step_reaches_every_process(two, tmp_path):
    first, second = (report["guarded"] for report in two[1])
    assert first["kept"] == second["kept"] == 6 and first["weight"] == second["weight"]
    assert first["asked"] == 5 and second["asked"] == 0  # one process measures
    method = LinearMap()
    train(method, Points(), settings(), tmp_path, config={"method": "linear"}, guard=scripted(keep="best"))
    torch.testing.assert_close(torch.tensor(first["weight"]), method.weight.detach(), rtol=0, atol=1e-6)


def test_softrepa_on_two_processes_gives_the_result_of_one(two, tmp_path, tiny_sd15_folder):
    out, reports = two
    alone = softrepa(str(tiny_sd15_folder), tmp_path / "one")
    one, both = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "one", out / "softrepa"))
    assert_same_gradients(tmp_path / "one", out / "softrepa")
    assert one[0]["step"] == 1
    for a, b in zip(one, both, strict=True):
        for key in ("softrepa/loss", "softrepa/err_own", "grad_norm"):
            # an AdamW step is lr times a sign where the gradient is near nothing: rounding grows from there
            assert b[key] == pytest.approx(a[key], abs=1e-6 if a["step"] == 1 else 1e-5)
    assert reports[0]["softrepa"] == reports[1]["softrepa"]
    for a, b in zip(alone, reports[0]["softrepa"], strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


@pytest.mark.slow
def test_textcraftor_on_two_processes_gives_the_result_of_one(two, tmp_path, tiny_sd15_folder):
    """Also PickScore, whose mean goes over the prompts of both."""
    out, reports = two
    alone = textcraftor(str(tiny_sd15_folder), tmp_path / "one")
    one, both = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "one", out / "textcraftor"))
    assert_same_gradients(tmp_path / "one", out / "textcraftor")
    for a, b in zip(one, both, strict=True):
        for key in ("loss", "reward/tiny-clip", "reward/pickscore"):
            assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] == 1 else 1e-4)
    assert one[0]["grad_norm"] == pytest.approx(both[0]["grad_norm"], rel=1e-4)
    assert reports[0]["textcraftor"] == reports[1]["textcraftor"]
    for a, b in zip(alone, reports[0]["textcraftor"], strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def test_dpt_on_two_processes_gives_the_result_of_one(two, tmp_path, tiny_sd15_folder):
    """With dropout, and as many boxes here as there."""
    out, reports = two
    alone = dpt(str(tiny_sd15_folder), tmp_path / "one")
    one, both = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "one", out / "dpt"))
    assert_same_gradients(tmp_path / "one", out / "dpt")
    for a, b in zip(one, both, strict=True):
        for key in ("loss/i2t", "loss/t2i", "loss/denoise"):
            assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] == 1 else 1e-3)
    assert one[0]["grad_norm"] == pytest.approx(both[0]["grad_norm"], rel=1e-4)
    assert reports[0]["dpt"] == reports[1]["dpt"]
    for a, b in zip(alone, reports[0]["dpt"], strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


@pytest.mark.slow
def test_comat_on_two_processes_gives_the_result_of_one(two, tmp_path, tiny_sd15_folder):
    """With all three losses; in the first step the second process meets no noun."""
    out, reports = two
    alone = comat(str(tiny_sd15_folder), tmp_path / "one")
    one, both = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "one", out / "comat"))
    # Rounding of a whole roll-out, forward and back: 2.2e-5 was seen.
    assert_same_gradients(tmp_path / "one", out / "comat", tolerance=5e-5)
    for a, b in zip(one, both, strict=True):
        for key in (
            "loss", "loss/token", "loss/pixel", "loss/fidelity", "words/nouns", "reward/tiny-blip",
            "discriminator/loss",
        ):  # fmt: skip
            assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] == 1 else 1e-4)
        for key in ("generator/grad_norm", "discriminator/grad_norm"):  # rounding, through six guided steps
            assert b[key] == pytest.approx(a[key], rel=1e-4)
    assert one[0]["words/nouns"] == 0.5 and one[0]["loss/token"] > 0.1
    assert one[0]["generator/grad_norm"] > 1e-4 and one[0]["discriminator/grad_norm"] > 1e-4
    assert reports[0]["comat"] == reports[1]["comat"]
    for a, b in zip(alone, reports[0]["comat"], strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", LONGALIGN)
def test_longalign_on_two_processes_gives_the_result_of_one(two, tmp_path, tiny_sd15_folder, stage):
    """With every dropout; the reward's common direction goes over the captions of both."""
    out, reports = two
    alone = longalign(str(tiny_sd15_folder), tmp_path / "one", stage)
    one, both = (read_metrics(p / "metrics.jsonl") for p in (tmp_path / "one", out / stage))
    assert_same_gradients(tmp_path / "one", out / stage)
    assert len(one) == 3 and one[0]["grad_norm"] > 1e-4
    for a, b in zip(one, both, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"step", "seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] == 1 else 1e-4)
    assert reports[0][stage] == reports[1][stage]
    for a, b in zip(alone, reports[0][stage], strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5


def test_a_bad_loss_on_one_process_stops_all(two):
    for report in two[1]:
        assert "the loss is not finite at step 2" in report["bad"]


def test_one_process_needs_no_group(monkeypatch):
    ranks = Ranks(torch.device("cpu"))
    assert (ranks.rank, ranks.world_size, ranks.main) == (0, 1, True) and is_main()
    x = torch.ones(2)
    assert ranks.gather(x) is x and ranks.objects(3) == [3]
    leave_group()
    assert rank_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert rank_device("cuda") == rank_device("auto") == "cuda:2"
    assert rank_device("cuda:1") == "cuda:1" and rank_device("cpu") == "cpu"


def test_processes_and_gpus_have_to_fit(monkeypatch):
    for key, value in {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "auto"):
        with pytest.raises(UserError, match="3 processes need 3 GPUs, one each, and this machine has 2;"):
            rank_device(name)
    assert rank_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert rank_device("cuda") == "cuda:0"
    with pytest.raises(UserError, match="--device cuda:1 is one GPU, 6 processes need one each"):
        Ranks(torch.device("cuda:1"))


@pytest.mark.parametrize("words", [["edit", "--src-prompt", "a"], ["eval", "dpt-probe", "--adapter", "a"]])
def test_what_runs_in_one_process_says_so(monkeypatch, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process; start it without" in refused(*words)
