"""hps and aesthetic against the literal computation: open_clip loaded by hand, its own PIL transform, linear layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowalign.config.sections import SHIPPED
from flowalign.shapes.render import Thing, render
from rewards import resolve as resolving
from rewards.geneval.detectors.palette import COLORS, SHAPES
from rewards.interface import Asked, SpecError, score_batch
from rewards.models.openclip import OpenClip, trained_with_quick_gelu

PROMPTS = ["a red circle", "a blue star and a cross", "a red circle", "", "a very long prompt " * 50]
EMPTY: list[dict] = [{}] * 5
SIZES = [(32, 32), (64, 48), (17, 40), (1, 1), (1, 50), (50, 1)]
WIDTH = 16
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY: dict[str, Any] = {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": TEXT}


def resolve(spec) -> Any:
    return resolving.resolve(spec)


def images_of(height: int, width: int, n: int = 5) -> np.ndarray:
    """Smooth random images: bicubic filters agree on them to a level or two."""
    coarse = np.random.default_rng(1).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    )


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> str:
    import open_clip

    directory = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), str(directory / "open_clip_model.safetensors"))
    preprocess = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    return str(directory)


@pytest.fixture(scope="module")
def named(clip_dir, tmp_path_factory) -> dict[str, str]:
    """The same weights as an architecture by name and a checkpoint."""
    import open_clip

    config = tmp_path_factory.mktemp("named") / "tiny-for-hps.json"
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    return {"model": "tiny-for-hps", "checkpoint": f"{clip_dir}/open_clip_model.safetensors"}


class Laion(torch.nn.Module):
    """The head of LAION's improved-aesthetic-predictor, narrower: five linear layers without activation."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, 12),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(12, 8),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(8, 6),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(6, 4),
            torch.nn.Linear(4, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def saved_head(path: Path, head: torch.nn.Module) -> str:
    """A head saved as safetensors, with weights large enough to tell images apart."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2)
    save_file(head.state_dict(), str(path))
    return str(path)


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> dict[str, tuple[str, torch.nn.Module]]:
    directory = tmp_path_factory.mktemp("heads")
    torch.manual_seed(3)
    modules = {"one layer": torch.nn.Linear(WIDTH, 1), "laion": Laion().eval()}
    return {name: (saved_head(directory / f"{name}.safetensors", head), head) for name, head in modules.items()}


def by_hand(path: str, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of the images, each through the model's own PIL transform, and of the prompts."""
    import open_clip

    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{path}")
    model, _, preprocess = loaded
    model.eval()
    with torch.inference_mode():
        rows = [model.encode_image(preprocess(Image.fromarray(image))[None]) for image in images]
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{path}")(PROMPTS))
    image = torch.cat(rows)
    return image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["hps", "aesthetic"])
def test_scores_batched_equal_scores_one_by_one_for_any_image_size(kind, size, clip_dir, heads):
    images = images_of(*size)
    options = {"head": heads["laion"][0]} if kind == "aesthetic" else {}
    scorer = resolve({"type": kind, "path": clip_dir, "batch_size": 3, **options})
    checked = score_batch(kind, scorer, Asked(images, PROMPTS, EMPTY))
    assert checked.valid[kind].all()
    single = [scorer.score(images[i : i + 1], PROMPTS[i : i + 1], [{}])[kind] for i in range(5)]
    np.testing.assert_allclose(checked.scores[kind], np.concatenate(single), atol=1e-5)
    assert len(set(np.round(checked.scores[kind], 6))) == 5


# At the model's own size nothing is resized; elsewhere PIL and the tensor transform may differ by a level of 255.
@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-6), ((1, 1), 1e-6), ((48, 64), 2e-3), ((70, 20), 2e-3)])
def test_hps_is_the_cosine_of_image_and_prompt(size, tolerance, clip_dir):
    images = images_of(*size)
    image, text = by_hand(clip_dir, images)
    cosine = (image * text).sum(-1).numpy()
    scores = resolve({"type": "hps", "path": clip_dir}).score(images, PROMPTS, EMPTY)["hps"]
    np.testing.assert_allclose(scores, cosine, atol=tolerance)
    times_100 = resolve({"type": "hps", "path": clip_dir, "scale": "x100"})
    np.testing.assert_allclose(times_100.score(images, PROMPTS, EMPTY)["hps"], 100 * scores, rtol=1e-6)
    assert times_100.range == (-100, 100)


