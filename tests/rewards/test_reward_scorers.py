from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards import resolve as resolving
from rewards.geneval.detectors.palette import BACKGROUND, COLORS, shape_mask
from rewards.interface import Asked, InputError, SpecError, score_batch


def resolve(spec) -> Any:
    return resolving.resolve(spec)


PROMPTS = ["a red circle", "a blue star and a cross", "a red circle", "", "a very long prompt " * 50]
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}}
TINY["text_cfg"] = TEXT


def images_of(height: int, width: int, n: int = 5) -> np.ndarray:
    """Smooth random images: bicubic filters agree on them to a level or two."""
    coarse = np.random.default_rng(1).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    )


def one_by_one(scorer, images) -> np.ndarray:
    rows = [scorer.score(images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(len(images))]
    return np.concatenate([next(iter(row.values())) for row in rows])


def save_open_clip(directory, resize_mode: str = "shortest") -> str:
    import open_clip
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), str(directory / "open_clip_model.safetensors"))
    preprocess = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bicubic", "resize_mode": resize_mode}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    return str(directory)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> str:
    return save_open_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def pick_dir(tmp_path_factory) -> str:
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    directory = tmp_path_factory.mktemp("pick")
    torch.manual_seed(0)
    full = SimpleTokenizer()
    base = list(full.byte_encoder.values())
    names = [*base, *(b + "</w>" for b in base), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(names)}, merges=[], model_max_length=24)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(names), "max_position_embeddings": 24, "eos_token_id": len(names) - 1}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (17, 40)])
@pytest.mark.parametrize("kind", ["clip", "pickscore"])
def test_model_scorers_score_batched_as_one_by_one_for_any_image_size(kind, size, clip_dir, pick_dir):
    images = images_of(*size)
    path = {"clip": clip_dir, "pickscore": pick_dir}[kind]
    scorer = resolve({"type": kind, "path": path, "batch_size": 3})
    checked = score_batch(kind, scorer, Asked(images, PROMPTS, [{}] * 5))
    assert checked.valid[kind].all()
    scale = np.abs(checked.scores[kind]).max() if kind == "pickscore" else 1
    np.testing.assert_allclose(checked.scores[kind], one_by_one(scorer, images), atol=1e-5 * scale)
    assert len(set(np.round(checked.scores[kind], 6))) == 5


