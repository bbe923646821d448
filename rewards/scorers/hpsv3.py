"""Human Preference Score v3 (Ma et al. 2025, arXiv:2508.03789): Qwen2-VL with a head tuned on people's choices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rewards.interface import Asked, Images, SpecError, one_line
from rewards.models.batched import Batched
from rewards.models.customcode import refuse_custom_code
from rewards.models.pretrained import check_dtype, first_of, middle

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_FILES = ("HPSv3.safetensors", "config.json", "preprocessor_config.json", "tokenizer_config.json", "instruction.txt")
_PROMPT, _REWARD, _IMAGE = "{text_prompt}", "<|Reward|>", "<|image_pad|>"
_SIDE, _TILES = 28, 256  # pixels of a side of a tile, which becomes one token; tiles that an image is scaled to
_HEAD = ("rm_head.0", "rm_head.3", "rm_head.5")


class Hpsv3Scorer(Batched):
    """``hpsv3``: mean of the preference for an image under its prompt, about 0 to 15 with the published weights.

    ``path`` is a directory with the published ``HPSv3.safetensors``, the configuration, tokenizer and image processor
    of Qwen2-VL-7B-Instruct beside it, and ``instruction.txt``: the words that the model was trained to be asked with,
    where {text_prompt} stands for the prompt and <|Reward|> for the token that is read. The whole image is seen,
    resized by PIL to about 256 tiles of 28 pixels.
    """

    name = "hpsv3"
    range = (-np.inf, np.inf)

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "cpu",
        batch_size: int = 8,
    ) -> None:
        super().__init__(device, batch_size)
        check_dtype(self.name, dtype)
        for file in _FILES:
            first_of(self.name, path, [file], "a directory of HPSv3 as docs/rewards.md has it")
        refuse_custom_code(self.name, path)
        self.path, self.dtype = path, dtype
        try:
            self.instruction = (Path(path) / "instruction.txt").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SpecError(f"{self.name}: {path}/instruction.txt cannot be read ({one_line(error)})") from error
        if self.instruction.count(_PROMPT) != 1 or self.instruction.count(_REWARD) != 1:
            raise SpecError(f"{self.name}: {path}/instruction.txt must have {_PROMPT} and {_REWARD}, each once")

    def load(self) -> None:
        """Load network, head, tokenizer and image processor; raises ``SpecError`` where the files do not make them."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoImageProcessor, AutoTokenizer

        local: Any = {"local_files_only": True}
        try:
            weights = load_file(Path(self.path) / _FILES[0])
            self._network = _network(self.path, weights, self.dtype).to(self.device)
            self._head = [(weights[f"{n}.weight"].float(), weights[f"{n}.bias"].float()) for n in _HEAD]
            self._tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, **local)
            self._images = AutoImageProcessor.from_pretrained(
                self.path, backend="pil", trust_remote_code=False, **local
            )
            self._template = self._tokenizer.chat_template or _legacy_template(self.path)
        except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
            raise SpecError(f"{self.name}: {self.path} did not load as HPSv3 ({one_line(error)})") from error
        self._head = [(weight.to(self.device), bias.to(self.device)) for weight, bias in self._head]
        self._tokenizer.add_tokens([_REWARD], special_tokens=True)
        self._reward, self._image = self._tokenizer.convert_tokens_to_ids([_REWARD, _IMAGE])
        if self._reward >= (rows := self._network.get_input_embeddings().num_embeddings):
            raise SpecError(
                f"{self.name}: {self.path} has {rows} tokens, and {_REWARD} would be one more; give its own"
            )

    def values(self, asked: Asked) -> torch.Tensor:
        import torch

        seen = self._images(images=[_resized(image) for image in asked.images], return_tensors="pt")
        grid, pixels = seen.image_grid_thw.to(self.device), seen.pixel_values.to(self.device, self._network.dtype)
        tiles = int(seen.image_grid_thw[0].prod()) // self._images.merge_size**2
        text: Any = self._tokenizer(
            [self._asked(prompt).replace(_IMAGE, _IMAGE * tiles) for prompt in asked.prompts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(self.device)
        embedded = self._network.get_input_embeddings()(text.input_ids)
        places = (text.input_ids == self._image)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(places, self._network.visual(pixels, grid_thw=grid).pooler_output)
        # Positions count tokens, those of an image too: HPSv3 was trained without Qwen2-VL's places in the image.
        states = self._network.language_model(inputs_embeds=embedded, attention_mask=text.attention_mask)
        found = states.last_hidden_state[text.input_ids == self._reward].float()
        for weight, bias in self._head[:-1]:
            found = torch.relu(found @ weight.T + bias)
        weight, bias = self._head[-1]
        return (found @ weight.T + bias)[:, 0]

    def _asked(self, prompt: str) -> str:
        """Return the text of one question; what looks like one of the model's own marks in a prompt is taken out."""
        for mark in (_IMAGE, _REWARD, *self._tokenizer.get_added_vocab()):
            prompt = prompt.replace(mark, "")
        content = [{"type": "image"}, {"type": "text", "text": self.instruction.replace(_PROMPT, prompt)}]
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )


def _network(path: str, weights: dict[str, torch.Tensor], dtype: str) -> Any:
    """Return Qwen2-VL without its own last layer, with as many tokens as the weights have."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config: Any = Qwen2VLConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config.text_config.vocab_size = len(weights["model.embed_tokens.weight"])
    own = {key.replace("model.", "language_model.", 1): value for key, value in weights.items()}
    own = {key: value for key, value in own.items() if key.startswith(("language_model.", "visual."))}
    loaded: Any = Qwen2VLModel.from_pretrained(
        None,
        config=config,
        state_dict=own,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, report = loaded
    if lacking := sorted(report["missing_keys"]) or sorted(report["mismatched_keys"]):
        raise KeyError(lacking[0])
    return model.eval()


def _legacy_template(path: str) -> str:
    return json.loads((Path(path) / "chat_template.json").read_bytes())["chat_template"]


def _resized(image: Images) -> Image:
    """Scale an image to whole tiles, of which there are about 256, with its proportions about kept."""
    from PIL import Image

    cut = Image.fromarray(middle(image))
    area, pixels = math.prod(cut.size), _TILES * _SIDE**2
    sides = [max(1, round(side / _SIDE)) for side in cut.size]
    if math.prod(sides) > _TILES:
        sides = [math.floor(side / math.sqrt(area / pixels) / _SIDE) for side in cut.size]
    elif math.prod(sides) < _TILES:
        sides = [math.ceil(side * math.sqrt(pixels / area) / _SIDE) for side in cut.size]
    return cut.resize((sides[0] * _SIDE, sides[1] * _SIDE), Image.Resampling.BICUBIC)
