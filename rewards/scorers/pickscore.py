"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): a CLIP model tuned on human preferences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from rewards.interface import Asked, Images, SpecError, one_line
from rewards.models.batched import Batched
from rewards.models.customcode import refuse_custom_code
from rewards.models.pretrained import check_dtype, load_model

if TYPE_CHECKING:
    import torch

Scale = Literal["raw", "/26"]


class PickscoreScorer(Batched):
    """``pickscore``: logit scale × cosine similarity, about 15 to 26 with the published weights.

    ``path`` is the directory of a transformers ``CLIPModel``; ``processor``, if its tokenizer and image
    processor lie elsewhere, theirs. ``scale: /26`` divides by 26, as Flow-GRPO does.
    """

    name = "pickscore"
    range = (-np.inf, np.inf)

    def __init__(
        self,
        *,
        path: str,
        processor: str | None = None,
        scale: Scale = "raw",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        if scale not in get_args(Scale):
            raise SpecError(f"pickscore: scale {scale!r} is unknown; write raw or /26")
        check_dtype(self.name, dtype)
        self.path = path
        self.processor = processor or path
        # transformers 5 writes an image processor into processor_config.json, older ones into a file of its own.
        needed = ((path, ("config.json",)), (self.processor, ("preprocessor_config.json", "processor_config.json")))
        for directory, files in needed:
            if not any(os.path.isfile(Path(directory) / file) for file in files):
                raise SpecError(
                    f"pickscore: {directory} holds no {files[0]}; give the directory of a transformers CLIPModel"
                    " (`path`) and of its tokenizer and image processor (`processor`)"
                )
        refuse_custom_code("pickscore", path, self.processor)
        self.factor = 1.0 if scale == "raw" else 1 / 26
        self.dtype = dtype
        self._model: Any = None

    def load(self) -> None:
        """Load the model from its directory; nothing is downloaded."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model = load_model(self.name, CLIPModel, self.path, self.dtype)
        local: Any = {"local_files_only": True}
        try:
            self._images = AutoImageProcessor.from_pretrained(self.processor, trust_remote_code=False, **local)
            self._tokenizer = AutoTokenizer.from_pretrained(self.processor, trust_remote_code=False, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError(f"pickscore: {self.processor} did not load as a processor ({one_line(error)})") from error
        self._model = model.to(self.device)

    def values(self, asked: Asked) -> torch.Tensor:
        scale = self._model.logit_scale.exp().float() * self.factor
        return scale * (self._image(asked.images) * self._text(asked.prompts)).sum(-1)

    def _image(self, images: Images) -> torch.Tensor:
        """Return the unit embeddings (N, D)."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        inputs = self._images(images=list(pixels), return_tensors="pt").pixel_values
        pooled = self._model.vision_model(inputs.to(self.device, self._model.dtype)).pooler_output
        return torch.nn.functional.normalize(self._model.visual_projection(pooled).float(), dim=-1)

    def _text(self, prompts: list[str]) -> torch.Tensor:
        """Return the unit embeddings (N, D), each distinct prompt encoded once."""
        import torch

        unique = list(dict.fromkeys(prompts))
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        pooled = self._model.text_model(**tokens).pooler_output
        text = torch.nn.functional.normalize(self._model.text_projection(pooled).float(), dim=-1)
        return text[torch.tensor([unique.index(prompt) for prompt in prompts], device=text.device)]
