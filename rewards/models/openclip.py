"""Unit embeddings of images and texts from any open_clip model: what the clip, hps and aesthetic scorers stand on.

Shapes: N images or texts, H W pixels, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.interface import Images, SpecError, one_line
from rewards.missing import hint
from rewards.models.customcode import never_ask, refuse_custom_code

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "bf16")
_LONGEST = 16


def _other(path: str) -> str:
    """Say whose layout a directory has that is not open_clip's."""
    if not os.path.isfile(Path(path) / "config.json"):
        return ""
    return "; this one is in transformers' layout, which of the rewards pickscore and image_similarity read"


class OpenClip:
    """An open_clip model, loaded when first used; ``owner`` is whom errors name.

    The model is a directory with ``open_clip_config.json`` and weights (``path``), or an open_clip architecture
    (``model``, such as ``ViT-H-14``) with ``checkpoint``, a local file or a tag that open_clip knows and may download.
    A file of OpenAI's weights wants an architecture with QuickGELU, such as ``ViT-L-14-quickgelu``; a tag brings its
    own. ``precision`` is that of the weights, embeddings are float32. ``resize_mode`` (shortest, longest, squash)
    replaces the model's own. Raises ``SpecError`` for what names no model.
    """

    def __init__(
        self,
        owner: str,
        *,
        path: str | None = None,
        model: str | None = None,
        checkpoint: str | None = None,
        precision: str = "fp32",
        resize_mode: str | None = None,
    ) -> None:
        if (path is None) == (model is None) or (path is not None and checkpoint is not None):
            raise SpecError(
                f"{owner}: give either `path`, a directory in open_clip's layout, or `model` and `checkpoint`"
            )
        if path is not None and not os.path.isfile(Path(path) / "open_clip_config.json"):
            raise SpecError(
                f"{owner}: {path} holds no open_clip_config.json; give a directory in open_clip's layout" + _other(path)
            )
        if path is not None:
            refuse_custom_code(owner, path)
        if model is not None and checkpoint is None:
            raise SpecError(f"{owner}: model {model!r} has no `checkpoint`; give a local file of its weights")
        if checkpoint is not None and ("/" in checkpoint or Path(checkpoint).suffix) and not os.path.isfile(checkpoint):
            raise SpecError(
                f"{owner}: checkpoint {checkpoint} does not exist{hint(checkpoint)}; "
                f"give a local file of {model} weights"
            )
        if precision not in PRECISIONS:
            raise SpecError(f"{owner}: precision {precision!r} is unknown; write {', '.join(PRECISIONS)}")
        self.owner = owner
        self.architecture = str(model) if path is None else f"local-dir:{path}"
        self.checkpoint = checkpoint
        self.precision = precision
        self.resize_mode = resize_mode
        self.device = "cpu"
        self._model: Any = None

    def setup(self, device: str) -> None:
        """Load the model; raises ``SpecError`` where the weights are not its own."""
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.device = device
        never_ask()
        try:
            model = open_clip.create_model(
                self.architecture,
                pretrained=self.checkpoint,
                precision=self.precision,
                device=device,
                force_quick_gelu=trained_with_quick_gelu(self.architecture, self.checkpoint),
                force_preprocess_cfg={"resize_mode": self.resize_mode},
                require_pretrained=True,
            )
            self._tokenizer = open_clip.get_tokenizer(self.architecture)
        except Exception as error:  # open_clip asserts, indexes and raises by turns on weights that do not fit
            raise SpecError(
                f"{self.owner}: {self.architecture} with checkpoint {self.checkpoint} did not load ({one_line(error)})"
            ) from error
        visual: Any = model.visual
        self._steps = tensor_steps(image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False))
        self.dtype = open_clip.get_input_dtype(self.precision)
        self._model = model.eval()

    @property
    def loaded(self) -> Any:
        """The open_clip model itself."""
        if self._model is None:
            self.setup(self.device)
        return self._model

    def images(self, images: Images) -> torch.Tensor:
        """Return the unit embeddings (N, D) of uint8 images (N, H, W, 3) of any size."""
        return self.embed(self.pixels(images))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the unit embeddings (N, D) of model input (N, 3, h, w)."""
        import torch

        return torch.nn.functional.normalize(self.loaded.encode_image(pixels, normalize=False).float(), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Return the unit embeddings (N, D), each distinct text encoded once."""
        import torch

        model = self.loaded
        unique = list(dict.fromkeys(texts))
        encoded = model.encode_text(self._tokenizer(unique).to(self.device), normalize=False)
        embedded = torch.nn.functional.normalize(encoded.float(), dim=-1)
        return embedded[torch.tensor([unique.index(text) for text in texts], device=embedded.device)]

    def cosines(self, images: Images, texts: list[str]) -> torch.Tensor:
        """Return the float32 cosines (N,) in [-1, 1] of each image with the text of its row."""
        return (self.images(images) * self.texts(texts)).sum(-1)

    def pixels(self, images: Images) -> torch.Tensor:
        """Return the model input (N, 3, h, w), resized and normalised as a batch."""
        import torch

        if self._model is None:
            self.setup(self.device)
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device).permute(0, 3, 1, 2)
        for step in self._steps:
            pixels = step(pixels)
        return pixels.to(dtype=self.dtype)


def trained_with_quick_gelu(architecture: str, checkpoint: str | None) -> bool:
    """Tell whether a tag's weights want QuickGELU: open_clip knows, warns, and computes with GELU all the same."""
    from open_clip import get_pretrained_cfg

    return checkpoint is not None and bool(get_pretrained_cfg(architecture, checkpoint).get("quick_gelu"))


def tensor_steps(preprocess: Any) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return the model's own evaluation transform, which takes one PIL image, for a uint8 batch (N, 3, H, W)."""
    import torch
    from open_clip.transform import ResizeKeepRatio
    from torchvision import transforms

    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for step in preprocess.transforms:
        if isinstance(step, ResizeKeepRatio):
            steps += [] if step.longest else [_middle]
            steps.append(_keep_ratio(step))
            continue
        if isinstance(step, transforms.Resize) and isinstance(step.size, int):
            steps.append(_middle)
        if isinstance(step, transforms.Normalize):
            steps.append(lambda pixels: pixels.to(torch.float32) / 255)
        if isinstance(step, torch.nn.Module):
            steps.append(step)
    return steps


def _middle(pixels: torch.Tensor) -> torch.Tensor:
    """Cut an image to at most 16:1 about the centre.

    A centre crop follows, and a resize by the short side would grow without bound.
    """
    from torchvision.transforms.functional import center_crop

    height, width = pixels.shape[-2:]
    return center_crop(pixels, [min(height, _LONGEST * width), min(width, _LONGEST * height)])


def _keep_ratio(step: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a resize like open_clip's ``ResizeKeepRatio``, which asks a PIL image for its size."""
    from torchvision.transforms.functional import resize

    def keep_ratio(pixels: torch.Tensor) -> torch.Tensor:
        height, width = pixels.shape[-2:]
        ratios = height / step.size[0], width / step.size[1]
        ratio = max(ratios) * step.longest + min(ratios) * (1 - step.longest)
        size = [max(1, round(height / ratio)), max(1, round(width / ratio))]
        return resize(pixels, size, step.interpolation, antialias=True)

    return keep_ratio
