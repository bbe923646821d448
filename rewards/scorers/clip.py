"""CLIP similarity with any open_clip model (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rewards.interface import Images, Metadata, SpecError, one_line

if TYPE_CHECKING:
    import torch


class ClipScorer:
    """``clip`` in [-1, 1]: cosine similarity of image and prompt.

    The model is a directory with ``open_clip_config.json`` and weights (``path``), or an open_clip
    architecture (``model``, such as ``ViT-L-14``) with ``checkpoint``, a local file or a tag that open_clip
    knows and may download. ``precision`` is open_clip's: fp32, fp16, bf16.
    """

    name = "clip"
    range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        path: str | None = None,
        model: str | None = None,
        checkpoint: str | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        if (path is None) == (model is None):
            raise SpecError("clip: give either `path`, a directory in open_clip's layout, or `model` and `checkpoint`")
        if path is not None and not (Path(path) / "open_clip_config.json").is_file():
            raise SpecError(f"clip: {path} holds no open_clip_config.json; give a directory in open_clip's layout")
        if model is not None and checkpoint is None:
            raise SpecError(f"clip: model {model!r} has no `checkpoint`; give a local file of its weights")
        if checkpoint is not None and ("/" in checkpoint or Path(checkpoint).suffix) and not Path(checkpoint).is_file():
            raise SpecError(f"clip: checkpoint {checkpoint} does not exist; give a local file of {model} weights")
        self.architecture = model if path is None else f"local-dir:{path}"
        self.checkpoint = checkpoint
        self.precision = precision
        self.device = device
        self.batch_size = batch_size
        self._model: Any = None

    def setup(self, device: str | None = None) -> None:
        """Load the model; raises ``SpecError`` where the weights are not its own."""
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.device = device or self.device
        try:
            model = open_clip.create_model(
                str(self.architecture),
                pretrained=self.checkpoint,
                precision=self.precision,
                device=self.device,
                require_pretrained=True,
            )
            self._tokenizer = open_clip.get_tokenizer(str(self.architecture))
        except Exception as error:  # open_clip asserts, indexes and raises by turns on weights that do not fit
            raise SpecError(
                f"clip: {self.architecture} with checkpoint {self.checkpoint} did not load ({one_line(error)})"
            ) from error
        visual: Any = model.visual
        self._preprocess: Any = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
        self._steps = tensor_steps(self._preprocess)
        self._dtype = open_clip.get_input_dtype(self.precision)
        self._model = model.eval()

    def _loaded(self) -> Any:
        if self._model is None:
            self.setup()
        return self._model

    def score(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> dict[str, np.ndarray]:
        """``{"clip": (N,)}``; images (N, H, W, 3) of any size."""
        import torch

        model = self._loaded()
        values = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                image = model.encode_image(self._pixels(images[rows]), normalize=True)
                values.append((image * self._text(prompts[rows])).sum(-1).float().cpu().numpy())
        return {"clip": np.concatenate(values)}

    def _pixels(self, images: Images) -> torch.Tensor:
        """Model input (N, 3, h, w), resized and normalised as a batch where the transform allows it."""
        import torch

        if self._steps is None:
            pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in images])
            return pixels.to(self.device, self._dtype)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        for step in self._steps:
            pixels = step(pixels)
        return pixels.to(dtype=self._dtype)

    def _text(self, prompts: list[str]) -> torch.Tensor:
        import torch

        unique = list(dict.fromkeys(prompts))
        text = self._model.encode_text(self._tokenizer(unique).to(self.device), normalize=True)
        return text[torch.tensor([unique.index(prompt) for prompt in prompts], device=text.device)]


def tensor_steps(preprocess: Any) -> list[Any] | None:
    """The model's own evaluation transform for a uint8 batch (N, 3, H, W); None where it needs PIL images."""
    import torch
    from open_clip.transform import ResizeKeepRatio
    from torchvision import transforms

    steps: list[Any] = []
    for step in preprocess.transforms:
        if isinstance(step, ResizeKeepRatio):
            return None
        if isinstance(step, transforms.Normalize):
            steps.append(lambda pixels: pixels.to(torch.float32) / 255)
        if isinstance(step, torch.nn.Module):
            steps.append(step)
    return steps
