"""The store of encodings: exact sizes, what is stored and given back, what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import FAMILIES, SEED, encode, open_data, prepare, request_for
from safetensors.torch import load_file

from align_cli.data.base import collate
from align_cli.data.cache import Index, known_shapes, plan
from align_cli.data.cached import CachedDataset
from align_cli.data.encoding import draw_noise, make_index, measure
from align_cli.data.filling import changed_shards, compare
from align_cli.data.shards import file_bytes, file_sha256, write_shard
from align_cli.errors import UserError
from align_cli.methods.base import encoded_latents, encoded_text
from align_cli.models.base import TextCond
from align_cli.models.loading import load_model
from align_cli.settings import DataSettings, ModelSettings
from align_cli.shapes.dataset import ShapesDataset
from align_cli.training.order import item_rng

COCO_IMAGES = 118_287


# ------------------------------------------------------------------ sizes


SPEC = {
    # per item in float16, methods/softrepa.md (g): latent, text and pooled
    "sd15": (32_768, 118_272),
    "sdxl": (32_768, 315_392 + 2_560),
    "sd3": (131_072, 4_825_088 - 315_392 + 4_096),
}
"""SD3 without the zero half of its CLIP rows."""
VAE = "another autoencoder"
"""In place of SDXL's own, which works in float32."""


@pytest.mark.parametrize("name", SPEC)
def test_bytes_per_item_on_real_shapes(tmp_path, name):
    """Random numbers of the true shapes through the writer: arithmetic, file and specification agree."""
    shapes = known_shapes(name, 512, "float16", 512, VAE)
    latent, text = SPEC[name]
    rng = torch.Generator().manual_seed(0)
    kinds = {
        "mean-std": (shapes.image_fields("mean-std"), 2 * latent),
        "sample": (shapes.image_fields("sample"), latent),
        "captions": (shapes.caption_fields(), text),
    }
    rows = 8
    for kind, (fields, wanted) in kinds.items():
        tensors = {f.name: torch.randn(rows, *f.shape, generator=rng).half() for f in fields}
        path = tmp_path / f"{kind}.safetensors"
        written = write_shard(path, fields, tensors)
        size = path.stat().st_size
        assert written.bytes == size == file_bytes(fields, rows)
        assert size / rows == pytest.approx(wanted, rel=1e-3)
        assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())


@pytest.mark.parametrize(
    ("name", "posterior", "gigabytes"),
    [
        ("sd15", "sample", 17.9),
        ("sdxl", "sample", 41.5),
        ("sd3", "sample", 549.4),
        ("sd3", "mean-std", 564.9),
    ],
)
def test_bytes_of_coco(name, posterior, gigabytes):
    """Every caption different: the most it can be. The official way takes 9,130 GB and more for SD3."""
    shapes = known_shapes(name, 512, "float16", 512, VAE)
    files = plan(
        shapes, layout="exact", posterior=posterior, items=COCO_IMAGES, captions=COCO_IMAGES, shard_items=256
    )
    assert len(files) == 2 * 463
    assert sum(f.bytes for f in files) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_bytes_of_the_small_layout():
    shapes = known_shapes("sd3", 512, "float16", 512)
    files = plan(
        shapes, layout="captions", posterior="sample", items=COCO_IMAGES, captions=0, shard_items=256
    )
    assert sum(f.bytes for f in files) / 1e9 == pytest.approx(15.5, abs=0.05)


def test_the_autoencoder_of_sdxl_works_in_float32():
    """As the loader loads it; what else is stored is in float16."""
    own, other = (known_shapes("sdxl", 512, "float16", 512, vae) for vae in ("", VAE))
    assert (own.latent_dtype, own.text_dtype) == ("float32", "float16") != (other.latent_dtype, "float16")
    assert known_shapes("sdxl", 512, "bfloat16", 512).latent_dtype == "bfloat16"
    assert known_shapes("sd3", 512, "float16", 512).latent_dtype == "float16"


