"""What the public pipelines do beside calling their transformer: each a fact that our families reproduce or refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families.public import (
    apart,
    initial_noise,
    public_latents,
    public_pipeline,
    public_pixels,
    recorded,
    run_public,
)

Public = Callable[..., Any]
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra"
BAD = "blurry low quality picture"
SIZE = (64, 96)


def call(**changes: Any) -> dict[str, Any]:
    return {"num_steps": 2, "guidance": 4.0, "size": SIZE, "noise": initial_noise(1, SIZE), **changes}


def rows_called(model: Any, **changes: Any) -> list[int]:
    """Return the batch size of each call of the transformer in a walk of two steps."""
    with recorded(model) as calls:
        public_latents(model, [SHORT], **call(**changes))
    return [len(c["x"]) if "x" in c else len(c["hidden_states"]) for c in calls]


def test_when_a_second_pass_is_made(public: Public) -> None:
    """SD3, Chroma: above 1. FLUX: true guidance above 1 and a negative prompt. Qwen-Image: the same. Z-Image: above 0.

    SD3 and Z-Image put both passes in one batch (SD3 the negative first, Z-Image last); the others call twice.
    """
    assert rows_called(public("sd3"), guidance=1.1) == [2, 2]
    assert rows_called(public("sd3"), guidance=1.0, negative=BAD) == [1, 1]
    assert rows_called(public("flux-dev"), true_guidance=3.0) == [1, 1]
    assert rows_called(public("flux-dev"), true_guidance=3.0, negative="") == [1, 1, 1, 1]
    assert rows_called(public("flux-dev"), true_guidance=1.0, negative=BAD) == [1, 1]
    assert rows_called(public("qwen_image"), guidance=4.0) == [1, 1]
    assert rows_called(public("qwen_image"), guidance=4.0, negative="") == [1, 1, 1, 1]
    assert rows_called(public("qwen_image"), guidance=1.0, negative=BAD) == [1, 1]
    assert rows_called(public("z_image"), guidance=0.1) == [2, 2]
    assert rows_called(public("z_image"), guidance=0.0, negative=BAD) == [1, 1]
    assert rows_called(public("chroma"), guidance=1.1) == [1, 1, 1, 1]
    assert rows_called(public("chroma"), guidance=1.0, negative=BAD) == [1, 1]


@pytest.mark.parametrize("name", ["sd3", "z_image", "chroma"])
def test_no_negative_prompt_is_the_empty_one(public: Public, name: str) -> None:
    made, empty, other = (public_latents(public(name), [SHORT], **call(negative=n)) for n in (None, "", BAD))
    assert torch.equal(made, empty) and apart(other, made) > 0.01


def times(model: Any, **changes: Any) -> list[float]:
    with recorded(model) as calls:
        public_latents(model, [SHORT], **call(num_steps=4, **changes))
    return [(c["t"] if "x" in c else c["timestep"])[0].item() for c in calls]


def shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def test_the_times_of_a_walk(public: Public) -> None:
    """SD3's are 1000 sigma, the others' sigma, Z-Image's 1 - sigma. All but SD3 shift the levels 1, 3/4, 1/2, 1/4.

    SD3 asks for a number of steps: the scheduler's grid ends at its smallest level, which is shifted already. FLUX and
    Qwen-Image shift by exp(mu), mu linear in the number of image tokens, 24 here; Qwen-Image's end at 0.02.
    """
    grid = np.array([1, 3 / 4, 1 / 2, 1 / 4])
    sd3 = shifted(np.linspace(1, shifted(np.array(0.001), 3), 4), 3)
    assert np.allclose(times(public("sd3"), guidance=1.0), 1000 * sd3, rtol=1e-6)
    assert np.allclose(times(public("flux-schnell")), grid, rtol=1e-6)
    mu = 0.5 + (1.15 - 0.5) * (24 - 256) / (4096 - 256)
    assert np.allclose(times(public("flux-dev")), shifted(grid, np.exp(mu)), rtol=1e-6)
    qwen = shifted(grid, np.exp(0.5 + (0.9 - 0.5) * (24 - 256) / (8192 - 256)))
    assert np.allclose(times(public("qwen_image")), 1 - (1 - qwen) * 0.98 / (1 - qwen[-1]), rtol=1e-5)
    assert np.allclose(times(public("z_image"), guidance=0.0), 1 - shifted(grid, 6), rtol=1e-6)
    assert np.allclose(times(public("z_image-turbo"), guidance=0.0), 1 - shifted(grid, 3), rtol=1e-6)
    assert np.allclose(times(public("chroma"), guidance=1.0), shifted(grid, 3), rtol=1e-6)


def test_z_images_time_is_made_from_a_thousandth_of_a_time(public: Public) -> None:
    """(1000 - 1000 sigma) / 1000 in float32: 1 - sigma differs in the last digits, and the model multiplies by 1000.

    A walk with 1 - sigma was up to 9e-6 of the largest value away; with this, it was the same to the bit.
    """
    model = public("z_image")
    made = times(model, guidance=0.0)
    sigmas = model.scheduler.sigmas[:-1]
    assert made == ((1000 - sigmas * 1000) / 1000).tolist() != (1 - sigmas).tolist()


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "chroma"])
def test_padding_of_t5_takes_part(public: Public, name: str) -> None:
    """No mask, or one that only weighs: another ``max_sequence_length`` (256 for SD3, else 512) is another result."""
    model = public(name, t5=True) if name == "sd3" else public(name)
    short, long = (public_latents(model, [SHORT], **call(max_sequence_length=n)) for n in (48, 64))
    assert apart(long, short) > 0.001


def test_chromas_mask_is_added_to_the_scores_of_attention(public: Public) -> None:
    """So a token that it calls masked weighs e times less, and is not left out (diffusers' issue 12116).

    A text of four tokens, its end included, and the one behind them have a 1, and so has the image.
    """
    model = public("chroma")
    with recorded(model) as calls:
        made = public_latents(model, [SHORT], **call(num_steps=1, guidance=1.0, max_sequence_length=16))
    assert calls[0]["attention_mask"].tolist() == [[1.0] * 5 + [0.0] * 11 + [1.0] * 24]
    with torch.no_grad():
        less = {**calls[0], "attention_mask": calls[0]["attention_mask"] * 0.5}
        assert apart(*(model.transformer(**given)[0] for given in (less, calls[0]))) > 0.001
    assert made.isfinite().all()


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_padding_of_qwen_takes_no_part(public: Public, name: str) -> None:
    model = public(name)
    short, long = (public_latents(model, [SHORT], **call(max_sequence_length=n)) for n in (48, 64))
    assert torch.equal(long, short)


def test_qwen_image_pads_to_its_longest_prompt(public: Public) -> None:
    """Zeros and a mask, which is None where nothing is padded; the tokens of the template's end stay."""
    embeds, mask = public("qwen_image").encode_prompt([SHORT, LONG])
    assert mask.sum(1).tolist() == [8, embeds.shape[1]] and not embeds[0, 8:].any()
    assert public("qwen_image").encode_prompt([SHORT, SHORT])[1] is None


def test_z_image_pads_captions_and_images_to_multiples_of_32(public: Public) -> None:
    """With learned tokens that take part. Captions count from 1, padding included; an image begins right after."""
    model = public("z_image").transformer
    latent = initial_noise(1, SIZE)[0].unsqueeze(1)  # 24 tokens
    for tokens, start in ((11, 33), (32, 33), (33, 65)):
        images, captions, _, image_ids, caption_ids, image_pad, caption_pad = model.patchify_and_embed(
            [latent], [torch.randn(tokens, 32)], 2, 1
        )
        padded = len(captions[0])
        assert (len(images[0]), image_pad[0].sum().item()) == (32, 8)
        assert (padded, caption_pad[0].sum().item()) == (start - 1, start - 1 - tokens)
        # More ids than tokens: those beyond the padded caption are cut off later.
        assert caption_ids[0][:padded].tolist() == [[i + 1, 0, 0] for i in range(padded)]
        assert image_ids[0][[0, 23]].tolist() == [[start, 0, 0], [start, 3, 5]] and not image_ids[0][24:].any()


def test_qwen_images_text_stands_after_the_image(public: Public) -> None:
    """The image is centred; text begins at half its longer side, in all three axes. No position depends on the text."""
    rope = public("qwen_image").transformer.pos_embed
    image, text = rope([[(1, 4, 6)]], max_txt_seq_len=2, device=torch.device("cpu"))
    frame, rows, columns = (part[:, 0].angle().view(4, 6) for part in image.split([2, 3, 3], dim=1))
    assert not frame.any()
    assert torch.allclose(rows[:, 0], torch.arange(-2.0, 2)) and torch.allclose(columns[0], torch.arange(-3.0, 3))
    starts = torch.stack([part[:, 0].angle() for part in text.split([2, 3, 3], dim=1)])
    assert torch.allclose(starts, torch.tensor([3.0, 4.0 - 2 * np.pi]).expand(3, 2), atol=1e-5)


def test_fluxs_text_stands_at_the_origin(public: Public) -> None:
    with recorded(public("flux-dev")) as calls:
        public_latents(public("flux-dev"), [SHORT], **call(max_sequence_length=16))
    assert calls[0]["txt_ids"].shape == (16, 3) and not calls[0]["txt_ids"].any()
    assert calls[0]["img_ids"][[0, 7, 23]].tolist() == [[0, 0, 0], [0, 1, 1], [0, 3, 5]]
    assert calls[0]["guidance"].tolist() == [4.0]  # the transformer multiplies by 1000, as it does the time


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen_image", "z_image", "chroma"])
def test_sides_that_16_does_not_divide(public: Public, name: str) -> None:
    """FLUX, Chroma and Qwen-Image cut them down; SD3 and Z-Image refuse them."""
    odd = call(size=(72, 79), noise=initial_noise(1, (64, 64)))
    if name in ("flux-dev", "qwen_image", "chroma"):
        assert public_pixels(public(name), [SHORT], **odd).shape == (1, 64, 64, 3)
    else:
        with pytest.raises(ValueError, match="divisible"):
            public_pixels(public(name), [SHORT], **odd)


def levels_of(images: Tensor) -> Tensor:
    return ((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def test_how_latents_are_scaled_before_they_are_decoded(public: Public, family: str) -> None:
    """x / scaling + shift, but in Qwen-Image x * deviation + mean, channel by channel, in its 5-D autoencoder."""
    model = public(family)
    made = public_latents(model, [SHORT], **call())
    config = model.vae.config
    if family == "qwen_image":
        mean, deviation = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        decoded = model.vae.decode(made.unsqueeze(2) * deviation + mean).sample[:, :, 0]
    else:
        decoded = model.vae.decode(made / config.scaling_factor + config.shift_factor).sample
    assert (levels_of(decoded).int() - public_pixels(model, [SHORT], **call()).int()).abs().max() <= 1


def test_z_image_writes_its_template_into_the_list_of_prompts(public: Public) -> None:
    """So a second call with the same list would apply it twice; the negative prompts' list too."""
    prompts = [SHORT]
    public("z_image").encode_prompt(prompts)
    assert prompts == ["<|im_start|>user\na red cube<|im_end|>\n<|im_start|>assistant\n"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sd3", "bfloat16"), ("flux-dev", "bfloat16"), ("chroma", "bfloat16"), ("z_image", "float32")],
)
def test_what_a_walk_in_bfloat16_keeps(tiny: Public, name: str, dtype: str) -> None:
    """States are rounded to bfloat16 after every step, but Z-Image's, whose latents and guidance are float32.

    FLUX, Chroma and Qwen-Image round the time too (1000 sigma, then sigma); SD3 and Z-Image hand over float32.
    """
    states: list[torch.dtype] = []

    def note(_: Any, step: int, time: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(kept["latents"].dtype)
        return kept

    model = public_pipeline(tiny(name)).to(torch.bfloat16)
    with recorded(model) as calls:
        run_public(model, [SHORT], output_type="latent", callback_on_step_end=note, **call())
    assert set(states) == {getattr(torch, dtype)}
    time = calls[1]["t" if name == "z_image" else "timestep"]
    assert time.dtype == (torch.bfloat16 if name in ("flux-dev", "chroma") else torch.float32)
