"""The store of encodings: exact sizes, what is stored and given back, training from it to the last bit."""

from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import FullDisk, make_coco, settings, trace

from align_cli.data import filling, shards
from align_cli.data.base import collate
from align_cli.data.cache import Cache, Index, known_shapes, plan
from align_cli.data.cached import CachedDataset
from align_cli.data.coco import CocoDataset
from align_cli.data.encoding import Encoder, Request, describe, draw_noise, make_index, measure
from align_cli.data.filling import Filling, changed_shards, compare
from align_cli.data.shards import Field, ShardReader, file_bytes, file_sha256, write_shard
from align_cli.errors import UserError
from align_cli.methods.base import encoded_latents, encoded_text
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.models.base import TextCond
from align_cli.models.loading import load_model
from align_cli.settings import DataSettings, ModelSettings
from align_cli.shapes.dataset import ShapesDataset
from align_cli.training.loop import train
from align_cli.training.order import item_rng

ROOT = Path(__file__).resolve().parent.parent
SEED = 3
COCO_IMAGES = 118_287
FAMILIES = ("sd15", "sdxl", "sd3")


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> DataSettings:
    """Four pictures of 32 x 32 with five captions each."""
    root = make_coco(tmp_path_factory.mktemp("data") / "coco")
    return DataSettings(name="coco", path=str(root), image_size=32)


@pytest.fixture(scope="module")
def models(tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder):
    """One random model of each family, on the CPU."""
    folders = zip(FAMILIES, (tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder), strict=True)
    return {name: load_model(ModelSettings(name=str(folder), device="cpu")) for name, folder in folders}


def open_data(data: DataSettings):
    if data.name == "shapes":
        return ShapesDataset(data, seed=SEED)
    with pytest.warns(UserWarning, match="no caption"):
        return CocoDataset(data, seed=SEED)


def request_for(model, data: DataSettings, **changes) -> Request:
    base = {"seed": SEED, "batch_size": 4, "shard_items": 8, "captions": "all"}
    return Request(model=ModelSettings(name=model.model_id, device="cpu"), data=data, **{**base, **changes})


def prepare(model, request: Request):
    dataset = open_data(request.data)
    index = make_index(dataset, request)
    pixels = dataset.get(0, np.random.default_rng(0)).pixels
    measured = measure(model, pixels)
    about = describe(request, dataset, index, model, measured)
    return Encoder(model, dataset, index, measured.shapes, request), about


def encode(folder: Path, model, data: DataSettings, **changes) -> Cache:
    """Encode `data` with `model` in this process."""
    encoder, about = prepare(model, request_for(model, data, **changes))
    with Filling(folder, about, encoder.index) as work:
        work.run(encoder, silent, silent)
    return Cache.read(folder)


def silent(*_args: object) -> None:
    """No progress."""


def run(model, dataset, out: Path, *, config: SoftREPAConfig | None = None, **changes) -> list[str]:
    """The trace of a few real steps."""
    config = config or SoftREPAConfig(temperature=0.3, init="normal", num_layers=1, stages="TTT")
    method = SoftREPA(model, config, seed=SEED)
    train(
        method, dataset, settings(**{"steps": 6, "lr": 1e-3, **changes}), out, config={"method": "softrepa"}
    )
    return trace(out)


# ------------------------------------------------------------------ sizes


SPEC = {
    # per item in float16, methods/softrepa.md (g): latent, text and pooled
    "sd15": (32_768, 118_272),
    "sdxl": (32_768, 315_392 + 2_560),
    "sd3": (131_072, 4_825_088 - 315_392 + 4_096),
}
"""SD3 without the zero half of its CLIP rows."""


@pytest.mark.parametrize("name", SPEC)
def test_bytes_per_item_on_real_shapes(tmp_path, name):
    """Random numbers of the true shapes through the writer: arithmetic, file and specification agree."""
    shapes = known_shapes(name, 512, "float16", 512)
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
    shapes = known_shapes(name, 512, "float16", 512)
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


