"""Image similarity: cosine of an image and its reference under the image tower of CLIP (CLIP-I) or DINOv2 (DINO)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rewards.interface import Asked, Images, InputError, Metadata, SpecError, one_line
from rewards.models.batched import Batched
from rewards.models.customcode import refuse_custom_code
from rewards.models.pretrained import check_dtype, first_of, load_model, middle

if TYPE_CHECKING:
    import torch

_CLASSES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
}
_FILES = ("preprocessor_config.json", "processor_config.json")


class ImageSimilarityScorer(Batched):
    """``image_similarity`` in [-1, 1]: cosine of the embeddings of an image and of its reference; prompts play no part.

    ``path`` is the directory of a transformers ``CLIPModel`` (its projected embedding) or ``Dinov2Model`` (its class
    token), with the image processor. Pictures are resized by PIL, as these models' own evaluations do; those longer
    than 16:1 are cut to their middle first. Images and references may have different sizes.
    """

    name = "image_similarity"
    range = (-1.0, 1.0)
    needs = frozenset({"references"})

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        check_dtype(self.name, dtype)
        what = "the directory of a transformers CLIPModel or Dinov2Model"
        try:
            config = json.loads(first_of(self.name, path, ["config.json"], what).read_bytes())
        except ValueError as error:
            raise SpecError(f"{self.name}: {path}/config.json is no JSON ({one_line(error)})") from error
        first_of(self.name, path, _FILES, what + " with its image processor")
        kind = config.get("model_type") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in _CLASSES:
            raise SpecError(f"{self.name}: {path} is a {kind!r}; give one of {', '.join(_CLASSES)}")
        refuse_custom_code(self.name, path)
        self.path, self.dtype, self.kind = path, dtype, _CLASSES[kind]
        self._model: Any = None

    def check_row(self, metadata: Metadata) -> None:
        """Raise ``InputError`` for a row that names no reference."""
        if not isinstance(metadata.get("image"), str) or not metadata["image"]:
            raise InputError('has no "image", the path of its reference picture')

    def load(self) -> None:
        """Load the tower from its directory; nothing is downloaded."""
        import transformers

        model = load_model(self.name, getattr(transformers, self.kind), self.path, self.dtype)
        if self.kind == "CLIPModel":
            model.text_model = None  # never asked; half of the memory
        local: Any = {"local_files_only": True, "backend": "pil"}
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                self.path, trust_remote_code=False, **local
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError(f"{self.name}: {self.path} has no image processor ({one_line(error)})") from error
        self._model = model.to(self.device)

    def values(self, asked: Asked) -> torch.Tensor:
        distinct: dict[tuple[Any, bytes], int] = {}
        references = asked.references or ()
        rows = [distinct.setdefault((one.shape, one.tobytes()), len(distinct)) for one in references]
        kept = {row: one for row, one in zip(rows, references, strict=True)}
        cosines = (self._embedded(list(asked.images)) * self._embedded(list(kept.values()))[rows]).sum(-1)
        return cosines.clamp(-1, 1)  # equal pictures come out above 1 by a rounding, on some processors

    def _embedded(self, pictures: Sequence[Images]) -> torch.Tensor:
        """Return the unit embeddings (N, D) of pictures (H, W, 3), each of its own size."""
        import torch

        inputs = [self._processor(images=middle(one), return_tensors="pt").pixel_values for one in pictures]
        joined = [torch.cat(inputs)] if len({one.shape for one in inputs}) == 1 else inputs
        found = torch.cat([self._features(part.to(self.device, self._model.dtype)) for part in joined])
        return torch.nn.functional.normalize(found.float(), dim=-1)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.kind == "Dinov2Model":
            return self._model(pixels).last_hidden_state[:, 0]
        return self._model.visual_projection(self._model.vision_model(pixels).pooler_output)
