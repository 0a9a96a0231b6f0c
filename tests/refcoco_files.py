"""DPT's data in small: scenes of the shapes world as COCO pictures, RefCOCO expressions, hard negatives."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from align_cli.shapes.captions import counterfactual, phrase, recaption
from align_cli.shapes.world import SIZE, Scene, render, sample_scenes

HEIGHT, WIDTH = 48, 80
"""Of the pictures; another aspect than that of the world, so that boxes must be scaled by both."""
REC = Path("ReC/mdetr/OpenSource")
TRAIN_NEGATIVES = Path("ITM/coco/train_hard_neg_t20_i4OpenClip_ViT-H-14")
VAL_NEGATIVES = Path("ITM/coco/val_hard_neg_t20_i4OpenClip_ViT-H-14.tsv")
CAPTIONS = Path("coco/annotations/captions_train2014.json")
PARTS = {
    "refall_train": 1, "refcoco_train": 1,
    "refcoco_val": 2, "refcoco+_val": 3, "refcocog_val": 4,
    "refcoco_testA": 5, "refcoco_testB": 6, "refcoco+_testA": 7, "refcoco+_testB": 8, "refcocog_test": 9,
}  # fmt: skip
"""File of expressions -> seed of its scenes."""


def make_refcoco(root: Path, num: int = 6) -> Path:
    """The layout below `root`, with `num` scenes for each part. Every picture has two captions, and for each
    of them three false ones and a picture that these are true of.
    """
    (root / REC).mkdir(parents=True)
    train, val = Pictures(root / "coco/images/train2014", "COCO_train2014_"), None
    seen: dict[int, list[tuple[str, Scene]]] = {}
    for name, seed in PARTS.items():
        if seed not in seen:
            scenes = sample_scenes(num, np.random.default_rng(seed))
            seen[seed] = [(train.add(scene, seed), scene) for scene in scenes]
        write_json(root / REC / f"finetune_{name}.json", expressions(seen[seed]))
    val = Pictures(root / "coco/images/val2014", "COCO_val2014_")
    for scene in sample_scenes(num, np.random.default_rng(99)):
        val.add(scene, 99)
    write_negatives_folder(root / TRAIN_NEGATIVES, train.records)
    write_negatives_table(root / VAL_NEGATIVES, val.records)
    write_captions(root / CAPTIONS, train.records)
    return root


class Pictures:
    """A folder of pictures. records: (file, title, false captions, files of pictures that it almost fits)."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix, self.count = folder, prefix, 0
        self.records: list[tuple[str, str, list[str], list[str]]] = []
        folder.mkdir(parents=True)

    def add(self, scene: Scene, seed: int) -> str:
        """Draw a scene and its twins; returns the name of its picture."""
        rng = np.random.default_rng([seed, self.count])
        file = self._draw(scene)
        for _ in range(2):
            prompt = recaption(scene, rng, long_rate=0.0)
            twins = [counterfactual(scene, prompt, rng) for _ in range(3)]
            near = self._draw(twins[0][0])
            self.records.append((file, prompt.text, [false.text for _, false in twins], [near]))
            self.records.append((near, twins[0][1].text, [prompt.text], [file]))
        return file

    def _draw(self, scene: Scene) -> str:
        self.count += 1
        name = f"{self.prefix}{self.count:012d}.jpg"
        picture = Image.fromarray(render([scene])[0]).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        picture.save(self.folder / name, quality=100, subsampling=0)
        return name


def expressions(pictures: list[tuple[str, Scene]]) -> dict:
    """MDETR's layout: an "image" for every kind of object in every picture, with all objects of that kind."""
    images, notes = [], []
    for original, (file, scene) in enumerate(pictures):
        for kind in dict.fromkeys(thing.kind for thing in scene.things):
            boxes = [thing.box for thing in scene.things if thing.kind == kind]
            text = phrase(kind, len(boxes))
            images.append(
                {"file_name": file, "height": HEIGHT, "width": WIDTH, "id": len(images), "caption": text,
                 "original_id": original, "dataset_name": "refcoco", "tokens_negative": []}
            )  # fmt: skip
            for x0, y0, x1, y1 in boxes:
                sx, sy = WIDTH / SIZE, HEIGHT / SIZE
                box = [x0 * sx, y0 * sy, (x1 - x0) * sx, (y1 - y0) * sy]
                notes.append(
                    {"id": len(notes), "image_id": len(images) - 1, "bbox": box, "area": box[2] * box[3],
                     "iscrowd": 0, "category_id": 1, "tokens_positive": [[0, len(text)]]}
                )  # fmt: skip
    return {"images": images[::-1], "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}


def write_negatives_folder(folder: Path, records: list) -> None:
    folder.mkdir(parents=True)
    names: dict[str, list[int]] = {}
    for number, (file, title, captions, files) in enumerate(records):
        names.setdefault(file, []).append(number)
        row = {"title": title, "neg_caption": str(captions), "neg_image": str(files)}
        write_json(folder / f"{number:05d}.json", row)
    write_json(folder / "imgname2txtid.json", names)


def write_negatives_table(path: Path, records: list) -> None:
    """As pandas writes it: tabs, quotes where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filepath", "title", "neg_caption", "neg_image"])
        writer.writerows((name, title, str(captions), str(files)) for name, title, captions, files in records)


def write_captions(path: Path, records: list) -> None:
    """The layout of COCO's captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = list(dict.fromkeys(record[0] for record in records))
    images = [{"id": i, "file_name": file} for i, file in enumerate(files)]
    notes = [{"image_id": files.index(r[0]), "id": n, "caption": r[1]} for n, r in enumerate(records)]
    write_json(path, {"images": images, "annotations": notes})


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