def test_sd3_without_t5_stores_no_zeros():
    assert (
        sum(f.row_bytes for f in known_shapes("sd3", 512, "float16", 0).caption_fields()) == (77 + 1) * 4096
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_what_is_written(tmp_path, tiny_models, tiny_coco, name):
    cache = encode(tmp_path / "c", tiny_models[name], tiny_coco)
    assert cache.complete and [s.name for s in cache.plan] == [
        "images-00000.safetensors", "captions-00000.safetensors", "captions-00001.safetensors",
        "captions-00002.safetensors",
    ]  # fmt: skip
    for shard in cache.plan:
        assert (tmp_path / "c" / shard.name).stat().st_size == shard.bytes == cache.shards[shard.name].bytes
        assert file_sha256(tmp_path / "c" / shard.name) == cache.shards[shard.name].sha256


# ------------------------------------------------------------------ what is stored


def test_text_is_cut_into_what_is_not_always_zero(tiny_models):
    model = tiny_models["sd3"]
    encoder_widths = [e.config.hidden_size for e in model.encoders]
    shapes = measure(model, torch.zeros(3, 32, 32)).shapes
    text = model.encode_text(["a red circle", "two blue squares"])
    found = shapes.split(text)
    assert found["clip"].shape == (2, 32, sum(encoder_widths[:2])) and found["t5"].shape[2] == 48
    for i in range(2):
        again = shapes.join({key: value[i] for key, value in found.items()})
        assert torch.equal(again.tokens, text.tokens[i]) and torch.equal(again.pooled, text.pooled[i])
    stray = text.tokens.clone()
    stray[0, 0, -1] = 1e-3
    with pytest.raises(ValueError, match="outside the parts"):
        shapes.split(TextCond(stray, text.pooled))
    with pytest.raises(ValueError, match="text tokens should be"):
        shapes.split(TextCond(text.tokens[:, 1:], text.pooled))
    with pytest.raises(ValueError, match="pooled"):
        shapes.split(TextCond(text.tokens))


def test_which_captions(tiny_models, tiny_coco):
    dataset = open_data(tiny_coco)
    request = request_for(tiny_models["sd15"], tiny_coco)
    everything = make_index(dataset, request)
    assert everything.ids == dataset.ids == [2, 5, 7, 31]
    assert [[everything.captions[k] for k in item] for item in everything.items] == dataset.captions
    first = make_index(dataset, replace(request, captions="first"))
    assert [first.captions[item[0]] for item in first.items] == [c[0] for c in dataset.captions]
    once = make_index(dataset, replace(request, captions="random"))
    drawn = [dataset.get(i, item_rng(SEED, 0, i)).prompt for i in range(4)]
    assert [once.captions[item[0]] for item in once.items] == drawn and len(set(map(tuple, once.items))) == 4
    dataset.captions[3] = dataset.captions[0]
    assert make_index(dataset, request).items[3] == [0, 1, 2, 3, 4]  # stored once


def test_captions_of_a_grammar(tiny_models):
    data = DataSettings(num_examples=6)
    dataset, request = ShapesDataset(data, seed=SEED), request_for(tiny_models["sd15"], data)
    with pytest.raises(UserError, match="draws its captions afresh .* --captions random"):
        make_index(dataset, request)
    assert make_index(dataset, replace(request, layout="captions")) == Index([], [], [])
    once = make_index(dataset, replace(request, captions="random"))
    assert [once.captions[item[0]] for item in once.items] == [
        dataset.get(i, item_rng(SEED, 0, i)).prompt for i in range(6)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_items_are_those_of_the_dataset(tmp_path, tiny_models, tiny_coco, name):
    """Same rng, same caption, text and posterior of the encoders, to the last bit; with posterior sample one
    frozen draw."""
    model = tiny_models[name]
    dataset, cache = open_data(tiny_coco), encode(tmp_path / "mean", model, tiny_coco)
    encode(tmp_path / "draw", model, tiny_coco, posterior="sample")
    stored = CachedDataset(replace(tiny_coco, path="/nowhere", cache=str(cache.folder)), seed=SEED)
    frozen = CachedDataset(replace(tiny_coco, path="/nowhere", cache=str(tmp_path / "draw")), seed=SEED)
    stored.check_model(model)
    assert len(stored) == len(dataset) == 4
    for epoch in range(3):
        true, ours, once = (
            collate([d.get(i, item_rng(SEED, epoch, i)) for i in range(4)]) for d in (dataset, stored, frozen)
        )
        assert ours.prompts == true.prompts == once.prompts and ours.extra == true.extra
        assert ours.pixels is None and ours.ids == true.ids
        noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(epoch))
        own = torch.stack([draw_noise(SEED, i, (4, 8, 8)) for i in range(4)])
        assert torch.equal(encoded_latents(model, ours, noise), encoded_latents(model, true, noise))
        assert torch.equal(encoded_latents(model, once, noise), encoded_latents(model, true, own))
        text, wanted = encoded_text(model, ours), encoded_text(model, true)
        assert torch.equal(text.tokens, wanted.tokens)
        assert (text.pooled is None) == (wanted.pooled is None) == (name == "sd15")
        assert text.pooled is None or torch.equal(text.pooled, wanted.pooled)


def test_captions_alone_read_no_latents(tmp_path, tiny_models, tiny_coco, monkeypatch):
    cache = encode(tmp_path / "mean", tiny_models["sd15"], tiny_coco)
    settings = replace(tiny_coco, path="/nowhere", cache=str(cache.folder))
    whole, alone = (CachedDataset(settings, seed=SEED, pictures=given) for given in (True, False))
    wanted = [whole.get(i, item_rng(SEED, 0, i)) for i in range(4)]
    for shard in cache.plan:
        if shard.kind == "images":
            (cache.folder / shard.name).write_bytes(b"")
    found = [alone.get(i, item_rng(SEED, 0, i)) for i in range(4)]
    assert [e.prompt for e in found] == [e.prompt for e in wanted]
    assert all(e.latents is None for e in found) and all(e.latents is not None for e in wanted)


# ------------------------------------------------------------------ what does not fit


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_models, tiny_coco) -> DataSettings:
    """Settings with a cache made with the SD1.5 model. Do not write into it."""
    folder = tmp_path_factory.mktemp("cache") / "c"
    encode(folder, tiny_models["sd15"], tiny_coco)
    return replace(tiny_coco, cache=str(folder))


