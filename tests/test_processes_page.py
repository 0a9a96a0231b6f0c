"""docs/processes.md: its files are what accelerate reads, its commands are commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from cli_helpers import call
from torch.distributed.run import get_args_parser

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "processes.md").read_text()
LINES = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
COMMANDS = [line for line in LINES if line.split()[0] in ("t2ialign", "torchrun", "accelerate")]
FILES = dict(re.findall(r"`(\w+\.yaml)`[^\n]*\n\n```yaml\n(.*?)```", PAGE, re.DOTALL))
KINDS = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}


def test_the_page_is_short():
    assert PAGE.count("\n") < 170 and len(COMMANDS) == 10 and set(FILES) == {f"{name}.yaml" for name in KINDS}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_files_are_configurations_of_accelerate(name, kind, tmp_path):
    path = tmp_path / f"{name}.yaml"
    path.write_text(FILES[path.name])
    found = load_config_from_file(str(path))
    assert found.distributed_type == kind and found.num_processes == 8
    assert found.fsdp_config == ({"fsdp_version": 2} if kind == "FSDP" else {})
    assert found.deepspeed_config == ({"zero_stage": 3} if kind == "DEEPSPEED" else {})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    """Up to where processes would be started, and what a launcher is given up to what it would start."""
    words, count = shlex.split(line), 1
    if words[0] == "t2ialign":
        words, count = words[1:], int(words[-1])
    else:
        parser = get_args_parser() if words[0] == "torchrun" else launch_command_parser()
        found = parser.parse_args(words[1 if words[0] == "torchrun" else 2 :])
        assert found.module and found.training_script == "align_cli"
        words = found.training_script_args
    started = []
    name = f"align_cli.cli.{words[0]}.launched_several"
    monkeypatch.setattr(name, lambda count: started.append(count) or True)
    result = call(*words)
    assert result.exit_code == 0 and started == [count], result.output


def test_the_script_for_slurm_is_bash():
    script = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL).group(1)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
