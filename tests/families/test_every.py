"""What every family must show: our walk is the public pipeline's, replays exactly, and what we train it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.export import export
from flowalign.models.base import Policy
from flowalign.samples.opened import open_policy
from tests.families.ours import (
    LENGTH,
    PADDED,
    alone_and_among_others,
    assert_an_iteration_is_exported,
    card_class,
    our_latents,
    our_policy,
    replay_difference,
)
from tests.families.public import apart, initial_noise, public_latents, public_pipeline, public_pixels
from tests.families.tiny import FAMILIES
from tests.tiny import run_config, write_checkpoint

Build = Callable[..., Path]
Asked = dict[str, Any]
FLUX, Z_IMAGE = ("flux-dev", "flux-schnell"), ("z_image", "z_image-turbo")
NAMES = tuple(name for name in FAMILIES if name != "sd3")  # whose tests are older: tests/models, tests/export
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra and a camel"
TWO, FAR = [SHORT, LONG], [SHORT, LONG + ", " + LONG]
NEAR = [SHORT, "a photo of a small blue ball", "a green table near the old house"]  # texts that fill one bucket of 32
BAD = "blurry low quality picture"
TALL, WIDE, LARGE = (128, 80), (96, 64), (192, 128)
# What we are asked, and the public pipeline in other words. Without prompts they are two of other lengths.
OF_FLUX: dict[str, tuple[str, Asked, Asked]] = {
    "dev, number 1": ("flux-dev", {}, {}),
    "dev, number 3.5": ("flux-dev", {"guidance": 3.5, "size": TALL}, {}),
    "dev, large": ("flux-dev", {"guidance": 3.5, "size": LARGE}, {}),
    "dev, true": ("flux-dev", {"guidance": 1.5, "true_scale": 4.0, "negative": BAD}, {"true_guidance": 4.0}),
    "dev, true, empty": ("flux-dev", {"guidance": 3.5, "true_scale": 2.0, "negative": ""}, {"true_guidance": 2.0}),
    "schnell": ("flux-schnell", {"num_steps": 2}, {"guidance": 3.5}),  # a number that nobody reads
    "schnell, empty": ("flux-schnell", {"guidance": 2.0, "negative": ""}, {"guidance": 0.0, "true_guidance": 2.0}),
    "schnell, negative": (
        "flux-schnell",
        {"guidance": 4.0, "negative": BAD, "size": TALL},
        {"guidance": 0.0, "true_guidance": 4.0},
    ),
}
OF_QWEN_IMAGE: dict[str, Asked] = {
    "plain": {"prompts": [SHORT]},
    "unguided": {"negative": BAD, "size": WIDE},
    "guided": {"prompts": [SHORT], "guidance": 4.0, "negative": "", "size": WIDE},
    "negative": {"guidance": 4.0, "negative": BAD},
    "lengths": {"prompts": FAR, "guidance": 2.5, "negative": LONG, "size": (80, 112)},
    "large": {"prompts": [SHORT], "guidance": 4.0, "negative": " ", "size": (256, 192)},
}
OF_Z_IMAGE: dict[str, tuple[Asked, Asked]] = {
    "plain": ({"prompts": [SHORT]}, {"guidance": 0.0}),
    "guided": ({"prompts": [SHORT], "guidance": 5.0, "size": WIDE}, {"guidance": 4.0}),
    "negative": ({"guidance": 5.0, "negative": BAD}, {"guidance": 4.0}),
    "lengths": ({"prompts": FAR, "guidance": 3.5, "size": (80, 112)}, {"guidance": 2.5}),
    "capped": ({"guidance": 5.0, "norm_cap": 1.0, "num_steps": 5}, {"guidance": 4.0, "cfg_normalization": 1.0}),
    "shorter": (
        {"guidance": 5.0, "norm_cap": 0.6, "until": 0.2, "num_steps": 5},
        {"guidance": 4.0, "cfg_normalization": 0.6, "cfg_truncation": 0.2},
    ),
    "truncated": (
        {"prompts": [SHORT], "guidance": 5.0, "until": 0.3, "num_steps": 7},
        {"guidance": 4.0, "cfg_truncation": 0.3},
    ),
}
OF_CHROMA: dict[str, Asked] = {
    "plain": {"prompts": [SHORT]},
    "unguided": {"negative": BAD, "size": TALL},
    "guided": {"guidance": 4.0},
    "negative": {"guidance": 4.0, "negative": BAD, "size": TALL},
    "lengths": {"prompts": FAR, "guidance": 2.5, "negative": LONG},
    "cut": {"prompts": [20 * LONG], "guidance": 2.5},  # no token of padding is left
    "large": {"prompts": [SHORT], "guidance": 4.0, "size": (256, 192)},
}
WALKS = {
    **{f"flux: {walk}": asked for walk, asked in OF_FLUX.items()},
    **{f"qwen_image: {walk}": ("qwen_image", asked, {}) for walk, asked in OF_QWEN_IMAGE.items()},
    **{f"chroma: {walk}": ("chroma", asked, {}) for walk, asked in OF_CHROMA.items()},
    **{f"{name}: {walk}": (name, *asked) for name in Z_IMAGE for walk, asked in OF_Z_IMAGE.items()},
}
DTYPES = ("float32", "bfloat16")
REPLAYS: list[tuple[str, Any, float]] = [
    *((name, "float32", guidance) for name in FLUX for guidance in (1.0, 3.5)),
    *((name, dtype, guidance) for name in ("qwen_image", "chroma") for dtype in DTYPES for guidance in (1.0, 4.0)),
    *(("z_image", dtype, guidance) for dtype in DTYPES for guidance in (1.0, 5.0)),
]
# Our guidance of exports' latents, the public pipeline in other words, and what the card says of no guidance.
EXPORTS: dict[str, tuple[Asked, Asked, str]] = {
    "flux-dev": ({"guidance": 1.0}, {}, "guidance_scale=1,"),
    "flux-schnell": ({"guidance": 1.0}, {}, "num_inference_steps="),
    "qwen_image": ({"guidance": 4.0, "negative": BAD}, {}, "true_cfg_scale=1,"),
    "chroma": ({"guidance": 4.0, "negative": BAD}, {}, "guidance_scale=1,"),
    **{name: ({"guidance": 4.0}, {"guidance": 3.0}, "guidance_scale=0,") for name in Z_IMAGE},
}


@pytest.fixture(scope="module")
def policies(tiny: Build) -> Callable[[str], Policy]:
    """Return the policy of a tiny pipeline, loaded once; not to be changed."""
    loaded: dict[str, Policy] = {}

    def load(name: str) -> Policy:
        if name not in loaded:
            loaded[name] = our_policy(tiny(name))
        return loaded[name]

    return load


def test_every_family_is_walked_replayed_and_exported() -> None:
    walked, replayed = {name for name, *_ in WALKS.values()}, {name for name, *_ in REPLAYS}
    assert walked == EXPORTS.keys() == set(NAMES) and replayed | {"z_image-turbo"} == set(NAMES)


@pytest.mark.parametrize("walk", WALKS)
def test_our_latents_are_those_of_the_public_pipeline(policies: Any, public: Any, walk: str) -> None:
    """Within 1e-5 of the largest value, Z-Image's to the bit where nothing guides; pixels within a level."""
    name, own, other = WALKS[walk]
    asked = {"guidance": 1.0, "size": (64, 96), "num_steps": 4, **own}
    prompts, model = asked.pop("prompts", TWO), public(name)
    noise = initial_noise(len(prompts), asked["size"])
    ours = our_latents(policies(name), prompts, noise=noise, **asked)
    shared = {key: asked[key] for key in ("guidance", "size", "num_steps", "negative") if key in asked}
    call = {"noise": noise, "max_sequence_length": LENGTH, **shared, **other}
    exact = name in Z_IMAGE and asked["guidance"] == 1
    assert apart(ours, public_latents(model, prompts, **call)) <= (0 if exact else 1e-5)
    pixels = public_pixels(model, prompts, **call)
    assert (policies(name).encoders.decode(ours).int() - pixels.int()).abs().max() <= 1


