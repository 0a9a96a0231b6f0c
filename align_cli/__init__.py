"""t2ialign: make text-to-image diffusion models follow their prompts, and prove it with numbers.

For Python: `load_pipeline` gives a pipeline of diffusers with trained adapters at work, `remove_adapters`
takes them off, `call_options` tells the settings that they were made for. Importing this costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align_cli.pipelines import call_options as call_options
    from align_cli.pipelines import load_pipeline as load_pipeline
    from align_cli.pipelines import remove_adapters as remove_adapters

__version__ = "0.1.0"
_LATE = frozenset({"call_options", "load_pipeline", "remove_adapters"})


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module("align_cli.pipelines"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
