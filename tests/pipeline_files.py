"""One small adapter with random values for every method and family, for tests of what is done with any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comat_files import save_comat
from dpt_files import SMALL, lora
from longalign_files import save_longalign
from softrepa_helpers import save_random_adapter
from textcraftor_files import save_tuned

from align_cli import config
from align_cli.adapters import INFO, save_adapter
from align_cli.methods.dpt.method import DPT

CASES = [
    ("softrepa", "sd15"), ("softrepa", "sdxl"), ("softrepa", "sd3"),
    ("textcraftor", "sd15"), ("textcraftor", "sdxl"), ("textcraftor", "sd3"),
    ("longalign", "sd15"), ("longalign", "sdxl"),
    ("dpt", "sd15"), ("dpt", "sdxl"), ("dpt", "sd3"),
    ("comat", "sd15"), ("comat", "sdxl"), ("comat", "sd3"),
]  # fmt: skip
"""Methods and the families that they are for."""


def save_any(folder: Path, method: str, model: Any, t5: object, **options: Any) -> str:
    """An adapter folder; returns its path. t5: a pipeline's folder with the T5 that LongAlign reads on SD1.x.
    options: of TextCraftor.
    """
    if method == "softrepa":
        sets = ["softrepa.num_layers=2"] if model.family == "sd3" else ["softrepa.stages=TTF"]
        save_random_adapter(
            folder, model.model_id, *sets, "softrepa.use_t_table=true", "softrepa.init=normal"
        )
    elif method == "textcraftor":
        save_tuned(folder, model, **options)
    elif method == "comat":
        save_comat(folder, model)
    elif method == "dpt":
        _save_dpt(folder, model)
    else:
        reads = model.family == "sd15"
        save_longalign(folder, model, "reward", ("align",), adapter=reads)
        if reads:
            said = json.loads((folder / INFO).read_text())
            said["config"]["longalign"]["t5"] = str(t5)
            (folder / INFO).write_text(json.dumps(said))
    return str(folder)


def _save_dpt(folder: Path, model: Any) -> None:
    given: dict[str, Any] = {f"dpt.{key}": value for key, value in SMALL.items()}
    given |= {"model.name": model.model_id, "model.device": "cpu", "dpt.stage": "tune"}
    resolved = config.resolve("dpt", preset="none", flags=given)
    method = DPT(model, resolved.method_config)
    assert method.lora is not None
    method.lora.load_state(lora(model.denoiser))
    save_adapter(folder, method, resolved.to_dict(), resolved.origin, stage="tune")