def test_sd3_without_t5_stores_no_zeros():
    assert (
        sum(f.row_bytes for f in known_shapes("sd3", 512, "float16", 0).caption_fields()) == (77 + 1) * 4096
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_what_is_written(tmp_path, models, coco, name):
    cache = encode(tmp_path / "c", models[name], coco)
    assert cache.complete and [s.name for s in cache.plan] == [
        "images-00000.safetensors", "captions-00000.safetensors", "captions-00001.safetensors",
        "captions-00002.safetensors",
    ]  # fmt: skip
    for shard in cache.plan:
        assert (tmp_path / "c" / shard.name).stat().st_size == shard.bytes == cache.shards[shard.name].bytes
        assert file_sha256(tmp_path / "c" / shard.name) == cache.shards[shard.name].sha256


# ------------------------------------------------------------------ shard files


FIELDS = [
    Field("half", "float16", (2, 3)),
    Field("brain", "bfloat16", (3,)),
    Field("wide", "float32", (1, 1)),
]


def some_tensors(rows: int = 5) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {f.name: torch.randn(rows, *f.shape, generator=rng).to(getattr(torch, f.dtype)) for f in FIELDS}


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path):
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    write_shard(path, FIELDS, tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())
    row = ShardReader().row(path, 3)
    assert row.keys() == tensors.keys() and all(torch.equal(row[k], tensors[k][3]) for k in row)
    with pytest.raises(ValueError, match="brain should be 5 rows"):
        write_shard(path, FIELDS, tensors | {"brain": tensors["brain"][:4]})


def test_the_reader_closes_what_it_has_not_used_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    reader = ShardReader()
    for k in range(4):
        write_shard(tmp_path / f"{k}", FIELDS, some_tensors(k + 1))
        assert reader.row(tmp_path / f"{k}", k).keys() == {f.name for f in FIELDS}
    assert len(reader._open) == 2


class FullFile(FullDisk):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def full_disk(monkeypatch, room: int, name: str = "") -> None:
    """A disk with room for so many bytes of a shard whose name holds `name`."""
    real = shards.open_part

    def open_part(path):
        return FullFile(real(path), room) if name in path.name else real(path)

    monkeypatch.setattr(shards, "open_part", open_part)


def test_a_full_disk_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_shard(path, FIELDS, some_tensors(2))
    before = path.read_bytes()
    full_disk(monkeypatch, 300)
    with pytest.raises(OSError) as caught:
        write_shard(path, FIELDS, some_tensors(9))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# ------------------------------------------------------------------ what is stored


def test_text_is_cut_into_what_is_not_always_zero(models):
    model = models["sd3"]
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


def test_which_captions(models, coco):
    dataset = open_data(coco)
    request = request_for(models["sd15"], coco)
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