def refused(data: DataSettings, model=None, seed: int = SEED) -> str:
    def use() -> None:
        CachedDataset(data, seed=seed).check_model(model)

    with pytest.raises(UserError) as caught:
        use()
    return str(caught.value)


def test_a_foreign_cache_is_refused_with_the_reason(tmp_path, cached, tiny_models, tiny_coco):
    model = tiny_models["sd15"]
    assert "the dataset 'coco', now it is 'shapes'" in refused(replace(cached, name="shapes"))
    assert "size of the pictures in pixels 32, now it is 64" in refused(replace(cached, image_size=64))
    assert "the resize filter 'bicubic'" in refused(replace(cached, interpolation="lanczos"))
    assert "holds 4 items" in refused(replace(cached, num_examples=5))
    assert "family of the model 'sd15', now it is 'sdxl'" in refused(cached, tiny_models["sdxl"])
    half = copy.copy(model)
    half.dtype = torch.float16
    assert "model.dtype 'float32', now it is 'float16'" in refused(cached, half)
    other = copy.copy(model)
    other.vae = copy.deepcopy(model.vae)
    with torch.no_grad():
        next(other.vae.parameters()).view(-1)[0] += 1e-3
    assert "other weights of the vae (sha256" in refused(cached, other)
    bare = copy.copy(model)
    bare.vae, bare.encoders, bare.tokenizer, bare.model_id = None, [], None, "sd14"
    assert "the model '" in refused(cached, bare) and "now it is 'sd14'" in refused(cached, bare)
    bare.vae = model.vae  # a model that holds the autoencoder only
    assert "now it is 'sd14'" in refused(cached, bare)
    bare.model_id = model.model_id
    CachedDataset(cached, seed=SEED).check_model(bare)