@pytest.mark.parametrize(("name", "dtype", "guidance"), REPLAYS)
def test_a_stochastic_rollout_replays_bit_for_bit(tiny: Build, name: str, dtype: Any, guidance: float) -> None:
    other = LONG if name in FLUX else "a blue ball"
    assert replay_difference(our_policy(tiny(name), dtype), [SHORT, SHORT, other, other], guidance) == 0


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *((name, 3.5) for name in FLUX),
        *((name, guidance) for name in ("qwen_image", "chroma") for guidance in (1.0, 4.0)),
        *((name, guidance) for name in Z_IMAGE for guidance in (1.0, 5.0)),
    ],
)
def test_a_sample_alone_has_the_bits_that_it_has_among_others(policies: Any, name: str, guidance: float) -> None:
    """Of one bucket where texts are padded: with zeros and a mask, or by the network itself.

    An autoencoder is called with what there is, and sums in another order for a single picture: that of films anywhere,
    others on some processors. Pixels are within a level, latents equal.
    """
    prompts = [SHORT, LONG, "a blue ball"] if name in FLUX else NEAR
    for alone, among_others in alone_and_among_others(policies(name), prompts, guidance, negative=BAD):
        if alone.dtype == torch.uint8:
            assert (alone.int() - among_others.int()).abs().max() <= 1
        else:
            assert torch.equal(alone, among_others)


