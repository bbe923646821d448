"""A reward that can only be told of a whole group: how far each of its images is from the mean of all of them."""

import numpy as np


class Spread:
    needs = frozenset({"group", "latents"})

    def __init__(self, group_size):
        self.group_size = group_size

    def answer(self, asked):
        if len(asked.images) != self.group_size or len(set(asked.groups)) != 1:
            raise ValueError(f"asked for {len(asked.images)} images of the groups {sorted(set(asked.groups))}")
        images = asked.images.astype(np.float64)
        return {
            "spread": np.abs(images - images.mean(0)).mean((1, 2, 3)),
            "norm": np.sqrt((asked.latents.astype(np.float64) ** 2).sum((1, 2, 3))),
        }