@pytest.mark.parametrize("head", ["one layer", "laion"])
@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-5), ((1, 1), 1e-5), ((48, 64), 2e-3), ((70, 20), 2e-3)])
def test_aesthetic_is_the_head_on_the_unit_image_embedding(size, tolerance, head, clip_dir, heads):
    images = images_of(*size)
    file, module = heads[head]
    with torch.inference_mode():
        expected = module(by_hand(clip_dir, images)[0]).squeeze(1).numpy()
    scores = resolve({"type": "aesthetic", "path": clip_dir, "head": file}).score(images, PROMPTS, EMPTY)["aesthetic"]
    np.testing.assert_allclose(scores, expected, atol=tolerance)
    assert np.ptp(expected) > 10 * tolerance


def test_the_prompt_plays_no_part_in_aesthetic(clip_dir, heads):
    images = images_of(32, 32)
    scorer = resolve({"type": "aesthetic", "path": clip_dir, "head": heads["laion"][0]})
    with_prompts = scorer.score(images, PROMPTS, EMPTY)["aesthetic"]
    np.testing.assert_array_equal(scorer.score(images, [""] * 5, EMPTY)["aesthetic"], with_prompts)


def test_layers_are_applied_by_number_and_may_lack_a_bias(tmp_path, clip_dir):
    torch.manual_seed(0)
    first, last = torch.randn(3, WIDTH), torch.randn(1, 3)
    save_file({"mlp.10.weight": last, "mlp.2.weight": first}, str(tmp_path / "head.safetensors"))
    images = images_of(32, 32)
    expected = (by_hand(clip_dir, images)[0] @ first.T @ last.T).squeeze(1).numpy()
    scorer = resolve({"type": "aesthetic", "path": clip_dir, "head": str(tmp_path / "head.safetensors")})
    np.testing.assert_allclose(scorer.score(images, PROMPTS, EMPTY)["aesthetic"], expected, atol=1e-5)


def test_hps_by_name_shows_the_whole_image_and_a_directory_keeps_its_own_transform(named, clip_dir):
    """Two images that differ at the short ends alone, which a centre crop would cut away."""
    images = np.full((2, 32, 96, 3), 128, np.uint8)
    images[1, :, :24] = 255
    by_name = resolve({"type": "hps", **named}).score(images, ["a", "a"], [{}] * 2)["hps"]
    assert abs(by_name[0] - by_name[1]) > 1e-3
    cropped = resolve({"type": "hps", "path": clip_dir}).score(images, ["a", "a"], [{}] * 2)["hps"]
    assert cropped[0] == pytest.approx(cropped[1], abs=1e-6)


def test_hps_by_name_equals_open_clip_on_a_padded_image(named):
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    images = images_of(24, 60)
    model: Any = open_clip.create_model(named["model"], pretrained=named["checkpoint"]).eval()
    preprocess: Any = image_transform_v2(PreprocessCfg(size=32, resize_mode="longest"), is_train=False)
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(named["model"])(PROMPTS), normalize=True)
    scores = resolve({"type": "hps", **named}).score(images, PROMPTS, EMPTY)["hps"]
    np.testing.assert_allclose(scores, (image * text).sum(-1).numpy(), atol=2e-3)


def test_a_checkpoint_alone_is_one_of_vit_h_14(named):
    assert resolve({"type": "hps", "checkpoint": named["checkpoint"]}).model.architecture == "ViT-H-14"


