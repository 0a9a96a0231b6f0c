"""Every method on a tiny model of every family: how the tests of the matrix and of stacking make them.

Letters: B prompts, C h w latent, H W pixels.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from model_helpers import field, load
from tiny_models import build_tiny_sd3, build_tiny_sd15, build_tiny_sdxl
from torch import Tensor

from align_cli import config, registry
from align_cli.adapters import save_adapter
from align_cli.methods.base import Method
from align_cli.models.base import BaseModel
from align_cli.models.conditioning import StepText
from align_cli.models.unet import SD21_WIDTH
from align_cli.sampling import sample
from align_cli.settings import DataSettings, SampleSettings

METHODS = tuple(sorted(registry.METHODS))
FAMILIES = ("sd15", "sd21", "sdxl", "sd3")
PROMPTS = ["a red circle left of a blue square", "two green triangles"]

SMALL_LORA = {"lora_rank": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "softrepa": {"temperature": 1.0, "init": "normal", "init_noise": 0.5},
    "textcraftor": {
        "stage": "joint", "rewards": {"tiny-clip": 10.0}, "reward_preprocessing": "official", "steps": 3,
        "grad_steps": 2, "test_grad_steps": 3, **SMALL_LORA,
    },
    "longalign": {
        "t5": "embedded:tiny-t5", "token_length": 40, "adapter_width": 24, "caption_dropout": 0.0,
        **SMALL_LORA,
    },
    "dpt": {
        "stage": "tune", "hidden_dim": 16, "num_heads": 4, "feedforward_dim": 24, "num_matching_queries": 3,
        "num_grounding_queries": 5, "phrase_dim": 8, "phrase_encoder": "embedded:tiny-roberta", **SMALL_LORA,
    },
    "comat": {
        "rewards": {"tiny-blip": 1.0}, "steps": 3, "grad_steps": 2, "real": "drawn", "parser": "shapes",
        "masker": "shapes", **SMALL_LORA,
    },
}  # fmt: skip
"""Small, and loud enough to be seen."""


def build_tiny(family: str, folder: Path) -> Path:
    """A random pipeline of a family on the disk; sd21 has the text width of SD2.x and predicts velocity."""
    if family == "sdxl":
        return build_tiny_sdxl(folder)
    if family == "sd3":
        return build_tiny_sd3(folder)
    v = {"width": SD21_WIDTH, "prediction_type": "v_prediction"} if family == "sd21" else {}
    return build_tiny_sd15(folder, **v)


def load_tiny(family: str, folder: Path) -> BaseModel:
    model = load(build_tiny(family, folder / family))
    assert model.family == family
    return model


def resolved(name: str, model: BaseModel, **changes: Any) -> config.Resolved:
    """The configuration of a small run of a method on a model. changes: of the method's settings."""
    settings = SETTINGS[name] | changes
    flags: dict[str, object] = {f"{name}.{key}": value for key, value in settings.items()}
    if name == "softrepa":
        flags |= {"softrepa.num_layers": -1} if model.family == "sd3" else {"softrepa.stages": "TTT"}
    flags |= {"model.name": model.model_id, "model.device": "cpu", "train.steps": 1, "train.batch_size": 2}
    flags |= {"data.name": "shapes", "train.lr": 0.05, "train.max_grad_norm": 0.0}
    return config.resolve(name, preset=config.NO_PRESET, flags=flags)


def make(name: str, model: BaseModel, *, seed: int = 0, **changes: Any) -> Method:
    """A method as the command makes it, not yet trained."""
    cls: type[Method] = registry.load(registry.METHODS, name)
    return cls(model, resolved(name, model, **changes).method_config, seed=seed)


def data(name: str, run: config.Resolved) -> Any:
    """Eight scenes of the shapes world, as the method wants them."""
    table = registry.dataset_table("shapes", grounded=run.method_config.grounded)
    return registry.load(table, "shapes")(DataSettings(num_examples=8), seed=3)


def stirred(name: str, model: BaseModel, *, seed: int = 0, size: float = 0.1, **changes: Any) -> Method:
    """A method whose trained tensors all do something."""
    method, rng = make(name, model, **changes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in method.trainables().values():
            for p in group:
                p.add_(torch.randn(p.shape, generator=rng) * size)
    return method


def saved(folder: Path, method: Method) -> str:
    run = resolved(method.name, method.model)
    save_adapter(folder, method, run.to_dict(), run.origin, stage=getattr(method.config, "stage", ""))
    return str(folder)


class Untouched:
    """What a model is before something happens to it: weights, buffers, hooks, what adapters leave at it. The
    model has drawn before, as libraries hook into their own modules at the first use.
    """

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.values = [x.clone() for x in self._values()]
        self.rest = self._rest()

    def _modules(self) -> list[torch.nn.Module]:
        return [self.model.denoiser, self.model.vae, *self.model.encoders]

    def _values(self) -> list[Tensor]:
        return [x for module in self._modules() for x in module.state_dict().values()]

    def _rest(self) -> list[object]:
        model = self.model
        parts = [part for module in self._modules() for part in module.modules()]
        hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts]
        processors = [getattr(part, "processor", None) for part in parts]
        return [hooks, processors, len(model.text_changes), len(model.critics), model.reader]

    def check(self) -> None:
        """Bit for bit as it was."""
        assert all(torch.equal(a, b) for a, b in zip(self._values(), self.values, strict=True))
        assert self._rest() == self.rest


def picture(model: BaseModel, **changes: Any) -> Tensor:
    """(B, 3, H, W) of the prompts, as `t2ialign sample` draws them with whatever is attached."""
    sampler = "euler" if model.family == "sd3" else "ddim"
    settings = SampleSettings(**{"sampler": sampler, "steps": 3, "guidance": 3.0, **changes})
    return sample(model, PROMPTS, settings, [1, 2])


def predicted(model: BaseModel) -> Tensor:
    """(2 B, C, h, w): what the denoiser says of noise at one time, of the empty prompts and of the prompts,
    read as in a path's last step.
    """
    z, t = field(4, len(PROMPTS), model.latent_channels, 8, 8), torch.tensor(401)
    with torch.no_grad():
        text = StepText(model, PROMPTS, 4)
        return torch.cat([model.predict(z, t, told(3)) for told in (text.uncond, text.cond)])


def together(model: BaseModel, *methods: tuple[Method, float]) -> Tensor:
    """`predicted` with these attached, the first innermost."""
    with ExitStack() as stack:
        for method, scale in methods:
            stack.enter_context(method.attach(model, scale))
        return predicted(model)
