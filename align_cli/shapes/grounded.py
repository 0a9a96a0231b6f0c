"""The shapes world for methods that learn to tell pictures and texts apart, and to find what is named."""

from __future__ import annotations

import numpy as np

from align_cli.data.base import Example
from align_cli.data.grounded import Grounded, relative
from align_cli.errors import UserError
from align_cli.shapes.captions import counterfactual, phrase, recaption
from align_cli.shapes.dataset import ShapesDataset
from align_cli.shapes.world import SIZE, Kind, Scene, render


class GroundedShapes(ShapesDataset):
    """The scenes of `ShapesDataset`; every example has a `Grounded` in `extra["grounded"]`.

    The expression names one object, or all of them where there are several of one kind, and its whole text
    names each of their boxes. The hard caption and picture are each other's: the scene changed as little as
    its false caption says. The random ones are of another scene of the dataset, with other objects, so that
    neither caption is true of the other picture. Without pictures `extra` is empty, as there is nothing to
    tell apart.
    """

    world = "shapes-grounded-1"

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; `rng` draws its caption, the expression, and what is false.

        Raises:
            UserError: all scenes of the dataset show the same objects.
        """
        scene = self.scenes[index]
        prompt = recaption(scene, rng, long_rate=self.long_rate)
        if not self.pictures:
            return Example(prompt=prompt.text, id=index)
        changed, false = counterfactual(scene, prompt, rng, split=self.kept_split)
        named = scene.things[rng.integers(len(scene.things))].kind
        boxes = [thing.box for thing in scene.things if thing.kind == named]
        expression = phrase(named, len(boxes))
        other = self._other(index, rng)
        grounded = Grounded(
            expression=expression,
            boxes=relative(boxes, (SIZE, SIZE)),
            spans=[[(0, len(expression))] for _ in boxes],
            hard_prompt=false.text,
            random_prompt=recaption(self.scenes[other], rng, long_rate=self.long_rate).text,
            hard_pixels=self.to_pixels(render([changed])[0]),
            random_pixels=self._pixels(other),
            size=(SIZE, SIZE),
        )
        return Example(prompt.text, self._pixels(index), index, {"grounded": grounded})

    def _other(self, index: int, rng: np.random.Generator) -> int:
        """A scene with other objects: the first such one from a random place on."""
        first, own = int(rng.integers(self.size)), _objects(self.scenes[index])
        for step in range(self.size):
            found = (first + step) % self.size
            if _objects(self.scenes[found]) != own:
                return found
        raise UserError(
            f"all {self.size} scenes of the shapes dataset show the same objects, so none is false of "
            "another; take more with --set data.num_examples=N (eval dpt-probe: --n N)"
        )


def _objects(scene: Scene) -> list[Kind]:
    return sorted(thing.kind for thing in scene.things)
