"""CLIP-IQA (Wang et al. 2023, arXiv:2207.12396): is a picture nearer to a good photo or to a bad one, by CLIP?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.interface import Asked, Images, SpecError
from rewards.models.batched import Batched
from rewards.models.openclip import OpenClip

if TYPE_CHECKING:
    import torch

_SMALLEST = 32  # pixels that the tower makes one feature of


class ClipIqaScorer(Batched):
    """``clip_iqa`` in [0, 1]: share of ``good`` in the softmax over CLIP's logits for ``good`` and ``bad``.

    No reference and no prompt play a part. As in the paper the image is seen at its own size, neither resized nor cut,
    by a CLIP with a ResNet whose positions are left out; a side below 32 pixels is enlarged to it. The model is given
    as to ``clip``; the paper's is ``model: RN50-quickgelu`` with OpenAI's weights, ``checkpoint: openai`` or a file of
    them.
    """

    name = "clip_iqa"
    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        path: str | None = None,
        model: str | None = None,
        checkpoint: str | None = None,
        precision: str = "fp32",
        good: str = "Good photo.",
        bad: str = "Bad photo.",
        device: str = "cpu",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device, batch_size)
        if not good.strip() or not bad.strip() or good == bad:
            raise SpecError(f"{self.name}: good is {good!r}, bad {bad!r}; write two texts that differ")
        self.model = OpenClip(self.name, path=path, model=model, checkpoint=checkpoint, precision=precision)
        self.texts = [good, bad]

    def load(self) -> None:
        """Load CLIP and embed both texts; raises ``SpecError`` for a CLIP without a ResNet."""
        import torch

        self.model.setup(self.device)
        pool = getattr(self.model.loaded.visual, "attnpool", None)
        if pool is None:
            raise SpecError(
                f"{self.name}: {self.model.architecture} has no ResNet with attention pooling; "
                "give one such as model: RN50-quickgelu"
            )
        # One row of zeros for every place, so that any size of image goes through.
        pool.positional_embedding = torch.nn.Parameter(torch.zeros_like(pool.positional_embedding[:1]))
        with torch.inference_mode():
            self._texts_2D = self.model.texts(self.texts)

    def values(self, asked: Asked) -> torch.Tensor:
        logits = self.model.embed(self._pixels(asked.images)) @ self._texts_2D.T
        return (self.model.loaded.logit_scale.exp().float() * logits).softmax(-1)[:, 0]

    def _pixels(self, images: Images) -> torch.Tensor:
        """Return the normalised images (N, 3, H, W), each side at least 32."""
        import torch
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import normalize, resize

        pixels = torch.from_numpy(images.copy()).to(self.device).permute(0, 3, 1, 2)
        height, width = (max(_SMALLEST, side) for side in pixels.shape[-2:])
        if (height, width) != tuple(pixels.shape[-2:]):
            pixels = resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        known = self.model.loaded.visual.preprocess_cfg
        return normalize(pixels.float() / 255, known["mean"], known["std"]).to(self.model.dtype)
