"""Lines of other libraries that tell a user of this project nothing: known ones, each with why it is left out.

Everything else that a library says is shown. The list is by logger (or by category of a Python warning) and text, so
that a new warning of the same library is never hidden.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """One line of a library: the logger that says it, or ``python`` for a Python warning, what it says, and why it
    is left out. ``text`` is a regular expression for its beginning."""

    source: str
    text: str
    why: str


_CLIP = "we count such prompts once at the start, instead of a paragraph for each prompt and encoder"
_NAMED = "export says what it compared; an encoder that the model does not have needs no file"

UNREAD_INPUTS = (
    Known(
        "diffusers.models.modeling_utils",
        r"Some weights of the model checkpoint at .* were not used when initializing [^\n]*\n"
        r"[\s\['\"]*time_text_embed\.inputs\.[\w.]+(,\s*time_text_embed\.inputs\.[\w.]+)*[\s\]'\"]*$",
        "the weights of added inputs, which models/inputs.py reads right afterwards; other names are shown",
    ),
)
KNOWN = (
    *UNREAD_INPUTS,
    Known(
        "diffusers.models.modeling_utils",
        r"There are modules in \w+ that should be kept in float32: \[\]",
        "the list that it warns of is empty",
    ),
    Known("diffusers.pipelines.pipeline_utils", r"self\.(text_encoder|tokenizer)_3=None of type", _NAMED),
    Known(
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        r"The following part of your input was truncated because CLIP can only handle",
        _CLIP,
    ),
    Known(
        "diffusers.pipelines.flux.pipeline_flux",
        r"The following part of your input was truncated because CLIP can only handle",
        _CLIP,
    ),
    Known(
        "diffusers.loaders.lora_base",
        r"No LoRA keys associated to \w+ found with the prefix='text_encoder",
        "a LoRA here is one of the network: text encoders do not learn",
    ),
    Known("transformers.tokenization_utils_base", r"Token indices sequence length is longer than the specified", _CLIP),
    Known("DeepSpeed", r"Setting accelerator to CPU", "cluster.device says so; it is asked for, not a fallback"),
    Known(
        "python",
        r"The pynvml package is deprecated",
        "of torch on a machine with a GPU; which NVML package is installed changes nothing here",
    ),
    Known(
        "python",
        r"Mismatch dtype between input and weight: .* Cannot dispatch to fused implementation",
        "autocast runs a norm of float32 weights in a plain kernel instead of the fused one; the result is meant",
    ),
    Known(
        "python",
        r"`torch\.jit\.script` is deprecated",
        "of torch's own rules for a derivative forward, which MeanFlow takes",
    ),
    Known(
        "python",
        r"`FluxPosEmbed` is deprecated",
        "diffusers' own networks (Chroma) take it from where diffusers had it before",
    ),
    Known(
        "python",
        r"Tip: In future versions of Ray, Ray will no longer override accelerator visible devices",
        "cluster/session.py sets the behaviour that it announces for every worker",
    ),
    Known("ray.dashboard.modules.dashboard_sdk", r"Uploading package ", "launch says that the job was submitted"),
    Known("ray.dashboard.modules.dashboard_sdk", r"Package .* already exists", "as above"),
    Known("ray._private.runtime_env.packaging", r"(Creating a file package|Pushing file package|Success)", "as above"),
)


def silence(known: Sequence[Known] = KNOWN) -> None:
    """Leave the known lines out of this process from now on; may be called again. Loads no library."""
    for line in known:
        if line.source == "python":
            warnings.filterwarnings("ignore", message=line.text)
        else:
            logger = logging.getLogger(line.source)
            if not any(getattr(present, "line", None) == line for present in logger.filters):
                logger.addFilter(_Unless(line))


class _Unless(logging.Filter):
    """Passes what is not ``line``."""

    def __init__(self, line: Known) -> None:
        super().__init__()
        self.line, self._text = line, re.compile(line.text, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text.match(record.getMessage()) is None
