from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from flowalign.config.sections import SHIPPED
from flowalign.making.measuring import true_scenes
from flowalign.measure.distances import clip_score, clip_scores, frechet_distance, kernel_distance, precision_recall
from flowalign.measure.features import (
    ExtractorError,
    InceptionFeatures,
    OpenClipFeatures,
    batches_of,
    extract,
    resolve_extractor,
)
from flowalign.shapes.prompts import evaluation_set
from rewards.models.openclip import OpenClip

CLIP = SHIPPED / "open_clip"


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def shipped_clip() -> OpenClip:
    return OpenClip("test", path=str(CLIP))


def test_the_clip_score_is_that_of_open_clip_called_directly() -> None:
    prompts = [str(row["prompt"]) for row in evaluation_set(6)]
    images = np.concatenate([true_scenes(5, 0), noise(1)])
    created: Any = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    model, _, preprocess = created
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")(prompts)
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in images]))
        read = model.encode_text(tokens)
    cosine = torch.nn.functional.cosine_similarity(seen, read)
    assert cosine.min() < 0 < cosine.max()
    found = clip_scores(images, prompts, shipped_clip(), batch=4)
    assert found == pytest.approx(100 * np.maximum(cosine.numpy(), 0), abs=1e-3)
    assert clip_score(images, prompts, shipped_clip()) == pytest.approx(found.mean())
    features = OpenClipFeatures(shipped_clip())(images)
    assert features == pytest.approx(seen.numpy(), abs=1e-4) and features.dtype == np.float32


def test_true_scenes_are_nearer_to_other_true_scenes_than_noise_is_and_only_they_cover_them() -> None:
    extractor = resolve_extractor({"type": "open_clip", "path": str(CLIP)})
    images = [true_scenes(120, 0), true_scenes(120, 1), noise(120)]
    reference, scenes, other = (extract(extractor, batches_of(few), len(few)) for few in images)
    assert 5 * frechet_distance(scenes, reference) < frechet_distance(other, reference)
    assert 20 * abs(kernel_distance(scenes, reference)) < kernel_distance(other, reference)
    assert min(precision_recall(reference, scenes)) > 0.7
    assert precision_recall(reference, other).recall == 0


def test_true_scenes_are_a_function_of_the_seed() -> None:
    assert np.array_equal(true_scenes(7, 3), true_scenes(7, 3))
    assert not np.array_equal(true_scenes(7, 3), true_scenes(7, 4))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_v3(weights=None, init_weights=False).half().state_dict(), path)
    return path


def test_inception_features_are_what_torchvisions_last_pooling_sees_of_its_own_preprocessing(
    inception_file: Path,
) -> None:
    from torchvision.models import inception_v3
    from torchvision.transforms import functional

    images, pooled = noise(2), []
    network = inception_v3(weights=None, init_weights=False, transform_input=True)
    network.load_state_dict(torch.load(inception_file, weights_only=True))
    network.eval().avgpool.register_forward_hook(lambda module, given, made: pooled.append(made.flatten(1)))
    pixels = functional.resize(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, [299, 299], antialias=True)
    with torch.no_grad():
        network(functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    found = InceptionFeatures(inception_file)(images)
    assert found.shape == (2, 2048)
    assert found == pytest.approx(pooled[0].numpy(), rel=1e-3, abs=1e-5)


class Scripted(torch.nn.Module):
    """Called as StyleGAN's file is."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8
        means = images.float().mean(dim=[2, 3])
        return means if return_features else means.softmax(1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_file_is_given_the_bytes_and_asked_for_features(tmp_path: Path) -> None:
    torch.jit.script(Scripted()).save(tmp_path / "scripted.pt")
    found = resolve_extractor({"type": "inception", "path": str(tmp_path / "scripted.pt")})(noise(3))
    assert found == pytest.approx(noise(3).mean((1, 2)), rel=1e-5)


def test_missing_or_foreign_inception_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = tmp_path / "hub" / "checkpoints" / "inception_v3_google-0cc3c7bd.pth"
    with pytest.raises(ExtractorError, match=f"{expected} does not exist; torchvision puts its weights .* there: run"):
        InceptionFeatures()
    with pytest.raises(ExtractorError, match=r"mine\.pt does not exist; --extractor .* takes a file of"):
        InceptionFeatures(tmp_path / "mine.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ExtractorError, match=r"other\.pth holds neither"):
        InceptionFeatures(tmp_path / "other.pth")


OWN = """
import numpy as np
def means(images, scale=1):
    return scale * images.reshape(len(images), -1, 3).mean(1)
def flat(images):
    return images.mean()
def by_size(images):
    return np.zeros((len(images), images.shape[1]))
def broken(images):
    raise KeyError("gone")
number = 3
"""


def test_a_function_of_the_users_own_file_makes_the_features(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    extractor = resolve_extractor({"type": "own.py:means", "scale": 2}, base_dir=tmp_path)
    found = extract(extractor, batches_of(noise(5), size=2), 5)
    assert found.dtype == np.float32
    assert found == pytest.approx(2 * noise(5).mean((1, 2)), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type": "own.py:mean"}, "has no 'mean'; did you mean 'means'"),
        ({"type": "absent.py:means"}, "^extractor file .*absent.py does not exist"),
        ({"type": "own.py:number"}, "is a int, not a function"),
        ({"type": "own.py:flat"}, r"returned float64 \(\) for 2 images; return a float32 array \(2, features\)"),
        ({"type": "own.py:by_size"}, "32 features an image, before 64"),
        ({"type": "own.py:broken"}, "raised KeyError: 'gone'"),
        ({"type": "incept"}, "'incept' is unknown; write open_clip, inception or"),
        ({"type": "open_clip", "modl": "a"}, "unexpected keyword argument 'modl'"),
        ({"type": "open_clip", "path": "absent"}, "absent holds no open_clip_config.json"),
    ],
)
def test_an_extractor_that_cannot_be_used_says_why(tmp_path: Path, options: dict, said: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    batches = [(range(2), noise(2)), (range(2, 4), noise(2)[:, :32])]
    with pytest.raises(ExtractorError, match=said):
        extract(resolve_extractor(options, base_dir=tmp_path), batches, 4)