def test_another_world_of_shapes_is_refused(tmp_path, tiny_models):
    data = DataSettings(num_examples=4)
    encode(tmp_path / "c", tiny_models["sd15"], data, captions="first")
    data = replace(data, cache=str(tmp_path / "c"))
    assert "seed 3, now it is 4" in refused(data, seed=4)
    assert "number of items 4, now it is 2" in refused(replace(data, num_examples=2))
    assert "data.mixture 'all', now it is 'pairs'" in refused(replace(data, mixture="pairs"))


def test_t5_length_belongs_to_the_cache(tmp_path, tiny_models, tiny_coco, tiny_sd3_folder):
    encode(tmp_path / "c", tiny_models["sd3"], tiny_coco)
    short = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=8))
    assert "model.t5_length" in refused(replace(tiny_coco, cache=str(tmp_path / "c")), short)


def test_a_damaged_cache_is_refused_with_the_reason(tmp_path, tiny_models, tiny_coco):
    folder = tmp_path / "c"
    cache = encode(folder, tiny_models["sd15"], tiny_coco)
    data = replace(tiny_coco, cache=str(folder))
    repair = f"t2ialign encode --resume --out {folder}"
    manifest, items = folder / "manifest.json", folder / "items.json"
    shard = folder / "captions-00001.safetensors"

    def broken(path: Path, content: bytes | None) -> str:
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        text = refused(data)
        path.write_bytes(before)
        return text

    whole = shard.read_bytes()
    text = broken(shard, whole[:-100])
    assert (
        f"shard {shard} is cut off ({len(whole) - 100:,} of {len(whole):,} bytes)" in text and repair in text
    )
    assert "cannot be read (No such file" in broken(shard, None)
    assert f"has {len(whole) + 1:,} bytes" in broken(shard, whole + b"x")
    assert "items.json is damaged" in broken(items, items.read_bytes()[:-2])
    assert "items.json cannot be read" in broken(items, None)
    assert "holds no encodings" in broken(manifest, None)
    assert "cannot be read" in broken(manifest, b"{")
    assert "cannot be read (KeyError: 'format')" in broken(manifest, b"{}")
    raw = json.loads(manifest.read_text())
    assert "has format 99" in broken(manifest, json.dumps(raw | {"format": 99}).encode())
    del raw["shards"][shard.name]
    assert "not finished (3 of 4 shards)" in broken(manifest, json.dumps(raw).encode())
    shard.write_bytes(b"\xff" * len(whole))  # the size is right: found when it is read, or by --verify
    stored = CachedDataset(data, seed=SEED)
    with pytest.raises(UserError, match=r"captions-00001.safetensors cannot be read .* --verify"):
        [stored.get(2, np.random.default_rng(k)) for k in range(20)]
    assert list(changed_shards(cache)) == [shard.name]


def test_encoding_again_tells_another_model(tmp_path, tiny_models, tiny_coco, make_tiny_sd15):
    model = tiny_models["sd15"]
    cache = encode(tmp_path / "c", model, tiny_coco)
    encoder, _ = prepare(model, request_for(model, tiny_coco))
    found = compare(cache, encoder, 3)
    assert found.rows == found.identical == 6 and found.worst == 0 and found.ok
    stranger = load_model(ModelSettings(name=str(make_tiny_sd15(tmp_path / "m", seed=9)), device="cpu"))
    found = compare(cache, prepare(stranger, request_for(stranger, tiny_coco))[0], 3)
    assert found.identical == 0 and not found.ok and "safetensors" in found.where