def test_clip_equals_open_clip_on_the_models_own_pil_transform(clip_dir):
    import open_clip
    import torch

    images = images_of(48, 64)
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{clip_dir}")
    model, _, preprocess = loaded
    model.eval()
    with torch.inference_mode():
        image = model.encode_image(torch.stack([preprocess(Image.fromarray(i)) for i in images]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip_dir}")(PROMPTS), normalize=True)
    expected = (image * text).sum(-1).numpy()
    scores = resolve({"type": "clip", "path": clip_dir}).score(images, PROMPTS, [{}] * 5)["clip"]
    np.testing.assert_allclose(scores, expected, atol=2e-3)


@pytest.mark.parametrize("mode", ["squash", "longest", "shortest"])
def test_every_resize_mode_of_open_clip_is_followed(mode, tmp_path):
    import open_clip
    import torch

    path = save_open_clip(tmp_path / mode, mode)
    images = images_of(24, 70)
    scorer = resolve({"type": "clip", "path": path})
    scorer.setup("cpu")
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{path}")
    preprocess = loaded[-1]
    expected = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    np.testing.assert_allclose(scorer.model.pixels(images).numpy(), expected.numpy(), atol=0.05)


def test_an_architecture_by_name_loads_a_local_checkpoint(tmp_path, clip_dir):
    import open_clip

    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    weights = f"{clip_dir}/open_clip_model.safetensors"
    scorer = resolve({"type": "clip", "model": "tiny-for-tests", "checkpoint": weights})
    images = images_of(32, 32)
    assert np.abs(scorer.score(images, PROMPTS, [{}] * 5)["clip"]).max() <= 1
    wrong = resolve({"type": "clip", "model": "RN50", "checkpoint": weights})
    with pytest.raises(SpecError, match="did not load"):
        wrong.setup("cpu")


def test_pickscore_is_logit_scale_times_cosine_of_transformers(pick_dir):
    import torch
    from transformers import AutoProcessor, CLIPModel

    images = images_of(40, 40)
    model, processor = CLIPModel.from_pretrained(pick_dir), AutoProcessor.from_pretrained(pick_dir)
    inputs = processor(
        images=[Image.fromarray(i) for i in images], text=PROMPTS, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image.diagonal().numpy()
    raw = resolve({"type": "pickscore", "path": pick_dir}).score(images, PROMPTS, [{}] * 5)["pickscore"]
    np.testing.assert_allclose(raw, expected, atol=1e-2)
    small = resolve({"type": "pickscore", "path": pick_dir, "scale": "/26"}).score(images, PROMPTS, [{}] * 5)
    np.testing.assert_allclose(small["pickscore"], raw / 26, rtol=1e-5)


def test_half_precision_stays_close_to_single(clip_dir, pick_dir):
    images = images_of(32, 32)
    for kind, path, option in (("clip", clip_dir, "precision"), ("pickscore", pick_dir, "dtype")):
        name = {"precision": "bf16", "dtype": "bfloat16"}[option]
        single = resolve({"type": kind, "path": path}).score(images, PROMPTS, [{}] * 5)[kind]
        half = resolve({"type": kind, "path": path, option: name}).score(images, PROMPTS, [{}] * 5)[kind]
        np.testing.assert_allclose(half, single, atol=0.03 * max(1, np.abs(single).max()))


def test_a_model_without_its_weights_is_refused_and_not_scored_at_random(tmp_path, clip_dir, pick_dir):
    from safetensors.torch import load_file, save_file

    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text(Path(clip_dir, "open_clip_config.json").read_text())
    with pytest.raises(SpecError, match="did not load"):
        resolve({"type": "clip", "path": str(tmp_path / "clip")}).setup("cpu")
    shutil.copytree(pick_dir, tmp_path / "pick")
    weights = load_file(tmp_path / "pick/model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, str(tmp_path / "pick/model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(SpecError, match="lacks the weights visual_projection"):
        resolve({"type": "pickscore", "path": str(tmp_path / "pick")}).setup("cpu")
    (tmp_path / "pick/model.safetensors").unlink()
    with pytest.raises(SpecError, match="did not load"):
        resolve({"type": "pickscore", "path": str(tmp_path / "pick")}).setup("cpu")


def test_jpeg_rewards_small_files_or_large_ones():
    flat, noisy = np.zeros((32, 32, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    images = np.stack([flat, noisy])
    small = resolve("jpeg").score(images, ["", ""], [{}, {}])["jpeg"]
    large = resolve({"type": "jpeg", "goal": "incompressible"}).score(images, ["", ""], [{}, {}])["jpeg"]
    assert small[0] > small[1]
    np.testing.assert_array_equal(large, -small)


def draw(*things: tuple[str, str, int, int]) -> np.ndarray:
    """A 64×64 image with 20-pixel shapes at (top, left)."""
    image = np.full((64, 64, 3), BACKGROUND, np.float32)
    for shape, color, top, left in things:
        mask = shape_mask(shape, 20, 20)[..., None]
        part = image[top : top + 20, left : left + 20]
        part += mask * (np.array(COLORS[color], np.float32) - part)
    return image.round().astype(np.uint8)


def test_geneval_scores_drawn_shapes_in_each_mode():
    red = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    images = np.stack(
        [
            draw(("circle", "red", 5, 5)),
            draw(("circle", "blue", 5, 5)),
            draw(("circle", "red", 5, 5), ("circle", "red", 40, 40)),
            draw(("star", "red", 5, 5)),
        ]
    )
    expected = {"official": [1, 0, 1, 0], "strict": [1, 0, 0, 0], "partial": [1, 0.5, 0, 0]}
    for mode, values in expected.items():
        scorer = resolve({"type": "geneval", "mode": mode, "batch_size": 3})
        checked = score_batch("geneval", scorer, Asked(images, ["a red circle"] * 4, [red] * 4))
        np.testing.assert_array_equal(checked.scores["geneval"], values)


def test_geneval_without_genevals_metadata_is_an_input_error():
    with pytest.raises(InputError, match="include"):
        resolve("geneval").score(draw()[None], ["p"], [{}])