def test_captions_of_a_grammar(models):
    data = DataSettings(num_examples=6)
    dataset, request = ShapesDataset(data, seed=SEED), request_for(models["sd15"], data)
    with pytest.raises(UserError, match="draws its captions afresh .* --captions random"):
        make_index(dataset, request)
    assert make_index(dataset, replace(request, layout="captions")) == Index([], [], [])
    once = make_index(dataset, replace(request, captions="random"))
    assert [once.captions[item[0]] for item in once.items] == [
        dataset.get(i, item_rng(SEED, 0, i)).prompt for i in range(6)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_items_are_those_of_the_dataset(tmp_path, models, coco, name):
    """Same rng, same caption, text and posterior of the encoders, to the last bit; with posterior sample one
    frozen draw."""
    model = models[name]
    dataset, cache = open_data(coco), encode(tmp_path / "mean", model, coco)
    encode(tmp_path / "draw", model, coco, posterior="sample")
    stored = CachedDataset(replace(coco, path="/nowhere", cache=str(cache.folder)), seed=SEED)
    frozen = CachedDataset(replace(coco, path="/nowhere", cache=str(tmp_path / "draw")), seed=SEED)
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


# ------------------------------------------------------------------ training from it


@pytest.mark.parametrize("name", FAMILIES)
def test_training_from_the_cache_is_bit_identical(tmp_path, models, coco, name):
    """Three epochs of two batches; captions and posterior are drawn afresh in each."""
    model = models[name]
    expected = run(model, open_data(coco), tmp_path / "plain", batch_size=2)
    encode(tmp_path / "c", model, coco, batch_size=2)
    stored = CachedDataset(replace(coco, path="", cache=str(tmp_path / "c")), seed=SEED)
    assert run(model, stored, tmp_path / "cached", batch_size=2) == expected
    assert len(expected) == 6 and len(set(expected)) == 6


def test_half_precision_under_autocast_is_bit_identical(tmp_path, tiny_sd3_folder, coco):
    """Encoders run outside autocast, in the loop as beforehand."""
    model = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", dtype="bfloat16"))
    options = {"batch_size": 2, "precision": "bf16", "steps": 2}
    expected = run(model, open_data(coco), tmp_path / "plain", **options)
    cache = encode(tmp_path / "c", model, coco, batch_size=2)
    assert cache.shapes.text_dtype == cache.shapes.latent_dtype == "bfloat16"
    stored = CachedDataset(replace(coco, cache=str(tmp_path / "c")), seed=SEED)
    assert run(model, stored, tmp_path / "cached", **options) == expected


def test_shapes_with_one_caption_each(tmp_path, models):
    """The stored caption is that of the first epoch; loader processes read the shards, too."""
    model, data = models["sd15"], DataSettings(num_examples=16)
    expected = run(model, ShapesDataset(data, seed=SEED), tmp_path / "plain", steps=4)
    encode(tmp_path / "c", model, data, captions="random")
    stored = CachedDataset(replace(data, cache=str(tmp_path / "c")), seed=SEED)
    method = SoftREPA(model, SoftREPAConfig(temperature=0.3, init="normal", stages="TTT"), seed=SEED)
    options = settings(steps=4, lr=1e-3)
    train(method, stored, options, tmp_path / "cached", config={"method": "softrepa"}, num_workers=1)
    assert trace(tmp_path / "cached") == expected
    hard = SoftREPAConfig(hard_negatives=1)
    with pytest.raises(UserError, match="gives 0 false captions"):
        run(model, stored, tmp_path / "hard", config=hard)


def test_the_small_layout_keeps_captions_and_negatives_fresh(tmp_path, models):
    model, data = models["sd15"], DataSettings(num_examples=8, mixture="pairs")
    config = SoftREPAConfig(temperature=0.3, hard_negatives=2)
    expected = run(model, ShapesDataset(data, seed=SEED), tmp_path / "plain", config=config)
    cache = encode(tmp_path / "c", model, data, layout="captions")
    assert {s.kind for s in cache.plan} == {"images"}
    assert "text_encoder" not in cache.about["encoders"]
    stored = CachedDataset(replace(data, cache=str(tmp_path / "c")), seed=SEED)
    stored.check_model(model)
    assert run(model, stored, tmp_path / "cached", config=config) == expected


# ------------------------------------------------------------------ what does not fit


@pytest.fixture(scope="module")
def cached(tmp_path_factory, models, coco) -> DataSettings:
    """Settings with a cache made with the SD1.5 model. Do not write into it."""
    folder = tmp_path_factory.mktemp("cache") / "c"
    encode(folder, models["sd15"], coco)
    return replace(coco, cache=str(folder))


def refused(data: DataSettings, model=None, seed: int = SEED) -> str:
    def use() -> None:
        CachedDataset(data, seed=seed).check_model(model)

    with pytest.raises(UserError) as caught:
        use()
    return str(caught.value)


def test_a_foreign_cache_is_refused_with_the_reason(tmp_path, cached, models, coco):
    model = models["sd15"]
    assert "the dataset 'coco', now it is 'shapes'" in refused(replace(cached, name="shapes"))
    assert "size of the pictures in pixels 32, now it is 64" in refused(replace(cached, image_size=64))
    assert "the resize filter 'bicubic'" in refused(replace(cached, interpolation="lanczos"))
    assert "holds 4 items" in refused(replace(cached, num_examples=5))
    assert "family of the model 'sd15', now it is 'sdxl'" in refused(cached, models["sdxl"])
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


def test_another_world_of_shapes_is_refused(tmp_path, models):
    data = DataSettings(num_examples=4)
    encode(tmp_path / "c", models["sd15"], data, captions="first")
    data = replace(data, cache=str(tmp_path / "c"))
    assert "seed 3, now it is 4" in refused(data, seed=4)
    assert "number of items 4, now it is 2" in refused(replace(data, num_examples=2))
    assert "data.mixture 'all', now it is 'pairs'" in refused(replace(data, mixture="pairs"))


def test_t5_length_belongs_to_the_cache(tmp_path, models, coco, tiny_sd3_folder):
    encode(tmp_path / "c", models["sd3"], coco)
    short = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=8))
    assert "model.t5_length" in refused(replace(coco, cache=str(tmp_path / "c")), short)