@pytest.mark.parametrize("name", PADDED)
def test_lengths_are_counted_as_prompts_are_encoded(policies: Any, name: str) -> None:
    """By the tokenizer alone; line breaks at the ends, marks of the template and what is cut included."""
    encoders = policies(name).encoders
    for prompt in ("", SHORT, LONG, "\n\na red cube \n", "<|im_end|>\n", "crème brûlée 猫", 30 * LONG):
        for length in (16, LENGTH):
            mask = encoders.encode_prompts([prompt], length).text["mask"]
            assert encoders.family.count_tokens(encoders.pipeline.tokenizer, prompt, length) == mask.sum()


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_exports_are_loaded_by_plain_diffusers(tiny: Build, tmp_path: Path, name: str, kind: str) -> None:
    """With the latents of the trained policy; `export` compares both layouts of a LoRA before it keeps them."""
    own, other, said = EXPORTS[name]
    base = tiny(name)
    asked: Asked = {"num_steps": 4, "size": (64, 64), "noise": initial_noise(2, (64, 64)), **own}
    model = {"path": str(base), "max_sequence_length": LENGTH, "lora": {"rank": 4, "alpha": 6}}
    config = run_config(base, model={**model, "height": 64, "width": 64})
    write_checkpoint(tmp_path / "run", config)
    made = export(tmp_path / "run", tmp_path / "out", kind=kind, config=config)
    assert max(made.velocity_error, made.latents_error) <= 1e-5
    ours = our_latents(open_policy(tmp_path / "run", config)[0], TWO, **asked)
    plain = public_pipeline(base if kind == "lora" else made.path)
    assert card_class(made.path) == type(plain).__name__ and not (made.path / "pipeline.py").exists()
    assert said in (made.path / "README.md").read_text()
    call = {**asked, "max_sequence_length": LENGTH, **other}
    if kind == "lora":
        assert apart(public_latents(plain, TWO, **call), ours) > 0.01
        plain.load_lora_weights(str(made.path))
    assert apart(public_latents(plain, TWO, **call), ours) <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [("flux-dev", ("algorithm.guidance_scale=3.5",)), ("qwen_image", ()), ("z_image-turbo", ()), ("chroma", ())],
)
def test_an_iteration_of_flow_grpo_ends_in_an_export(
    tiny: Build, tmp_path: Path, name: str, changes: tuple[str, ...]
) -> None:
    assert_an_iteration_is_exported(tmp_path, tiny(name), *changes)
    public_pipeline(tiny(name)).load_lora_weights(str(tmp_path / "lora"))
