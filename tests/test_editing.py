"""FlowEdit: its formula by hand, exact cases, the rectified form of epsilon models, real tiny models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess, Process
from align_cli.editing import check_size, edit, edits_at_once, flowedit, rectified, velocity
from align_cli.errors import UserError
from align_cli.evaluation.edits import EDIT_METRICS, edit_cases, edit_pictures, judge_edits
from align_cli.models.base import TextCond
from align_cli.models.loading import load_model
from align_cli.settings import EditSettings, ModelSettings
from align_cli.shapes.captions import parse
from align_cli.shapes.world import Scene, Thing, render, scene_split

SD15 = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
EPSILON = NoiseProcess.from_scheduler_config(SD15)
ZERO_SNR = NoiseProcess.from_scheduler_config(
    {
        **SD15,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
)
VELOCITY = NoiseProcess.from_scheduler_config({**SD15, "prediction_type": "v_prediction"})


def text(*values: float) -> TextCond:
    """One row per value, a single token of one number."""
    return TextCond(torch.tensor(values, dtype=torch.float64).view(-1, 1, 1))


class Constant:
    """A flow model whose velocity is the number in its text, whatever z is. Keeps what it was called with."""

    def __init__(self) -> None:
        self.process: Process = FlowProcess(shift=1.0)
        self.calls: list[tuple[Tensor, float, list[float]]] = []

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        self.calls.append((z_t.clone(), float(t), cond.tokens.flatten().tolist()))
        return cond.tokens[:, :, :, None].expand_as(z_t).clone()


@dataclass
class Gaussian:
    """The perfect denoiser of data N(m, var), m the number in the text: what a model would learn."""

    process: Process
    var: float = 0.3
    seen: list[int] = field(default_factory=list)

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        self.seen.append(len(z_t))
        m = cond.tokens[:, :, :, None].to(z_t)
        if isinstance(self.process, NoiseProcess):
            a, s = self.process.coefficients(t, z_t)
        else:
            s = torch.as_tensor(float(t) / 1000).to(z_t)
            a = 1 - s
        x0 = m + a * self.var / (a**2 * self.var + s**2) * (z_t - a * m)
        eps = (z_t - a * x0) / s
        kind = self.process.prediction_type
        return eps if kind == "epsilon" else a * eps - s * x0 if kind == "v_prediction" else eps - x0


def noises(seed: int = 0, shape: tuple[int, ...] = (1, 2, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def run(model, source, src, tgt, uncond, **options):
    options = {"steps": 10, "n_start": 10, "src_guidance": 1.0, "tgt_guidance": 1.0, **options}
    options.setdefault("noise_fn", noises(shape=tuple(source.shape)))
    return flowedit(model, source, src, tgt, uncond, **options)


SOURCE = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("convention", "moved"),
    # u 1, source 2, target 5: V_src = 1 + 3 (2 - 1) = 4
    [("softrepa", (5 + 2 * 4) - 4), ("flowedit", (1 + 2 * 4) - 4)],
)
def test_one_step_by_hand(convention, moved):
    model, eps = Constant(), noises()()
    z = run(
        model, SOURCE, text(2), text(5), text(1), steps=1, n_start=1, src_guidance=3, tgt_guidance=2,
        convention=convention, noise_fn=lambda: eps,
    )  # fmt: skip
    torch.testing.assert_close(z, SOURCE - moved)  # from sigma 1 to 0
    (rows, t, texts) = model.calls[0]
    assert len(model.calls) == 1, "the four calls of a step are one batch"
    assert t == 1000 and texts == [1, 2, 1, 5]
    torch.testing.assert_close(rows, eps.expand(4, -1, -1, -1))  # sigma 1: nothing of the source is left


def test_two_steps_by_hand():
    """sigma 1, 0.5, 0 is not the path of the scheduler; its second sigma is taken from the process."""
    model, draws = Constant(), [noises(1)(), noises(2)()]
    left = list(draws)
    z = run(model, SOURCE, text(2), text(5), text(1), steps=2, n_start=2, noise_fn=lambda: left.pop(0),
            convention="flowedit")  # fmt: skip
    sigma = float(model.process.timesteps(2)[1]) / 1000
    torch.testing.assert_close(z, SOURCE - 3)
    a = (1 - sigma) * SOURCE + sigma * draws[1]
    rows, t, texts = model.calls[1]
    assert t == pytest.approx(1000 * sigma) and texts == [2, 5], "guidance 1 needs no unconditional rows"
    torch.testing.assert_close(rows[:1], a)
    torch.testing.assert_close(rows[1:], a + (sigma - 1) * 3)  # the edit so far, carried to the noisy side


def test_only_the_last_steps_run():
    model, count = Constant(), []
    run(model, SOURCE, text(2), text(5), text(1), n_start=3, callback=count.append)
    path = model.process.timesteps(10)
    assert [t for _, t, _ in model.calls] == pytest.approx(path[-3:].tolist())
    assert count == [1, 2, 3]


def test_no_steps_return_the_source():
    model = Constant()
    assert torch.equal(run(model, SOURCE, text(2), text(5), text(1), n_start=0), SOURCE)
    assert model.calls == []


def test_averaged_noises():
    """The mean of the moves under each noise alone, since one step starts from z = x."""
    model, options = Gaussian(FlowProcess()), {"steps": 5, "n_start": 1}
    draws = [noises(k)() for k in range(3)]
    single = [run(model, SOURCE, text(2), text(5), text(0), **options, noise_fn=lambda d=d: d) for d in draws]
    left = list(draws)
    together = run(model, SOURCE, text(2), text(5), text(0), **options, n_avg=3, noise_fn=lambda: left.pop(0))
    torch.testing.assert_close(together, torch.stack(single).mean(0))
    assert not left


def test_second_phase_by_hand():
    """n_min == n_start is SDEdit: noised once, then ordinary Euler sampling under the target."""
    model, eps = Constant(), noises()()
    z = run(
        model, SOURCE, text(2), text(5), text(1), n_start=4, n_min=4, tgt_guidance=2, noise_fn=lambda: eps
    )
    sigma = float(model.process.timesteps(10)[-4]) / 1000
    torch.testing.assert_close(z, (1 - sigma) * SOURCE + sigma * eps - sigma * (5 + 2 * 4))
    assert all(texts == [1, 5] for _, _, texts in model.calls)


def test_both_phases_meet():
    """First phase to sigma_k, then z + a - x, then the target alone, with constant velocities."""
    model, eps = Constant(), noises()()
    z = run(model, SOURCE, text(2), text(5), text(1), n_start=5, n_min=2, noise_fn=lambda: eps,
            convention="flowedit")  # fmt: skip
    path = model.process.timesteps(10) / 1000
    first, second = float(path[-5] - path[-2]), float(path[-2])
    torch.testing.assert_close(z, SOURCE - 3 * first + second * (eps - SOURCE) - 5 * second)


def test_equal_prompts_and_guidance_return_the_source():
    model = Gaussian(FlowProcess())
    z = run(model, SOURCE, text(2), text(2), text(0), src_guidance=3, tgt_guidance=3, convention="flowedit")
    assert torch.equal(z, SOURCE)
    z = run(model, SOURCE, text(2), text(2), text(0), src_guidance=3, tgt_guidance=3)
    assert not torch.allclose(z, SOURCE), "the official convention guides the target one more"
    z = run(model, SOURCE, text(2), text(2), text(0), src_guidance=3, tgt_guidance=2)
    torch.testing.assert_close(z, SOURCE, rtol=0, atol=1e-12)


def test_splitting_the_calls_changes_nothing():
    source = torch.cat([SOURCE, SOURCE + 1])
    args = (source, text(2, 3), text(5, 7), text(0, 0))
    options = {"src_guidance": 2, "tgt_guidance": 4, "n_avg": 2}
    whole, split = Gaussian(FlowProcess()), Gaussian(FlowProcess())
    torch.testing.assert_close(
        run(whole, *args, **options), run(split, *args, **options, batch_size=3), rtol=0, atol=1e-12
    )
    assert set(whole.seen) == {8} and set(split.seen) == {3, 2}


def test_impossible_values():
    for wrong in ({"n_start": 11}, {"n_start": 3, "n_min": 4}, {"n_avg": 0}, {"convention": "other"}):
        with pytest.raises(ValueError):
            run(Constant(), SOURCE, text(2), text(5), text(1), **wrong)


# ---------------------------------------------------------------- exact Gaussian cases


@pytest.mark.parametrize(
    "process", [EPSILON, VELOCITY, ZERO_SNR, FlowProcess()], ids=lambda p: p.prediction_type
)
def test_rectified_velocity_is_exact(process):
    """Rectified probability flow of N(m, var): z = (1 - sigma) m + sqrt((1 - sigma)^2 var + sigma^2) n
    for one fixed n; the velocity is its derivative.
    """
    model, m, var = Gaussian(process), 0.7, 0.3
    n = noises(4)()
    for t in process.timesteps(7):
        sigma, scale = rectified(process, t)
        width = ((1 - sigma) ** 2 * var + sigma**2) ** 0.5
        z = (1 - sigma) * m + width * n
        expected = -m + n * (sigma - (1 - sigma) * var) / width
        torch.testing.assert_close(velocity(model, z, t, text(m)), expected, rtol=1e-5, atol=1e-6)
        x0, eps = torch.full_like(n, 2.0), torch.full_like(n, -3.0)
        noised = process.add_noise(x0, eps, t)
        torch.testing.assert_close(noised, scale * ((1 - sigma) * x0 + sigma * eps), rtol=1e-6, atol=1e-6)


def test_following_the_velocity_ends_at_the_data():
    """Many small Euler steps from a noisy point reach the exact end of its path: m + sqrt(var) n."""
    model, m = Gaussian(ZERO_SNR), 0.7
    path = ZERO_SNR.timesteps(500)
    sigmas = [rectified(ZERO_SNR, t)[0] for t in path] + [0.0]
    n = noises(5)()
    z = n.clone()  # sigma is 1 there
    assert sigmas[0] == 1.0
    for i, t in enumerate(path):
        z = z + (sigmas[i + 1] - sigmas[i]) * velocity(model, z, t, text(m))
    torch.testing.assert_close(z, m + 0.3**0.5 * n, rtol=0, atol=0.01)


@pytest.mark.parametrize("process", [ZERO_SNR, FlowProcess()], ids=lambda p: p.prediction_type)
@pytest.mark.parametrize("convention", ["softrepa", "flowedit"])
def test_a_shifted_gaussian_is_shifted_exactly(process, convention):
    """From N(2, var) to N(5, var), beginning at sigma 1: every sample moves by 3, whatever the noises are.

    The edit z = x + (1 - sigma) 3 is straight, so Euler steps are exact. With guidance s on both sides the
    velocity is that of the mean u + s (m - u), moving by s times as much.
    """
    model = Gaussian(process)
    z = run(model, SOURCE, text(2), text(5), text(0), tgt_guidance=0.0 if convention == "softrepa" else 1.0,
            convention=convention)  # fmt: skip
    torch.testing.assert_close(z, SOURCE + 3, rtol=0, atol=1e-4)
    s = 2.5
    z = run(model, SOURCE, text(2), text(5), text(1), src_guidance=s, convention=convention,
            tgt_guidance=s - 1 if convention == "softrepa" else s)  # fmt: skip
    torch.testing.assert_close(z, SOURCE + 3 * s, rtol=0, atol=3e-4)


def test_epsilon_and_flow_models_edit_alike():
    """The same data through an epsilon model and through a flow model on the same sigmas."""

    class SameSigmas(FlowProcess):
        def timesteps(self, n: int, spacing: str | None = None) -> Tensor:
            return torch.tensor([1000 * rectified(EPSILON, t)[0] for t in EPSILON.timesteps(n)])

    options = {"n_start": 7, "src_guidance": 1.5, "tgt_guidance": 3.0}
    one = run(Gaussian(EPSILON), SOURCE, text(2), text(5), text(0), **options)
    two = run(Gaussian(SameSigmas()), SOURCE, text(2), text(5), text(0), **options)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert (one - SOURCE).mean() > 2


# ---------------------------------------------------------------- real tiny models


@pytest.fixture(scope="module", params=["sd15", "v", "sdxl", "sd3"])
def model(request):
    name = "tiny_v_folder" if request.param == "v" else f"tiny_{request.param}_folder"
    return load_model(ModelSettings(name=str(request.getfixturevalue(name)), device="cpu"))


QUICK = EditSettings(steps=4, n_start=2, src_guidance=1.5, tgt_guidance=3.0, batch_size=8)


def pictures(n: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_edit_depends_on_its_own_row(model):
    """Two at once, or one, or one row after the other: the same pictures."""
    given, seen = pictures(3), []
    prompts = ["a red circle", "a green square", "two blue circles"], ["a blue circle", "a red square", "x"]
    out = edit(model, given, *prompts, QUICK, [1, 2, 1], lambda done, total: seen.append((done, total)))
    assert out.shape == given.shape and out.dtype == np.uint8
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]
    for i, seed in enumerate([1, 2, 1]):
        rows = slice(i, i + 1)
        alone = edit(
            model, given[rows], prompts[0][rows], prompts[1][rows], replace(QUICK, batch_size=1), [seed]
        )
        assert np.abs(alone.astype(int) - out[rows]).max() <= 1
    other = edit(model, given[:1], ["a red circle"], ["a blue circle"], QUICK, [5])
    assert not np.array_equal(other, out[:1])


def test_nothing_to_do_is_the_round_trip_of_the_autoencoder(model):
    given = pictures(1)
    out = edit(model, given, ["a red circle"], ["a blue circle"], replace(QUICK, n_start=0), [1])
    pixels = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        noise = torch.randn(model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))[None]
        expected = model.decode(model.encode_image(pixels, noise)).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(out - expected).max() <= 0.51
    same = replace(QUICK, src_guidance=2.0, tgt_guidance=2.0, convention="flowedit")
    kept = edit(model, given, ["a red circle"], ["a red circle"], same, [1])
    assert np.abs(kept.astype(int) - out).max() <= 1


def test_a_result_that_is_not_finite_is_no_picture(model):
    broken = copy.copy(model)
    broken.decode = lambda z: model.decode(z) / 0
    with pytest.raises(UserError, match="not finite in torch.float32; take --dtype bfloat16 or float32"):
        edit(broken, pictures(1), ["a red circle"], ["a blue circle"], QUICK, [1])


def test_other_sizes(model):
    factor = model.size_factor
    wide = pictures(1, 2 * factor, 4 * factor)
    assert edit(model, wide, ["a red circle"], ["a blue circle"], QUICK, [1]).shape == wide.shape
    with pytest.raises(UserError, match=rf"multiples of {factor} pixels, got 33 x 32 \(near: 32 x 32\)"):
        check_size(model, 33, 32)
    with pytest.raises(UserError, match="edit.steps must be at most 1000, got 1001"):
        edit(model, pictures(1), ["a"], ["b"], EditSettings(steps=1001), [1])


def test_sd3_knows_positions_up_to_a_size(tiny_sd3_folder):
    sd3 = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu"))
    most = sd3.denoiser.config.pos_embed_max_size * sd3.vae_factor * sd3.denoiser.config.patch_size
    check_size(sd3, most, sd3.size_factor)
    with pytest.raises(UserError, match="knows positions up to"):
        check_size(sd3, most + sd3.size_factor, sd3.size_factor)


def test_settings():
    for wrong, words in (
        ({"n_start": 51}, r"edit.n_start must be at most edit.steps \(50\), got 51"),
        ({"n_min": 31}, r"edit.n_min must be at most edit.n_start \(30\)"),
        ({"convention": "own"}, "softrepa, flowedit"),
        ({"tgt_guidance": -1.0}, "edit.tgt_guidance must be >= 0"),
        ({"n_avg": 0}, "edit.n_avg must be >= 1"),
        ({"image_size": -1, "keep_aspect": True}, "choose one"),
    ):
        with pytest.raises(UserError, match=words):
            EditSettings(**wrong)
    assert [edits_at_once(EditSettings(batch_size=n)) for n in (1, 4, 7, 8)] == [1, 1, 1, 2]


# ---------------------------------------------------------------- edit success on the shapes world


def test_cases_change_one_attribute_and_nothing_else():
    cases = edit_cases(60, 3, split="test")
    assert cases == edit_cases(60, 3, split="test") != edit_cases(60, 4, split="test")
    for case in cases:
        assert parse(case.src.text) == case.src.spec and parse(case.tgt.text) == case.tgt.spec
        differ = [
            (k, name)
            for k, (old, new) in enumerate(zip(case.before.things, case.after.things, strict=True))
            for name in ("color", "shape", "x", "y", "r")
            if getattr(old, name) != getattr(new, name)
        ]
        assert differ == [(case.place, case.attribute)]
        assert case.before.background == case.after.background
        for scene in (case.before, case.after):
            assert scene_split(tuple(t.kind for t in scene.things)) == "test"
    assert {c.attribute for c in cases} == {"color", "shape"}


def test_judging_edits():
    cases = edit_cases(20, 1, split="val")

    def means(scenes: list[Scene]) -> dict[str, float]:
        values = judge_edits(render(scenes), cases)
        assert set(values) == set(EDIT_METRICS)
        return {name: float(v.mean()) for name, v in values.items()}

    done = means([c.after for c in cases])
    assert (done["changed"], done["kept"], done["both"], done["caption"], done["untouched"]) == (
        1,
        1,
        1,
        1,
        0,
    )
    assert done["outside"] == 0
    same = means([c.before for c in cases])
    assert (same["changed"], same["kept"], same["both"], same["caption"], same["untouched"]) == (
        0,
        1,
        0,
        0,
        1,
    )

    def without_another(scene: Scene, place: int) -> Scene:
        return replace(scene, things=tuple(t for k, t in enumerate(scene.things) if k == place))

    lost = means([without_another(c.after, c.place) for c in cases])
    assert (lost["changed"], lost["kept"], lost["both"]) == (1, 0, 0) and lost["outside"] > 5
    other = {"black": "white", "white": "black"}
    dark = means([replace(c.after, background=other[c.after.background]) for c in cases])
    assert (dark["changed"], dark["kept"]) == (1, 0)
    moved = []
    for c in cases:
        t = c.after.things[c.place]
        away = replace(t, x=t.x + (5 if t.x < 16 else -5))
        moved.append(
            replace(c.after, things=(*c.after.things[: c.place], away, *c.after.things[c.place + 1 :]))
        )
    assert means(moved)["changed"] == 0, "what is asked for stands elsewhere"
    one = cases[0]
    corner = Thing("red", "square", 4.0, 4.0, 2.5)
    if all(np.hypot(t.x - 4, t.y - 4) > 10 for t in one.after.things):
        more = judge_edits(render([replace(one.after, things=(*one.after.things, corner))]), [one])
        assert more["changed"][0] == 1 and more["kept"][0] == 0


def test_edit_pictures_of_the_shapes_world(tiny_sd15_folder):
    small = load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))
    cases = edit_cases(3, split="val")
    out = edit_pictures(small, cases, QUICK)
    assert out.shape == (3, 32, 32, 3)
    assert judge_edits(out, cases)["both"].max() <= 1
    with pytest.raises(ValueError, match="2 pictures but 3 edits"):
        judge_edits(out[:2], cases)
    with pytest.raises(UserError, match="at least one edit"):
        edit_cases(0)
