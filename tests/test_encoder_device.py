"""Text encoders and autoencoder apart from the denoiser: on another device, or resting on the CPU.

Without a GPU: fake tensors, which know devices and refuse to mix them but hold no numbers, and the meta
device, from which there is no way back, so that what has been there cannot be read any more.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from typer.testing import CliRunner

from align_cli import config
from align_cli.cli.main import app
from align_cli.cli.train_work import with_idle_encoders
from align_cli.data.cached import CachedDataset
from align_cli.data.encoding import Request
from align_cli.drawing import make_plan
from align_cli.errors import UserError
from align_cli.models import loading
from align_cli.models.loading import load_model
from align_cli.sampling import sample
from align_cli.settings import DataSettings, ModelSettings, SampleSettings
from align_cli.training import run_folder
from align_cli.training.distributed import on_rank

PROMPTS = ["a red circle left of a blue square", "two green triangles"]
FAMILIES = ("sd15", "sdxl", "sd3")
CPU, META = torch.device("cpu"), torch.device("meta")
FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")
"""Two accelerators of a kind that every build of torch knows, for fake tensors."""


@pytest.fixture(scope="module")
def folders(tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder):
    return dict(zip(FAMILIES, (tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder), strict=True))


@pytest.fixture
def meta_gpu(monkeypatch):
    """cuda:1 is the meta device."""
    real = loading.pick_device
    monkeypatch.setattr(loading, "pick_device", lambda n, *a: META if n == "cuda:1" else real(n, *a))


def load(folder, **options: str):
    return load_model(ModelSettings(name=str(folder), **{"device": "cpu", **options}))


def tensors(model) -> list[torch.Tensor]:
    """Every weight and buffer of the text encoders and the autoencoder."""
    modules = [model.vae, *model.encoders]
    return [x for module in modules for x in (*module.parameters(), *module.buffers())]


def field(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_fake(mode: FakeTensorMode, module: torch.nn.Module, device: torch.device) -> None:
    """Fakes on `device` in place of all weights and buffers."""
    fakes: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, x in held.items():
                if x is not None:
                    if x not in fakes:
                        fake = mode.from_tensor(x, static_shapes=True)
                        with mode:
                            fakes[x] = fake.to(device)
                    held[name] = fakes[x]


# ------------------------------------------------------------------ where things come back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "offload"), [("sd15", False), ("sdxl", False), ("sd3", False), ("sd3", True)]
)
def test_everything_comes_back_on_the_denoisers_device(folders, family, offload):
    model, mode = load(folders[family]), FakeTensorMode(allow_non_fake_inputs=True)
    for module in (model.vae, *model.encoders):
        make_fake(mode, module, CPU if offload else FIRST)
    model.device, model.offloaded = SECOND, offload
    held = tensors(model)
    with mode:
        cond = model.encode_text(PROMPTS)
        with torch.no_grad():
            posterior = model.posterior(torch.zeros(2, 3, 32, 32))  # pixels from the CPU
        latents = posterior.draw(torch.randn(posterior.mean.shape)).requires_grad_()
        with pytest.raises(FakeTensorDeviceMismatchError):
            model.vae.decode(latents)
        pictures = model.decode(latents)
        pictures.mean().backward()  # the weights have left by now
        found = [posterior.mean, posterior.std, latents, pictures, latents.grad, cond.tokens, cond.pooled]
        assert {x.device for x in found if x is not None} == {SECOND}
    assert pictures.dtype == cond.tokens.dtype == torch.float32
    assert {x.device for x in tensors(model)} == {CPU if offload else FIRST}
    assert all(a is b for a, b in zip(tensors(model), held, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_go_straight_to_their_own_device(folders, family, meta_gpu):
    whole = load(folders[family])
    model = load(folders[family], device="cuda:1", encoder_device="cpu")
    assert (model.device, model.encoder_device, model.offloaded) == (META, CPU, False)
    assert {p.device for p in model.denoiser.parameters()} == {META}
    for a, b in zip(tensors(model), tensors(whole), strict=True):
        assert a.device == CPU and torch.equal(a, b)  # what has been on the meta device has no numbers
    assert model.encode_text(PROMPTS).tokens.device == model.uncond(1).tokens.device == META
    assert model.encode_image(field(0, 1, 3, 32, 32)).device == META
    with torch.no_grad():
        z = field(1, 1, model.latent_channels, 8, 8)
        assert model.decode(z).device == META


# ------------------------------------------------------------------ offload


def test_offloaded_modules_rest_on_the_cpu(folders, meta_gpu):
    whole = load(folders["sd3"])
    model = load(folders["sd3"], device="cuda:1", encoder_device="offload")
    assert (model.device, model.encoder_device, model.offloaded) == (META, META, True)
    held = tensors(model)
    t5 = model.encoders[2]
    with model.at_work(*model.encoders):
        assert {p.device for e in model.encoders for p in e.parameters()} == {META}
        assert t5.shared.weight is t5.encoder.embed_tokens.weight  # shared weights come once
        assert next(model.vae.parameters()).device == CPU
    with pytest.raises(RuntimeError, match="channel"):
        model.posterior(torch.zeros(1, 5, 32, 32))
    with pytest.raises(KeyboardInterrupt), model.at_work(model.vae):
        raise KeyboardInterrupt
    for a, b, c in zip(tensors(model), held, tensors(whole), strict=True):
        assert a is b and torch.equal(a, c)


def test_what_cannot_be_copied_leaves_everything_at_rest(folders, meta_gpu, monkeypatch):
    model = load(folders["sd15"], device="cuda:1", encoder_device="offload")
    held, real, calls = tensors(model), torch.Tensor.detach, []

    def full(x):
        calls.append(x)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("out of memory")
        return real(x)

    monkeypatch.setattr(torch.Tensor, "detach", full)
    with pytest.raises(torch.OutOfMemoryError):
        model.posterior(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 9
    assert all(a is b for a, b in zip(tensors(model), held, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_offload_keeps_the_bits(folders, family):
    model = load(folders[family])

    def run():
        z = field(1, 1, model.latent_channels, 8, 8).requires_grad_()
        model.decode(z).mean().backward()
        settings = SampleSettings(steps=2, sampler="euler" if family == "sd3" else "ddim")
        cond, posterior = model.encode_text(PROMPTS), model.posterior(field(0, 1, 3, 32, 32))
        drawn = sample(model, PROMPTS, settings, [1, 2])
        return [cond.tokens, cond.pooled, posterior.mean, posterior.std, z.grad, drawn]

    expected = run()
    model.offloaded = True  # copies on the CPU of what rests on the CPU
    for a, b in zip(run(), expected, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_a_trained_text_encoder_comes_to_stay(folders, meta_gpu):
    model = load(folders["sdxl"], device="cuda:1", encoder_device="offload")
    trained, other = model.encoders
    next(trained.parameters()).requires_grad_(True)
    with torch.no_grad():
        assert not model.encode_text(PROMPTS).tokens.requires_grad
    assert {p.device for p in trained.parameters()} == {META}
    assert {p.device for m in (other, model.vae) for p in m.parameters()} == {CPU}
    tokens = model.encode_text(PROMPTS).tokens
    tokens.sum().backward()
    assert next(trained.parameters()).grad.device == META


def test_offload_on_the_cpu_is_said_to_do_nothing(folders):
    with pytest.warns(UserWarning, match="offload has no effect: the model is on the CPU"):
        model = load(folders["sd15"], encoder_device="offload")
    assert not model.offloaded and model.encoder_device == CPU


# ------------------------------------------------------------------ settings


def test_settings(monkeypatch):
    for good in ("", "cpu", "cuda", "cuda:3", "mps", "offload"):
        assert ModelSettings(encoder_device=good).encoder_device == good
    for bad in ("auto", "gpu", "cuda:x", "offload "):
        with pytest.raises(UserError, match=r"model.encoder_device must be one of cpu, cuda, .* got '"):
            ModelSettings(encoder_device=bad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda:1", "mps"):
        with pytest.raises(UserError, match=f"device {name} is not there.*--encoder-device cpu or offload"):
            load_model(ModelSettings(device="cpu", encoder_device=name))


def test_each_process_has_its_gpu_unless_one_is_named(monkeypatch):
    held = ModelSettings(device="cuda", encoder_device="cuda")
    assert on_rank(held) == held
    for key, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert on_rank(held) == replace(held, device="cuda:1", encoder_device="cuda:1")
    for name in ("", "cpu", "offload", "cuda:0"):
        assert on_rank(replace(held, encoder_device=name)).encoder_device == name


def test_where_encoders_ran_is_not_what_they_made(tmp_path):
    def request(**options: str) -> Request:
        return Request(model=ModelSettings(**options), data=DataSettings())

    assert request(device="cuda:1", encoder_device="cuda:0").to_json() == request().to_json()
    assert "model.encoder_device" in run_folder.FREE
    plan = make_plan("tiny-sd15", [], {"encoder_device": "offload"}, {})
    assert plan.model.encoder_device == "offload"


@pytest.mark.parametrize("command", ["train", "sample", "eval", "encode", "edit"])
def test_every_command_has_the_option(command, tmp_path):
    given = {
        "train": ["softrepa"],
        "sample": ["--prompt", "a red circle"],
        "eval": ["shapes"],
        "encode": [],
        "edit": ["--src-prompt", "a red circle", "--tgt-prompt", "a blue circle"],
    }[command]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [command, *given, "--encoder-device", "there", "--out", str(out)])
    assert result.exit_code == 2 and not out.exists()
    assert "model.encoder_device must be one of cpu" in result.stderr and "got 'there'" in result.stderr


# ------------------------------------------------------------------ training from a cache


def cached(exact: bool) -> CachedDataset:
    dataset = object.__new__(CachedDataset)
    dataset.exact = exact
    return dataset


def test_a_cache_sends_the_encoders_to_the_cpu(monkeypatch, capsys):
    key = "model.encoder_device"

    def place(
        dataset: object, on: str, *sets: str, origin: str = "", method: str = "softrepa"
    ) -> tuple[str, str]:
        monkeypatch.setattr(loading, "pick_device", lambda _: torch.device(on))
        resolved = config.resolve(method, sets=list(sets))
        if origin:
            resolved = replace(resolved, origin=resolved.origin | {key: origin})
        found = with_idle_encoders(resolved, dataset)
        return found.model.encoder_device, found.origin[key]

    assert place(cached(True), "cuda") == ("offload", "the cache")
    assert "encoders and autoencoder rest on the CPU" in capsys.readouterr().err
    offload = f"{key}='offload'"
    assert place(cached(True), "cuda", f"{key}='cuda:0'") == ("cuda:0", "--set")
    assert place(cached(True), "cuda", f"{key}=''") == ("", "--set")
    assert place(SimpleNamespace(), "cuda", offload) == ("offload", "--set")
    assert place(cached(True), "cuda", method="textcraftor") == ("", "default")  # it draws, it tunes encoders
    for dataset, on in ((cached(True), "cpu"), (cached(False), "cuda"), (SimpleNamespace(), "cuda")):
        assert place(dataset, on) == ("", "default")
        assert place(dataset, on, offload, origin="the cache") == ("", "default")  # resumed otherwise
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_offload_on_a_gpu_keeps_the_bits(folders, family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def run(encoder_device: str) -> list[torch.Tensor | None]:
        model = load(folders[family], device="cuda", encoder_device=encoder_device)
        if encoder_device:
            assert {x.device for x in tensors(model)} == {CPU}
        z = field(1, 1, model.latent_channels, 8, 8).cuda().requires_grad_()
        model.decode(z).mean().backward()
        cond, posterior = model.encode_text(PROMPTS), model.posterior(field(0, 1, 3, 32, 32))
        settings = SampleSettings(steps=2, sampler="euler" if family == "sd3" else "ddim")
        drawn = sample(model, PROMPTS, settings, [1, 2])
        found = [cond.tokens, cond.pooled, posterior.mean, posterior.std, z.grad]
        assert all(x is None or x.device == model.device for x in found)
        return [*(None if x is None else x.cpu() for x in found), drawn]

    resident, offloaded, on_cpu = run(""), run("offload"), run("cpu")
    for a, b in zip(resident, offloaded, strict=True):
        assert (a is b is None) or torch.equal(a, b)
    torch.testing.assert_close(on_cpu[0], resident[0], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_an_idle_encoder_takes_no_gpu_memory(folders):
    def held(encoder_device: str) -> int:
        before = torch.cuda.memory_allocated()
        model = load(folders["sd3"], device="cuda", encoder_device=encoder_device)
        model.encode_text(PROMPTS)
        found = torch.cuda.memory_allocated() - before
        del model
        return found

    assert held("offload") < held("")


@pytest.mark.gpu
def test_training_from_a_cache_offloads(folders, tmp_path):
    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.output
        return result.stderr

    common = ["--model", folders["sd15"], "--preset", "none", "--device", "cuda", "--batch-size", 4]
    small = ["--set", "data.num_examples=8", "--set", "data.num_workers=0"]
    call("encode", *common, *small, "--out", tmp_path / "cache")
    out = tmp_path / "run"
    more = ["--steps", 2, "--no-eval", "--cache", tmp_path / "cache", "--out", out]
    assert "rest on the CPU" in call("train", "softrepa", *common, *small, *more)
    saved = json.loads((out / "run.json").read_text())
    assert saved["config"]["model"]["encoder_device"] == "offload"
    assert saved["origin"]["model.encoder_device"] == "the cache"
