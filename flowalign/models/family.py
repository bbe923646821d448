"""The contract of a model family: the facts by which a kind of pipeline directory is loaded, asked and written.

Shapes: N samples, P prompts, C h w latents, L text tokens.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from flowalign.config.sections import TransformerConfig
from flowalign.models.coding import decode_scaled, encode_scaled
from flowalign.models.errors import ModelError
from flowalign.types import Guidance
from rewards.usercode.loading import load_module

Config = Mapping[str, Any]  # what a part's config.json says


@dataclass(frozen=True)
class Geometry:
    """The latents of a model: ``channels``, ``factor`` pixels a side of a latent, ``patch`` latents a side of a token.

    ``size`` is the side of the images that its pipeline makes unasked, in pixels; ``table`` the number of tokens a side
    that its positions end at, 0 where they do not.
    """

    channels: int
    factor: int
    patch: int
    size: int
    table: int = 0


@dataclass(frozen=True)
class TextPart:
    """The place of one text encoder's output in a condition: tokens [begin, end) and their features, pooled features.

    An ``end`` of None is the end of the text, whose length may vary.
    """

    tokens: tuple[int, int | None]
    features: tuple[int, int]
    pooled: tuple[int, int]


@dataclass(frozen=True)
class Published:
    """What is known of a published model whose files are not there: the configuration of each part by its folder.

    ``parameters`` are the numbers of parameters of parts whose configuration is not needed; that of others
    names their class, as ``_class_name`` or as transformers' ``architectures``. ``source`` names the model,
    ``file_bytes`` is what its files take, None where that is not known.
    """

    source: str
    parts: Mapping[str, Config]
    parameters: Mapping[str, int] = field(default_factory=dict)
    file_bytes: int | None = None


def heads_and_layers(transformer: Config) -> tuple[int, int]:
    """Return the width and the number of blocks of a network, as most configurations name them."""
    width = int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
    return width, int(transformer["num_layers"])


class SmallFiles(Protocol):
    """The small files of a pipeline, see ``models.directory``."""

    @property
    def path(self) -> Path: ...

    def config(self, part: str) -> Config:
        """Return what the ``config.json`` of a part says."""
        ...

    def has(self, part: str) -> bool:
        """Tell whether the pipeline has a part."""
        ...


class Forward(Protocol):
    """Calls a family's module: latents ``x`` (N, C, h, w) at times ``t`` (N,) in [0, 1] to dx/dt of the straight path.

    ``text`` has a row a sample; ``ticks`` is the scheduler's ``num_train_timesteps``, ``guidance`` (N,) what a module
    that takes a scale is given. The answer is of the shape of ``x``.
    """

    def __call__(
        self, module: Any, x: Tensor, t: Tensor, text: Mapping[str, Tensor], *, ticks: int, guidance: Tensor | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class ModelFamily:
    """One family, the value ``FAMILY`` of its module: what is true of its pipelines and not of every pipeline.

    ``pipeline`` and ``network`` name the diffusers classes of the pipeline and of its part ``transformer``. ``text``
    are the parts that read prompts, encoders and tokenizers; those in ``optional`` a directory may lack.

    ``geometry`` reads the configurations of transformer and autoencoder. ``forward`` calls the network; ``packed`` says
    that the pipeline takes and gives latents as rows of tokens, see ``models.packing``. ``encode`` reads one prompt by
    a loaded pipeline: rows of one prompt by name, (1, ...), ``tokens`` among them, with a text of ``length`` tokens at
    most. ``text_shapes`` tells the shapes of those rows, without the 1, from the small files. ``decode`` and
    ``encode_pictures`` stand between latents and pixels, see ``models.coding``. ``blocks`` reads the network's width
    and its number of blocks.

    ``padding``: 0, or the number of tokens that a text's length is padded to a multiple of. Then ``encode`` gives the
    text as long as it is, and ``count_tokens`` says by the tokenizer alone how long that is of a prompt; ``forward``
    gets ``tokens`` with zeros behind them and a ``mask`` (N, L), and takes texts without a mask as whole. Else every
    text is as long as ``length`` makes it. ``negative`` is the prompt that guidance leads away from where nobody names
    one; None: there is no guidance without one.

    ``levels`` are those that the pipeline hands its scheduler for a number of steps; None: it hands it the number.
    ``takes_guidance`` tells whether a network takes the guidance scale as an input. ``guidance_norm`` says what
    the pipeline does to the length of a guided velocity: nothing, or each ``token`` gets back that of the conditional
    one. ``guidance_offset`` is what a guidance scale here is above the pipeline's own number for it, ``guidance_call``
    the arguments of the pipeline's call that mean a guidance of ours of a network with this configuration.

    What not every family has: ``inputs`` names the row that numbers beside the time are appended to (``model.inputs``),
    ``text_parts`` the places of single encoders (``encoder_dropout``), ``fresh`` makes a network to begin
    anew with (``model.transformer``), given the configuration of the one that it replaces. ``own_pipeline`` is the
    module of a pipeline for diffusers, which samples what the plain one would sample wrongly: networks with further
    inputs, or of another path than the straight one (``model.family``). ``cached`` names the lists of blocks that a
    step cache may skip, in the order of their calls: each block takes ``hidden_states``, ``encoder_hidden_states``
    and ``temb`` by name and returns text and image, and the first has a ``norm1(hidden_states, emb=temb)``. ``masked``
    says that attention gets a mask, which not every kernel takes.
    ``published`` are models by the name of their folder.
    """

    name: str
    title: str
    pipeline: str
    network: str
    text: tuple[str, ...]
    lora_targets: tuple[str, ...]
    geometry: Callable[[Config, Config], Geometry]
    forward: Forward
    encode: Callable[[Any, str, int], dict[str, Tensor]]
    text_shapes: Callable[[SmallFiles, int], dict[str, tuple[int, ...]]]
    optional: tuple[str, ...] = ()
    packed: bool = False
    decode: Callable[[Any, Tensor], Tensor] = decode_scaled
    encode_pictures: Callable[[Any, Tensor], Tensor] = encode_scaled
    padding: int = 0
    count_tokens: Callable[[Any, str, int], int] | None = None
    negative: str | None = ""
    levels: Callable[[int], Sequence[float]] | None = None
    takes_guidance: Callable[[Config], bool] = lambda config: False
    guidance_norm: Literal["none", "token"] = "none"
    guidance_offset: float = 0.0
    guidance_call: Callable[[Config, Guidance], dict[str, Any]] = lambda network, own: {"guidance_scale": own.scale}
    blocks: Callable[[Config], tuple[int, int]] = heads_and_layers
    inputs: str | None = None
    text_parts: Callable[[SmallFiles], dict[str, TextPart]] | None = None
    fresh: Callable[[Config, TransformerConfig], nn.Module] | None = None
    own_pipeline: str | None = None
    cached: tuple[str, ...] = ()
    masked: bool = False
    published: Mapping[str, Published] = field(default_factory=dict)

    def full_text(self, directory: SmallFiles, length: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the rows of a text of the full ``length``, padded, without the 1."""
        if not self.padding:
            return self.text_shapes(directory, length)
        longest = math.ceil(length / self.padding) * self.padding
        return {**self.text_shapes(directory, longest), "mask": (longest,)}

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The folders that decide what prompts and pictures are encoded to."""
        return ("vae", *self.text)

    @property
    def required_parts(self) -> tuple[str, ...]:
        """The folders that a directory must have."""
        encoders = (part for part in self.text if part.startswith("text_encoder") and part not in self.optional)
        return ("transformer", "vae", *encoders, "scheduler")


def module_config(module: nn.Module) -> Config:
    """Return what a diffusers module was made with."""
    return module.config  # type: ignore[return-value]


@cache
def known_families() -> list[str]:
    """Return the names of the families that ship with the package."""
    folder = Path(__file__).parent / "families"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def family_of(name: str) -> ModelFamily:
    """Return the ``FAMILY`` of ``flowalign/models/families/<name>``, or of the module that a dotted path names.

    Raises:
        ModelError: there is no such module, it does not import, or holds no ``FAMILY``.
    """
    module_name = name if "." in name else f"flowalign.models.families.{name}"
    try:
        module = load_module(module_name) if "." in name else importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise ModelError(f"model.type: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, "FAMILY", None)
    if not isinstance(found, ModelFamily):
        raise ModelError(f"model.type: {module_name} holds no FAMILY, a flowalign.models.family.ModelFamily")
    return found
