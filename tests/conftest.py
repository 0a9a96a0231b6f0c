"""Fixtures that many files of tests use: tiny random models, on disk and loaded, and a tiny COCO."""

from __future__ import annotations

import os

# Bits are compared between processes here, and the number of threads is the order of sums. Set before torch
# is imported; commands that a test starts inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import load
from tiny_models import build_tiny_sd3, build_tiny_sd15, build_tiny_sdxl
from training_helpers import make_coco

from align_cli.models.base import BaseModel
from align_cli.models.loading import load_model
from align_cli.settings import DataSettings, ModelSettings


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A training may set the number of threads, and with it the order of sums; the next test has its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD1.5-type pipeline: epsilon prediction, leading spacing. Do not write into it."""
    return build_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline with velocity prediction, zero terminal SNR and trailing spacing. Do not write into
    it.
    """
    return build_tiny_sd15(
        tmp_path_factory.mktemp("models") / "tiny-v",
        prediction_type="v_prediction",
        zero_snr=True,
        spacing="trailing",
    )


@pytest.fixture(scope="session")
def make_tiny_sd15() -> Callable[..., Path]:
    """`build_tiny_sd15(folder, **options)` for tests that need another one."""
    return build_tiny_sd15


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL-type pipeline: two text encoders of widths 16 and 24. Do not write into it."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD3-type pipeline with three text encoders, 4 latent channels and 3 blocks. Do not write into
    it.
    """
    return build_tiny_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_sd3_no_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD3-type pipeline without T5, with 16 latent channels and SD3.5's double attention. Do not
    write into it.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3-no-t5"
    return build_tiny_sd3(folder, t5=False, latent_channels=16, dual=True)


@pytest.fixture
def sd15(tiny_sd15_folder: Path) -> BaseModel:
    """A fresh SD1.5-type model."""
    return load(tiny_sd15_folder)


@pytest.fixture(params=["sd15", "sd3"])
def unet_or_sd3(request: pytest.FixtureRequest, tiny_sd15_folder: Path, tiny_sd3_folder: Path) -> BaseModel:
    """A fresh model: a UNet, and a transformer on the path of a flow."""
    return load({"sd15": tiny_sd15_folder, "sd3": tiny_sd3_folder}[request.param])


@pytest.fixture(scope="session")
def make_tiny_sdxl() -> Callable[..., Path]:
    """`build_tiny_sdxl(folder, **options)` for tests that need another one."""
    return build_tiny_sdxl


@pytest.fixture(scope="session")
def make_tiny_sd3() -> Callable[..., Path]:
    """`build_tiny_sd3(folder, **options)` for tests that need another one."""
    return build_tiny_sd3


@pytest.fixture(scope="session")
def tiny_models(tiny_sd15_folder: Path, tiny_sdxl_folder: Path, tiny_sd3_folder: Path) -> dict[str, Any]:
    """One loaded model of each family, on the CPU. Change copies only."""
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return {name: load_model(ModelSettings(name=str(path), device="cpu")) for name, path in folders.items()}


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """Four pictures of 32 x 32 with five captions each. Do not write into it."""
    root = make_coco(tmp_path_factory.mktemp("data") / "coco")
    return DataSettings(name="coco", path=str(root), image_size=32)
