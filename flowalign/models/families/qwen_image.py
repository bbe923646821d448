"""Qwen-Image.

LoRA targets are those of Flow-GRPO's own training of its sister for edits (``scripts/train_qwenimage_edit_plus.py`` of
yifan123/flow_grpo): attention and feed-forward layers of both streams. Configurations of the published model were read
in ports that quote its files; their sizes are those that its indices of shards state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowalign.models.coding import decode_frame, encode_frame
from flowalign.models.errors import ModelError
from flowalign.models.family import Config, Geometry, ModelFamily, Published, SmallFiles
from flowalign.models.packing import packed, unpacked
from flowalign.models.scheduler import to_one_nth
from flowalign.types import Guidance

PATCH = 2  # latents a side of a token, whatever the network's configuration says
# The pipeline pads to the longest prompt of a call. Of 32 there are few lengths, so that micro-batches fill, and at
# most 31 tokens too many beside the 4,096 of an image.
BUCKET = 32
WHOLE = 1000  # what the pipeline takes a time as a share of, whatever the scheduler's number of times
# What the network's class has and its pipeline does not hand over.
UNUSED = ("guidance_embeds", "use_additional_t_cond")


def geometry(transformer: Config, vae: Config) -> Geometry:
    for option in UNUSED:
        if transformer.get(option):
            raise ModelError(
                f"model.path: {option} is set, which the public pipeline cannot sample; give another model"
            )
    return Geometry(int(transformer["in_channels"]) // PATCH**2, 2 ** len(vae["temperal_downsample"]), PATCH, 1024)


def forward(
    module: Any, x: Tensor, t: Tensor, text: Mapping[str, Tensor], *, ticks: int, guidance: Tensor | None
) -> Tensor:
    """Call the network on packed latents; the place of a text depends on the image's size alone.

    A mask is given even where nothing is padded, so that a row's bits do not hang on its neighbours.
    """
    rows, columns = (side // PATCH for side in x.shape[-2:])
    tokens = module(
        hidden_states=packed(x, PATCH),
        timestep=t * ticks / WHOLE,
        encoder_hidden_states=text["tokens"],
        encoder_hidden_states_mask=text.get("mask"),
        img_shapes=[[(1, rows, columns)]] * len(x),
        return_dict=False,
    )[0]
    return unpacked(tokens, x, PATCH)


def encode(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    """Encode one prompt; of its template the pipeline drops the beginning, and then cuts it to ``length``."""
    tokens, _ = pipeline.encode_prompt([prompt], device=pipeline.vae.device, max_sequence_length=length)
    return {"tokens": tokens}


def count_tokens(tokenizer: Any, prompt: str, length: int) -> int:
    """Count the tokens of a prompt and of the template's end: those before, to the turn's name, are dropped."""
    turn = "<|im_start|>user\n"
    whole = tokenizer(f"{turn}{prompt}<|im_end|>\n<|im_start|>assistant\n").input_ids
    return min(len(whole) - len(tokenizer(turn).input_ids), length)


def guidance_call(transformer: Config, guidance: Guidance) -> dict[str, Any]:
    """Return the arguments of guidance away from an empty prompt: without a negative one the pipeline has none."""
    call: dict[str, Any] = {"true_cfg_scale": guidance.scale}
    return {**call, "negative_prompt": ""} if guidance.scale > 1 else call


def text_shapes(directory: SmallFiles, length: int) -> dict[str, tuple[int, ...]]:
    return {"tokens": (length, int(directory.config("transformer")["joint_attention_dim"]))}


_NETWORK: dict[str, Any] = {  # Qwen/Qwen-Image, transformer/config.json
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_SCHEDULER = {"use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
_FROZEN = {"vae": 126_892_531, "text_encoder": 8_292_166_656}  # Qwen2.5-VL-7B
_VAE = {"_class_name": "AutoencoderKLQwenImage", "temperal_downsample": [False, True, True]}
_PARTS = {"transformer": _NETWORK, "vae": _VAE, "scheduler": _SCHEDULER}

FAMILY = ModelFamily(
    name="qwen_image",
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    network="QwenImageTransformer2DModel",
    text=("text_encoder", "tokenizer"),
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    geometry=geometry,
    forward=forward,
    encode=encode,
    packed=True,
    text_shapes=text_shapes,
    decode=decode_frame,
    encode_pictures=encode_frame,
    padding=BUCKET,
    count_tokens=count_tokens,
    negative=None,
    levels=to_one_nth,
    guidance_norm="token",
    guidance_call=guidance_call,
    masked=True,
    published={"qwen-image": Published("Qwen-Image", _PARTS, _FROZEN, 57_700_000_000)},
)
