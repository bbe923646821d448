"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP with a head tuned on people's rankings of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rewards.interface import Asked, Images, SpecError, one_line
from rewards.models.batched import Batched
from rewards.models.blip import Blip
from rewards.models.customcode import refuse_custom_code
from rewards.models.linear import Layers, applied, chain
from rewards.models.pretrained import check_dtype, first_of, middle

if TYPE_CHECKING:
    import torch

_WEIGHTS = ("model.safetensors", "ImageReward.safetensors", "ImageReward.pt")
_TOKENIZER = ("tokenizer.json", "vocab.txt")
_LENGTH = 35  # tokens of a prompt; a longer one is cut
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the training set, as published


class ImagerewardScorer(Batched):
    """``imagereward``: how well an image pleases for its prompt, standard normal over its training set, about -2 to 2.

    ``path`` is a directory with the published ``ImageReward.pt`` (or the same as ``model.safetensors``) and
    ``med_config.json``; ``processor``, the directory of ``bert-base-uncased`` where its ``vocab.txt`` or
    ``tokenizer.json`` is not in ``path``. The centre square of an image is seen, resized by PIL. A prompt is cut after
    33 word pieces.
    """

    name = "imagereward"
    range = (-np.inf, np.inf)

    def __init__(
        self,
        *,
        path: str,
        processor: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        check_dtype(self.name, dtype)
        what = "the directory of THUDM/ImageReward"
        self.weights = first_of(self.name, path, _WEIGHTS, what)
        self.config = first_of(self.name, path, ["med_config.json"], what)
        self.processor = processor or path
        first_of(self.name, self.processor, _TOKENIZER, "that of bert-base-uncased as `processor`")
        refuse_custom_code(self.name, path, self.processor)
        self.dtype = dtype
        self._head: Layers = []

    def load(self) -> None:
        """Load BLIP, head and tokenizer; raises ``SpecError`` where the files do not make them."""
        import torch
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
        from transformers import BertTokenizer

        try:
            state = _state(self.weights)
            config = json.loads(self.config.read_bytes())
            inner = {key.removeprefix("blip."): value for key, value in state.items() if key.startswith("blip.")}
            self._blip = Blip(inner, config).to(self.device, getattr(torch, self.dtype))
            self._tokenizer = BertTokenizer.from_pretrained(
                self.processor, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
            raise SpecError(f"{self.name}: {self.weights} did not load as ImageReward ({one_line(error)})") from error
        head = {key: value.to(self.device) for key, value in state.items() if key.startswith("mlp.")}
        self._head = chain(self.name, str(self.weights), head)
        if len(head) != 2 * len(self._head):
            raise SpecError(f"{self.name}: {self.weights} lacks a bias of its head; give the whole ImageReward")
        size = self._blip.size
        self._cut = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])

    def values(self, asked: Asked) -> torch.Tensor:
        text: Any = self._tokenizer(
            asked.prompts, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt"
        ).to(self.device)
        features = self._blip.first_tokens(self._pixels(asked.images), text.input_ids, text.attention_mask)
        return (applied(self._head, features.float()) - _MEAN) / _STD

    def _pixels(self, images: Images) -> torch.Tensor:
        """Return the model input (N, 3, h, w)."""
        import torch
        from PIL import Image
        from torchvision.transforms.functional import normalize
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        cut = np.stack([np.asarray(self._cut(Image.fromarray(middle(image)))) for image in images])
        pixels = torch.from_numpy(cut).to(self.device).permute(0, 3, 1, 2).float() / 255
        return normalize(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD).to(getattr(torch, self.dtype))


def _state(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, on the CPU; nothing in it is run."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each library has errors of its own for a file without weights
        raise ValueError(f"it holds no weights: {one_line(error)}") from error
