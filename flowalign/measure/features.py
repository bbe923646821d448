"""Features that two sets of images are compared in: those of CLIP, of Inception or of the user's own function.

Shapes: N images, H W pixels, D features.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.interface import Images, ScorerError, SpecError, one_line
from rewards.missing import hint
from rewards.models.openclip import OpenClip
from rewards.models.usercode import user_code

BATCH = 32
INCEPTION_SIZE = 299

Batches = Iterable[tuple[Sequence[int], Images]]


class ExtractorError(ValueError):
    """A feature extractor that cannot be had, or that does not return features."""


class FeatureExtractor(Protocol):
    """Resizes and normalises the images as its network wants them; each image's features depend on it alone."""

    def __call__(self, images: Images, /) -> NDArray[np.float32]:
        """Return float32 (N, D) of uint8 images (N, H, W, 3) of any size."""
        ...


class OpenClipFeatures:
    """Image embeddings of an open_clip model, as the projection leaves them: not of unit length."""

    def __init__(self, model: OpenClip) -> None:
        self.model = model

    def __call__(self, images: Images) -> NDArray[np.float32]:
        with torch.inference_mode():
            embedded = self.model.loaded.encode_image(self.model.pixels(images), normalize=False)
        return embedded.float().cpu().numpy()


class InceptionFeatures:
    """The 2048 features of Inception-v3's last pooling layer.

    ``path`` is a file of torchvision's ``inception_v3`` weights, by default the one that torchvision itself keeps in
    torch's cache; images are resized to 299 × 299, bilinear with antialiasing. Or it is a TorchScript file such as
    StyleGAN's ``inception-2015-12-05.pt``, called with uint8 (N, 3, H, W) and, where it knows it,
    ``return_features=True``; it resizes by itself. Only the latter has the weights of TensorFlow's 2015 release that
    the FID of the literature was computed with.

    Raises:
        ExtractorError: names the file that is missing or does not load.
    """

    def __init__(self, path: str | Path | None = None, device: str = "cpu") -> None:
        self.path = torchvision_weights() if path is None else Path(path)
        self.device = device
        if not self.path.is_file():
            raise ExtractorError(
                f"extractor inception: {self.path} does not exist{hint(self.path)}; {_where_from(path is None)}"
            )
        try:
            scripted = _is_torchscript(self.path)
            self._network = _torchscript(self.path, device) if scripted else _torchvision(self.path, device)
        except Exception as error:  # torch raises by turns on files that are no weights, or another network's
            raise ExtractorError(
                f"extractor inception: {self.path} holds neither torchvision's inception_v3 weights nor a TorchScript "
                f"module ({one_line(error)})"
            ) from error

    def __call__(self, images: Images) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            return self._network(pixels).float().cpu().numpy()


def _where_from(cached: bool) -> str:
    """Say how to come by the weights, where torchvision's own place was asked for or not."""
    named = """--extractor '{"type": "inception", "path": "FILE"}'"""
    if not cached:
        return f"{named} takes a file of torchvision's inception_v3 weights or a TorchScript file"
    return (
        'torchvision puts its weights Inception_V3_Weights.IMAGENET1K_V1 there: run python -c "from torchvision.models '
        "import inception_v3; inception_v3(weights='DEFAULT')\" where there is a network, and copy the file; "
        f"or name another one: {named}"
    )


def torchvision_weights() -> Path:
    """Return the path where torchvision keeps its Inception weights once it has downloaded them."""
    from torchvision.models import Inception_V3_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(Inception_V3_Weights.IMAGENET1K_V1.url).name


def resolve_extractor(
    options: Mapping[str, Any], *, device: str = "cpu", base_dir: Path = Path(".")
) -> FeatureExtractor:
    """Return the extractor that ``type`` names, ready to be called; the other keys are its options.

    ``open_clip``: as `rewards.models.openclip.OpenClip`, so ``path`` or ``model`` and ``checkpoint``. ``inception``:
    ``path``. ``file.py:function`` or ``package.module:function``: a function (images) -> features of the user's own,
    which is run; the options are passed by keyword.

    Raises:
        ExtractorError: says what is missing.
    """
    kind, own = str(options["type"]), {key: value for key, value in options.items() if key != "type"}
    try:
        if kind == "open_clip":
            model = OpenClip("open_clip", **own)
            model.setup(device)
            return OpenClipFeatures(model)
        if kind == "inception":
            return InceptionFeatures(**own, device=device)
        if ":" in kind:
            return _own_function(kind, own, base_dir)
    except TypeError as error:
        raise ExtractorError(f"extractor {kind}: {one_line(error).partition('() ')[2]}") from error
    except ScorerError as error:
        raise ExtractorError(f"extractor {str(error).removeprefix('reward ')}") from error
    raise ExtractorError(f"extractor {kind!r} is unknown; write open_clip, inception or path/to/file.py:function")


def extract(
    extractor: FeatureExtractor, batches: Batches, count: int, done: Callable[[int], None] | None = None
) -> NDArray[np.float32]:
    """Return features (count, D) of the images in ``batches``: pairs of places and uint8 images (N, H, W, 3) of one
    size.

    ``done`` is told after each batch how many images it had.

    Raises:
        ExtractorError: the extractor returned something else than one row of numbers an image.
    """
    features: NDArray[np.float32] | None = None
    for places, images in batches:
        found = _checked(extractor(images), len(images), None if features is None else features.shape[1])
        if features is None:
            features = np.empty((count, found.shape[1]), np.float32)
        features[list(places)] = found
        if done is not None:
            done(len(places))
    return np.empty((0, 0), np.float32) if features is None else features


def batches_of(images: Images, size: int = BATCH) -> Iterator[tuple[range, Images]]:
    """Yield an array of images in batches, as `extract` takes them."""
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        yield range(start, start + len(batch)), batch


def _checked(found: Any, count: int, width: int | None) -> NDArray[np.float32]:
    features = np.asarray(found)
    if features.dtype.kind not in "fiu" or features.ndim != 2 or len(features) != count:
        raise ExtractorError(
            f"the feature extractor returned {features.dtype} {features.shape} for {count} images; "
            f"return a float32 array ({count}, features)"
        )
    if width not in (None, features.shape[1]):
        raise ExtractorError(
            f"the feature extractor returned {features.shape[1]} features an image, before {width}; "
            "their number must not depend on the image"
        )
    return features.astype(np.float32, copy=False)


def _own_function(target: str, options: dict[str, Any], base_dir: Path) -> FeatureExtractor:
    function = user_code(target, base_dir)
    if not callable(function) or isinstance(function, type):
        raise SpecError(f"{target} is a {type(function).__name__}, not a function (images) -> features")

    def features(images: Images, /) -> Any:
        try:
            return function(images, **options)
        except Exception as error:
            raise ExtractorError(f"extractor {target} raised {type(error).__name__}: {one_line(error)}") from error

    return features


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _torchscript(path: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    with warnings.catch_warnings():
        # torch would rather have exported programs; the file that everybody compares with is none.
        warnings.simplefilter("ignore", FutureWarning)
        network = torch.jit.load(path, map_location=device).eval()
    known = {argument.name for argument in network.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in known else {}
    return lambda pixels: network(pixels, **options)


def _torchvision(path: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    network.eval().to(device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        size = (INCEPTION_SIZE, INCEPTION_SIZE)
        resized = torch.nn.functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
        return network(resized / 127.5 - 1)

    return features