def shapes_images(n: int = 24) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    things = [Thing(SHAPES[i % len(SHAPES)], list(COLORS)[i % len(COLORS)], (i % 2, i // 2 % 2)) for i in range(n)]
    return np.stack([render([thing], rng) for thing in things]), [f"a {thing.color} {thing.shape}" for thing in things]


@pytest.mark.parametrize(("kind", "bound"), [("hps", 0.003), ("aesthetic", 0.01)])
def test_half_precision_stays_close_to_single(kind, bound, tmp_path):
    """On 24 shapes with the shipped model bfloat16 moved hps (spread 0.12) by 0.0015, aesthetic (spread 0.58) by 0.004.

    Were the embeddings themselves left in bfloat16, hps would move by 0.005.
    """
    images, prompts = shapes_images()
    spec = {"type": kind, "path": str(SHIPPED / "open_clip")}
    if kind == "aesthetic":
        torch.manual_seed(0)
        spec["head"] = saved_head(tmp_path / "head.safetensors", Laion(96))
    single, half = (
        resolve({**spec, "precision": precision}).score(images, prompts, [{}] * 24)[kind]
        for precision in ("fp32", "bf16")
    )
    assert 0 < np.abs(half - single).max() < bound


def test_extreme_proportions_are_cut_to_their_middle_before_they_are_enlarged(clip_dir):
    model = OpenClip("test", path=clip_dir)
    long = np.random.default_rng(0).integers(0, 256, (1, 9, 3001, 3), dtype=np.uint8)
    middle = long[:, :, 1428:1572]  # 16 times as long as high, one column nearer to the left
    np.testing.assert_array_equal(model.pixels(long).numpy(), model.pixels(middle).numpy())
    np.testing.assert_array_equal(
        model.pixels(long.transpose(0, 2, 1, 3)).numpy(), model.pixels(middle.transpose(0, 2, 1, 3)).numpy()
    )


def test_weights_trained_with_quick_gelu_run_with_it_where_a_tag_says_so(named, monkeypatch):
    from open_clip import pretrained
    from open_clip.transformer import QuickGELU

    assert trained_with_quick_gelu("ViT-L-14", "openai")
    assert not trained_with_quick_gelu("ViT-H-14", "laion2b_s32b_b79k")
    assert not trained_with_quick_gelu(named["model"], named["checkpoint"])
    tags = {name: {"file": named["checkpoint"], "quick_gelu": name == "quick"} for name in ("quick", "slow")}
    monkeypatch.setitem(pretrained._PRETRAINED, named["model"], tags)
    for tag in tags:
        model = OpenClip("test", model=named["model"], checkpoint=tag).loaded
        used = {type(module) for module in model.modules()}
        assert (QuickGELU in used) == (tag == "quick")


@pytest.mark.parametrize("kind", ["hps", "aesthetic", "clip"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either `path`"),
        ({"path": "DIR", "model": "ViT-B-32"}, "give either `path`"),
        ({"path": "DIR", "checkpoint": "openai"}, "give either `path`"),
        ({"path": "/nowhere"}, r"/nowhere holds no open_clip_config\.json"),
        ({"model": "ViT-B-32"}, "has no `checkpoint`"),
        ({"model": "ViT-B-32", "checkpoint": "/nowhere.pt"}, r"checkpoint /nowhere\.pt does not exist"),
        ({"path": "DIR", "precision": "bf-16"}, "precision 'bf-16' is unknown; write fp32, fp16, bf16"),
    ],
)
def test_what_names_no_model_is_refused_with_the_scorers_name(kind, options, said, clip_dir, heads):
    options = {key: clip_dir if value == "DIR" else value for key, value in options.items()}
    options |= {"head": heads["laion"][0]} if kind == "aesthetic" else {}
    with pytest.raises(SpecError, match=f"{kind}: .*{said}"):
        resolve({"type": kind, **options})


def test_a_clip_in_the_layout_of_transformers_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(SpecError, match=r"clip: .*which of the rewards pickscore and image_similarity read$"):
        resolve({"type": "clip", "path": str(tmp_path)})


def test_an_unknown_scale_of_hps_is_refused(clip_dir):
    with pytest.raises(SpecError, match="scale 'x10' is unknown; write cosine or x100"):
        resolve({"type": "hps", "path": clip_dir, "scale": "x10"})


def test_a_head_that_is_missing_or_no_safetensors_file_is_refused(tmp_path, clip_dir):
    with pytest.raises(SpecError, match=r"head /nowhere\.safetensors does not exist"):
        resolve({"type": "aesthetic", "path": clip_dir, "head": "/nowhere.safetensors"})
    with pytest.raises(SpecError, match="needs head"):
        resolve({"type": "aesthetic", "path": clip_dir})
    pickled = tmp_path / "head.pth"
    torch.save(torch.nn.Linear(WIDTH, 1).state_dict(), pickled)
    with pytest.raises(SpecError, match=r"head\.pth is no safetensors file"):
        resolve({"type": "aesthetic", "path": clip_dir, "head": str(pickled)}).setup("cpu")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"weight": (1, WIDTH + 1), "bias": (1,)}, f"takes {WIDTH + 1} features, the CLIP model gives {WIDTH}"),
        ({"layers.0.weight": (3, WIDTH), "layers.2.weight": (1, 4)}, "give linear layers"),
        ({"layers.0.weight": (3, WIDTH), "layers.2.weight": (2, 3)}, "give linear layers"),
        ({"layers.0.weight": (1, WIDTH), "layers.0.bias": (2,)}, "give linear layers"),
        ({"layers.0.weight": (1, WIDTH), "layers.1.running_mean": (1,)}, "give linear layers"),
        ({"conv.weight": (1, WIDTH, 1, 1)}, "give linear layers"),
        ({"weight": ()}, "give linear layers"),
        ({"bias": (1,)}, "give linear layers"),
    ],
)
def test_a_head_that_is_no_chain_of_linear_layers_on_the_models_features_is_refused_at_setup(
    shapes, said, tmp_path, clip_dir
):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, str(tmp_path / "head.safetensors"))
    scorer = resolve({"type": "aesthetic", "path": clip_dir, "head": str(tmp_path / "head.safetensors")})
    with pytest.raises(SpecError, match=said):
        scorer.setup("cpu")
