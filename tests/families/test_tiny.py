"""The tiny pipelines are worth testing against: what a published model's result depends on, theirs depends on too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models.family import known_families
from tests.families.public import apart, initial_noise, public_latents, public_pipeline, public_pixels, recorded
from tests.families.tiny import FAMILIES, tiny_pipeline

Public = Callable[..., Any]
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra"
SIZE = (64, 96)
GUIDED: dict[str, Any] = {"guidance": 4.0, "true_guidance": 3.0, "negative": "blurry low quality picture"}


def latents(model: Any, prompts: list[str], **changes: Any) -> Tensor:
    own = {
        "num_steps": 3,
        "size": SIZE,
        "noise": initial_noise(len(prompts), SIZE),
        **GUIDED,
        "max_sequence_length": 96,
    }
    return public_latents(model, prompts, **{**own, **changes})


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (80, 112)])
def test_a_pipeline_makes_finite_pictures_of_any_shape(public: Public, family: str, size: tuple[int, int]) -> None:
    model = public(family)
    call: dict[str, Any] = {"num_steps": 2, "size": size, "noise": initial_noise(2, size), **GUIDED}
    made = public_latents(model, [SHORT, LONG], **call)
    pixels = public_pixels(model, [SHORT, LONG], **call)
    assert made.dtype == torch.float32 and made.shape == call["noise"].shape and made.isfinite().all()
    assert pixels.shape == (2, *size, 3)
    assert ((pixels > 0) & (pixels < 255)).float().mean() > 0.7  # what is cut off would hide differences
    assert pixels.float().std() > 20


def test_a_result_depends_on_everything_it_is_made_of(public: Public, family: str) -> None:
    model = public(family)
    made = latents(model, [SHORT])
    assert apart(latents(model, [SHORT]), made) == 0
    assert apart(latents(model, [LONG]), made) > 0.01
    assert apart(latents(model, [SHORT], num_steps=4), made) > 0.01
    assert apart(latents(model, [SHORT], negative=LONG), made) > 0.01
    rolled = latents(model, [SHORT], noise=initial_noise(1, SIZE).roll((2, 2), (2, 3)))
    assert apart(rolled.roll((-2, -2), (2, 3)), made) > 0.01  # a patch knows where it is
    number = "true_guidance" if family == "flux-schnell" else "guidance"
    assert apart(latents(model, [SHORT], **{number: 2.0}), made) > 0.01


def test_the_transformer_depends_on_time(public: Public, family: str) -> None:
    model = public(family)
    with recorded(model) as calls:
        latents(model, [SHORT])
    name = "t" if family.startswith("z_image") else "timestep"
    with torch.no_grad():
        first, later = (model.transformer(**{**calls[0], name: calls[i][name]})[0] for i in (0, -1))
    assert apart(torch.stack(list(later)), torch.stack(list(first))) > 0.01


def test_two_prompts_in_a_batch_equal_each_alone(public: Public, family: str) -> None:
    """Qwen-Image pads to the longest prompt and masks; Z-Image masks from the 33rd token on; the others pad always."""
    model = public(family)
    prompts = [SHORT, LONG + ", " + LONG]
    together = latents(model, prompts, noise=initial_noise(2, SIZE))
    for row, prompt in enumerate(prompts):
        alone = latents(model, [prompt], noise=initial_noise(2, SIZE)[row : row + 1])
        assert apart(together[row : row + 1], alone) < 1e-5


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, family: str) -> None:
    one, two, other = (
        {file.relative_to(at): file.read_bytes() for file in sorted(at.rglob("*")) if file.is_file()}
        for at in (tiny_pipeline(family, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    )
    assert one == two
    differing = {str(name) for name in one if one[name] != other[name]}
    assert differing and all(name.endswith(".safetensors") for name in differing)
    assert sum(map(len, one.values())) < 3_000_000


def test_saving_and_loading_again_gives_the_same(public: Public, family: str, tmp_path: Path) -> None:
    model = public(family)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(latents(tmp_path, [SHORT]), latents(model, [SHORT]))


def test_every_family_has_a_tiny_pipeline() -> None:
    assert {name.partition("-")[0] for name in FAMILIES} == set(known_families())


def test_sd3_has_its_third_encoder_where_asked(public: Public) -> None:
    without, having = (public("sd3", t5=t5) for t5 in (False, True))
    assert without.text_encoder_3 is None and having.text_encoder_3 is not None
    zeros = without.encode_prompt(SHORT, None, None, max_sequence_length=20)[0][:, 77:]
    assert zeros.shape == (1, 20, 64) and not zeros.any()
    assert having.encode_prompt(SHORT, None, None, max_sequence_length=20)[0][:, 77:].std() > 0.1
    assert apart(latents(having, [LONG]), latents(having, [SHORT])) > 0.01


def test_options_replace_keys_of_a_configuration(tmp_path: Path) -> None:
    path = tiny_pipeline(
        "sd3", tmp_path, transformer={"qk_norm": None}, scheduler={"shift": 1.5}, vae={"sample_size": 8}
    )
    model = public_pipeline(path)
    configs = model.transformer.config, model.scheduler.config, model.vae.config
    assert (configs[0].qk_norm, configs[1].shift, configs[2].sample_size) == (None, 1.5, 8)


def test_prompts_have_token_counts_of_their_own(public: Public) -> None:
    sd3, qwen = public("sd3", t5=True), public("qwen_image")
    counts = [[len(t(p).input_ids) for p in (SHORT, LONG)] for t in (sd3.tokenizer, sd3.tokenizer_3, qwen.tokenizer)]
    assert [c[0] for c in counts] == [5, 4, 3]  # three words, with a beginning and an end in CLIP's, an end in T5's
    assert all(c[1] > c[0] + 10 for c in counts)
    assert sd3.tokenizer_2.pad_token == "!" and sd3.tokenizer.pad_token == "<|endoftext|>"


def test_qwen_images_template_begins_with_the_34_tokens_that_its_pipeline_drops(public: Public) -> None:
    model = public("qwen_image")
    tokens = model.tokenizer.tokenize(model.prompt_template_encode.format(SHORT))
    assert tokens[model.prompt_template_encode_start_idx :] == [
        *("a", "Ġred", "Ġcube"),
        *("<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"),
    ]
    assert model.encode_prompt(SHORT)[0].shape == (1, 8, 32)


def test_z_image_applies_the_chat_template(public: Public) -> None:
    tokenizer = public("z_image").tokenizer
    turn: list[dict[str, str]] = [{"role": "user", "content": SHORT}]
    texts = [
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        for thinking in (True, False)
    ]
    assert texts[0] == "<|im_start|>user\na red cube<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1] == texts[0] + "<think>\n\n</think>\n\n"