def test_a_damaged_cache_is_refused_with_the_reason(tmp_path, models, coco):
    folder = tmp_path / "c"
    cache = encode(folder, models["sd15"], coco)
    data = replace(coco, cache=str(folder))
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


def test_encoding_again_tells_another_model(tmp_path, models, coco, make_tiny_sd15):
    model = models["sd15"]
    cache = encode(tmp_path / "c", model, coco)
    encoder, _ = prepare(model, request_for(model, coco))
    found = compare(cache, encoder, 3)
    assert found.rows == found.identical == 6 and found.worst == 0 and found.ok
    stranger = load_model(ModelSettings(name=str(make_tiny_sd15(tmp_path / "m", seed=9)), device="cpu"))
    found = compare(cache, prepare(stranger, request_for(stranger, coco))[0], 3)
    assert found.identical == 0 and not found.ok and "safetensors" in found.where


# ------------------------------------------------------------------ filling a folder


def test_numbers_that_are_not_finite(tmp_path, models, coco):
    broken = copy.copy(models["sd15"])
    broken.posterior = lambda pixels: replace(p := models["sd15"].posterior(pixels), std=p.std / 0)
    with pytest.raises(UserError, match=r"encodings of pictures \[0, 1, 2, 3\] are not finite"):
        encode(tmp_path / "c", broken, coco)
    assert not (tmp_path / "c" / "images-00000.safetensors").exists()


def test_a_full_disk_in_the_middle(tmp_path, models, coco, monkeypatch):
    model, folder = models["sd15"], tmp_path / "c"
    with monkeypatch.context() as patch:
        full_disk(patch, 1000, "captions-00001")
        with pytest.raises(UserError) as caught:
            encode(folder, model, coco)
    assert "captions-00001.safetensors: the disk is full; 2 of 4 shards are finished and kept" in str(
        caught.value
    )
    assert f"t2ialign encode --resume --out {folder}" in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "captions-00000.safetensors", "images-00000.safetensors", "items.json", "manifest.json",
    ]  # fmt: skip
    encoder, about = prepare(model, request_for(model, coco))
    with pytest.raises(UserError, match=r"unfinished encodings \(2 of 4 shards\); go on with --resume"):
        Filling(folder, about, encoder.index).__enter__()
    written = []
    monkeypatch.setattr(
        filling, "write_shard", lambda path, *r: written.append(path.name) or write_shard(path, *r)
    )
    with Filling(folder, about, encoder.index, resume=True) as work:
        work.run(encoder, silent, silent)
    assert written == ["captions-00001.safetensors", "captions-00002.safetensors"]
    assert not changed_shards(Cache.read(folder)) and Cache.read(folder).complete


def test_no_room_is_refused_before_anything_is_written(tmp_path, models, coco, monkeypatch):
    usage = filling.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: usage._replace(free=90_000))
    with pytest.raises(UserError, match=r"90.6 kB are to be written to .* its disk has 90.0 kB free"):
        encode(tmp_path / "c", models["sd15"], coco)
    assert not (tmp_path / "c").exists()


HOLD = """
import sys, time
from pathlib import Path
from align_cli.data.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    with claims.order():
        alone = claims.come()
    print(alone, claims.take(2), flush=True)
    time.sleep(600)
"""


def test_claims_hold_until_their_process_ends(tmp_path):
    from align_cli.data.claims import Claims

    path = tmp_path / ".lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert other.stdout.readline() == "True True\n"
        with Claims(path) as claims, claims.order():
            assert not claims.come() and not claims.take(2) and claims.take(3)
        other.kill()
        other.wait()
        with Claims(path) as claims, claims.order():
            assert claims.come() and claims.take(2)
            claims.release(2)
    finally:
        other.kill()
