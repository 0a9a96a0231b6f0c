"""Attention to the words of a prompt: maps, their numbers, and what is shown of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_helpers import load
from softrepa_helpers import save_random_adapter

from align_cli import sampling
from align_cli.adapters import attach
from align_cli.errors import UserError
from align_cli.evaluation.attention import Attention, check, masks_of, reader_of, sample
from align_cli.evaluation.heat import heat, note_of
from align_cli.evaluation.maps import read_maps, relative, write_maps
from align_cli.grounding.entities import Entity, EntityReader
from align_cli.grounding.parsing import Word
from align_cli.models.attention import AttentionMaps, watched
from align_cli.models.segments import SegmentReader
from align_cli.pictures import to_uint8
from align_cli.settings import SampleSettings
from align_cli.shapes.masks import ShapesMasker
from align_cli.shapes.world import render, sample_scenes

TEXTS = ["a red circle above a blue square", "a circle", "a green triangle"]
RED, BLUE = Entity("circle", (2, 3), ("red", "circle")), Entity("square", (6, 7), ("blue", "square"))


@pytest.fixture(params=["sd15", "sdxl", "sd3"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder):
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return load(folders[request.param])


def drawing(model, **options) -> SampleSettings:
    """SD3 has one sampler."""
    return SampleSettings(**(options | ({"sampler": "euler"} if model.family == "sd3" else {})))


def by_hand(model, text: str, seed: int, entity: Entity, *, soft: int = 0) -> np.ndarray:
    """The map of an entity in a picture of one step without guidance. soft: tokens behind the first."""
    z = torch.randn((model.latent_channels, 8, 8), generator=torch.Generator().manual_seed(seed))[None]
    keep = AttentionMaps()
    with torch.no_grad(), watched(model.denoiser):
        t = model.process.timesteps(1, None if model.family == "sd3" else "leading")[0]
        model.predict(z, t, model.encode_text([text]), keep)
    side = max(int(name.partition("_")[2]) for name in keep.maps)
    columns = [position + soft for position in entity.positions]
    layers = [
        F.interpolate(one[..., columns].mean((1, -1))[:, None], (side, side), mode="bilinear")[0, 0]
        for found in keep.maps.values()
        for one in found
    ]
    return torch.stack(layers).mean(0).numpy()


def test_a_map_is_the_mean_over_tokens_heads_and_layers(model):
    one = drawing(model, steps=1, guidance=1.0, batch_size=2, spacing="leading")
    _, seen = sample(model, TEXTS[:1], [[RED, BLUE]], one, [5])
    for found, entity in zip(seen[0].maps, (RED, BLUE), strict=True):
        np.testing.assert_allclose(found, by_hand(model, TEXTS[0], 5, entity), rtol=1e-4)
    assert seen[0].maps.min() > 0 and seen[0].maps.max() < 1


def test_soft_tokens_move_the_words(tiny_sd15_folder, tmp_path):
    adapter = save_random_adapter(tmp_path / "a", tiny_sd15_folder, "softrepa.stages=TTT")
    model = load(tiny_sd15_folder)
    one = SampleSettings(steps=1, guidance=1.0, spacing="leading")
    with attach(model, [str(adapter)]):
        _, seen = sample(model, TEXTS[:1], [[RED]], one, [5])
        wanted = by_hand(model, TEXTS[0], 5, RED, soft=4)
    np.testing.assert_allclose(seen[0].maps[0], wanted, rtol=1e-4)
    assert np.abs(wanted - by_hand(model, TEXTS[0], 5, RED)).max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_that_are_drawn_unseen(model, guidance):
    settings = drawing(model, steps=3, guidance=guidance, batch_size=2, sampler="ddpm")
    entities = [[RED, BLUE], [], [Entity("triangle", (2, 3), ("green", "triangle"))]]
    before = dict(model.denoiser.attn_processors)
    pictures, seen = sample(model, TEXTS, entities, settings, [1, 2, 3])
    assert model.denoiser.attn_processors == before
    torch.testing.assert_close(
        pictures, sampling.sample(model, TEXTS, settings, [1, 2, 3]), atol=2e-5, rtol=0
    )
    assert [len(one.maps) for one in seen] == [2, 0, 1]
    alone = sample(model, TEXTS[:1], entities[:1], settings, [1])[1][0]
    np.testing.assert_allclose(seen[0].maps, alone.maps, rtol=1e-3)
    nothing, unseen = sample(model, TEXTS[1:2], [[]], settings, [2])
    torch.testing.assert_close(nothing, pictures[1:2], atol=2e-5, rtol=0)
    assert unseen[0].maps.shape[0] == 0 and unseen[0].shares() == []


def test_models_whose_attention_cannot_be_shown(tiny_sd15_folder):
    model = load(tiny_sd15_folder)
    with model.reading(SegmentReader(model)), pytest.raises(UserError, match="read by segments"):
        check(model)
    check(model)


def test_shares_by_hand():
    maps = np.array([[[0.1, 0.3], [0.0, 0.0]], [[0.2, 0.2], [0.2, 0.2]]], np.float32)
    left, top = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2], top[:2] = True, True
    seen = Attention((RED, BLUE), maps)
    first, second = seen.shares(np.stack([left, top]))
    assert first == {
        "peak": pytest.approx(0.3), "mean": pytest.approx(0.1), "inside": pytest.approx(0.25), "area": 0.5,
    }  # fmt: skip
    assert second["inside"] == pytest.approx(0.5) and second["area"] == 0.5
    corner = np.zeros((4, 4), bool)
    corner[:1, :1] = True  # a quarter of a cell
    assert seen.shares(np.stack([corner, top]))[0]["inside"] == pytest.approx(0.0625)
    # not told apart, not found, nothing known
    assert [row["inside"] for row in seen.shares(np.stack([left, left]))] == [None, None]
    assert [row["inside"] for row in seen.shares(np.stack([left, 0 * left]))] == [pytest.approx(0.25), None]
    assert [row["area"] for row in seen.shares()] == [None, None]


def test_masks_are_those_of_the_picture():
    scene = sample_scenes(1, np.random.default_rng(0), kinds=("pair",), split="test")
    picture = render(scene)[0]
    shapes = [thing.shape for thing in scene[0].things]
    found = masks_of(ShapesMasker(), picture, [Entity(shape, (1,), (shape,)) for shape in shapes])
    assert found is not None and found.shape == (2, 32, 32) and found.any((1, 2)).all()


def test_heat_is_where_the_map_is():
    picture = np.full((32, 32, 3), (255, 0, 0), np.uint8)
    one = np.zeros((4, 4), np.float32)
    one[0, 0] = 1
    shown = heat(picture, one)
    assert shown.shape == (32, 32, 3) and shown.dtype == np.uint8
    assert len(set(shown[-1, -1].tolist())) == 1  # grey
    assert shown[0, 0, 0] > 200 and shown[0, 0, 0] > shown[0, 0, 2]
    assert np.array_equal(relative(np.stack([one / 4, 0 * one])), np.stack([one, 0 * one]))
    assert note_of("red circle", {"peak": 0.25, "mean": 0.1, "inside": None, "area": None}).text == (
        "red circle: at most 0.25"
    )
    found = note_of("red circle", {"peak": 0.25, "mean": 0.1, "inside": 0.616, "area": 0.07})
    assert found.text == "red circle: 62 % lies on it (7 % of the picture)"


def test_maps_on_disk(tmp_path):
    maps = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    path = tmp_path / "a" / "00000.safetensors"
    write_maps(path, maps, {"prompt": "ein gr\u00fcner Kreis"})
    facts, read = read_maps(path)
    assert facts == {"prompt": "ein gr\u00fcner Kreis"} and np.array_equal(read, maps)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_maps(blocked / "00000.safetensors", maps, {})


class Fixed:
    """A parser that says what it was told."""

    name = "fixed"

    def __init__(self, *words: Word) -> None:
        self.words = list(words)

    def parse(self, prompt: str) -> list[Word]:
        return self.words


def test_what_is_shown_of_a_prompt(tiny_sd15_folder):
    model = load(tiny_sd15_folder)
    reader = reader_of(model, "shapes", world=False)

    def shown(text: str) -> list[str]:
        return [" ".join(entity.words) for entity in reader.shown(text)]

    # two circles, which no detector could tell apart, and the background, which none finds
    both = "a red circle and a blue circle on a white background"
    assert reader.entities(both) == []
    assert shown(both) == ["red circle", "blue circle", "white background"]
    assert shown(" ") == []
    tokenizer = model.towers()[0].tokenizer
    words = Word("a", "DET", "det", 1), Word("circle", "NOUN", "nsubj", 2), Word("above", "VERB", "ROOT", 2)
    single = EntityReader(Fixed(*words), tokenizer, limit=model.token_limit)
    assert [entity.words for entity in single.shown("a circle above")] == [("circle",), ("above",)]
    none = EntityReader(Fixed(Word("a", "DET", "ROOT", 0)), tokenizer, limit=model.token_limit)
    assert none.shown("a") == []


def test_where_things_are_can_be_told_from_real_maps():
    """The embedded model attends to a thing where it draws it, far more than chance would have it."""
    model = load(Path("embedded:tiny-sd15"))
    texts = ["a red circle above a blue square", "a green triangle left of a yellow circle"]
    reader = reader_of(model, "auto", world=True)
    entities = [reader.shown(text) for text in texts]
    settings = SampleSettings(steps=8, guidance=4.0)
    pictures, seen = sample(model, texts, entities, settings, [42, 43])
    found = [
        (row["inside"], row["area"])
        for picture, one in zip(to_uint8(pictures), seen, strict=True)
        for row in one.shares(masks_of(ShapesMasker(), picture, one.entities))
        if row["inside"] is not None
    ]
    assert len(found) >= 3 and np.mean([a / b for a, b in found]) > 1.5
