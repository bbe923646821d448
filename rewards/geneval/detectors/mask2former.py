"""GenEval's own detector, Mask2Former, through transformers: no mmdet.

The instance post-processing is that of the public benchmark's model (Cheng et al. 2022, arXiv:2112.01527, as mmdet runs
it): softmax over classes without the null class, the 100 best of (query, class), masks where the upsampled logit is
positive, score = class probability × mean mask probability inside the mask, box around the mask. Colours come from
``rewards.geneval.colors``.

Shapes: Q queries, C classes (the null class is the last, C + 1st logit), h w mask logits, H W image pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.geneval.colors import ZeroShotColors
from rewards.geneval.rows import canonical, colored_classes
from rewards.interface import Images, Metadata, SpecError, one_line
from rewards.models.customcode import refuse_custom_code

if TYPE_CHECKING:
    import torch

# COCO's 80 classes in index order, under the benchmark's names: three of them are not COCO's.
COCO_NAMES: tuple[str, ...] = tuple(
    (
        "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
        "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
        "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
        "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,"
        "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
        "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,"
        "computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
        "scissors,teddy bear,hair drier,toothbrush"
    ).split(",")
)


@dataclass(frozen=True)
class Instances:
    """Objects of one image, best class probability first: label, score (M,), box (M, 4) in pixels, mask (M, H, W)."""

    labels_M: torch.Tensor
    scores_M: torch.Tensor
    boxes_M4: torch.Tensor
    masks_MHW: torch.Tensor


class Mask2formerDetector:
    """Finds COCO objects; implements ``rewards.geneval.detectors.Detector``.

    ``path`` is a directory of a transformers ``Mask2FormerForUniversalSegmentation`` trained for instances, such as
    ``facebook/mask2former-swin-small-coco-instance`` saved locally. ``clip`` has the options of the ``clip`` scorer
    for the colour classifier (the benchmark: ``{model: ViT-L-14-quickgelu, checkpoint: openai}``); it is needed where
    prompts ask for colours. ``classes`` names the model's classes by index; by default 80 classes are COCO's under the
    benchmark's names, any other number takes the names in the model's configuration. Detections at or under
    ``min_score`` are dropped; ``GenevalScorer`` applies the benchmark's own thresholds to the rest.
    """

    name = "mask2former"

    def __init__(
        self,
        *,
        path: str,
        clip: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        max_per_image: int = 100,
        min_score: float = 0.3,
        max_colored: int = 16,
        batch_size: int = 8,
        dtype: str = "float32",
    ) -> None:
        if not os.path.isfile(Path(path) / "config.json"):
            raise SpecError(f"mask2former: {path} holds no config.json; give a directory in transformers' layout")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise SpecError(f"mask2former: dtype {dtype!r} is unknown; write float32, bfloat16 or float16")
        self.path = path
        self.classes = None if classes is None else tuple(classes)
        self.colors = None if clip is None else ZeroShotColors(**clip)
        refuse_custom_code("mask2former", path)
        self.max_per_image = max_per_image
        self.min_score = min_score
        self.max_colored = max_colored
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = "cpu"
        self._model: Any = None

    def vocabulary(self) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """Return the classes, as the model's configuration file names them, and the colours.

        It is None where the file does not say.

        Raises:
            SpecError: the file is no configuration.
        """
        colors = () if self.colors is None else self.colors.names
        file = Path(self.path) / "config.json"
        try:
            labels = json.loads(file.read_text(encoding="utf-8")).get("id2label")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise SpecError(f"mask2former: {file} is no configuration of a model ({one_line(error)})") from error
        if self.classes is not None:
            return self.classes, colors
        if not isinstance(labels, dict):
            return None, colors
        return COCO_NAMES if len(labels) == len(COCO_NAMES) else tuple(map(str, labels.values())), colors

    def setup(self, device: str = "cpu") -> None:
        """Load the model from its directory; nothing is downloaded.

        Raises:
            SpecError: the directory is no whole Mask2Former, or ``classes`` does not fit it.
        """
        import torch
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.device = device
        try:
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                self.path,
                dtype=getattr(torch, self.dtype),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            self._processor: Any = AutoImageProcessor.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError(f"mask2former: {self.path} did not load ({one_line(error)})") from error
        model, report = loaded
        # transformers only warns here, and would detect with random weights.
        if lacking := sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"])):
            raise SpecError(f"mask2former: {self.path} lacks the weights {lacking[0]} …; give a whole checkpoint")
        self.names = self._names(model.config)
        self._model = model.to(device).eval()
        if self.colors is not None:
            self.colors.setup(device)

    def _names(self, config: Any) -> tuple[str, ...]:
        count = config.num_labels
        if self.classes is not None:
            if len(self.classes) != count:
                raise SpecError(
                    f"mask2former: {len(self.classes)} classes for a model of {count}; name each index once"
                )
            return self.classes
        if count == len(COCO_NAMES):
            return COCO_NAMES
        return tuple(str(config.id2label[index]) for index in range(count))

    def detect(self, images: Images, metadata: list[Metadata]) -> list[dict[str, list[dict[str, Any]]]]:
        """Return ``{class: [{"box", "score", "color"}]}`` of each uint8 image (N, H, W, 3).

        Colour is there only where it is asked.
        """
        import torch

        if self._model is None:
            self.setup(self.device)
        if self.colors is None and any(colored_classes(row) for row in metadata):
            raise SpecError(
                "mask2former: a prompt asks for a colour; give the detector `clip`, such as "
                "{model: ViT-L-14-quickgelu, checkpoint: openai}"
            )
        found = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                for image, row, seen in zip(images[rows], metadata[rows], self.instances(images[rows]), strict=True):
                    found.append(self._named(image, row, seen))
        return found

    def instances(self, images: Images) -> list[Instances]:
        """Return the model's instances in each of a batch of equally large images (N, H, W, 3)."""

        inputs = self._processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self._model.dtype)
        inside = inputs.get("pixel_mask")
        output = self._model(pixel_values=pixels, pixel_mask=None if inside is None else inside.to(self.device))
        content = tuple(pixels.shape[-2:]) if inside is None else _content(inside[0])
        return [
            instances(
                logits.float(), masks.float(), tuple(pixels.shape[-2:]), content, images.shape[1:3], self.max_per_image
            )
            for logits, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]

    def _named(self, image: np.ndarray, row: Metadata, seen: Instances) -> dict[str, list[dict[str, Any]]]:
        wanted = colored_classes(row)
        masks: dict[str, list[Any]] = {}
        found: dict[str, list[dict[str, Any]]] = {}
        for index in seen.scores_M.argsort(descending=True, stable=True).tolist():
            score = float(seen.scores_M[index])
            if score <= self.min_score:
                break
            name = self.names[int(seen.labels_M[index])]
            found.setdefault(name, []).append({"box": seen.boxes_M4[index].tolist(), "score": score, "color": None})
            masks.setdefault(name, []).append(seen.masks_MHW[index])
        for name in (name for name in found if canonical(name) in wanted):
            self._colored(image, name, found[name][: self.max_colored], masks[name])
        return found

    def _colored(self, image: np.ndarray, name: str, objects: list[dict[str, Any]], masks: list[Any]) -> None:
        assert self.colors is not None
        cut = [mask.cpu().numpy() for mask in masks[: len(objects)]]
        colors = self.colors.classify(image, [item["box"] for item in objects], cut, name)
        for item, color in zip(objects, colors, strict=True):
            item["color"] = color


def _content(inside_HW: torch.Tensor) -> tuple[int, int]:
    """Return the height and width of what is not padding."""
    return int(inside_HW.any(1).sum()), int(inside_HW.any(0).sum())


def instances(
    class_logits_QC: torch.Tensor,
    mask_logits_Qhw: torch.Tensor,
    input_size: tuple[int, int],
    content_size: tuple[int, int],
    image_size: tuple[int, int],
    max_per_image: int = 100,
) -> Instances:
    """Return the instances from one image's logits, float32: classes (Q, C + 1), masks (Q, h, w).

    The masks are upsampled to the model's input, cut to what is not padding, and resized to the image, bilinearly.
    Empty masks are dropped.
    """
    import torch
    from torch.nn.functional import interpolate

    probabilities = class_logits_QC.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    values, flat = probabilities.flatten().topk(min(max_per_image, probabilities.numel()))
    labels, queries = flat % classes, flat // classes
    used, back = queries.unique(return_inverse=True)
    masks = interpolate(mask_logits_Qhw[used][None], size=input_size, mode="bilinear", align_corners=False)
    masks = masks[..., : content_size[0], : content_size[1]]
    masks = interpolate(masks, size=image_size, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    area = inside.flatten(1).sum(1)
    mean = (masks.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    boxes = torch.stack([_box(mask) for mask in inside]).to(values)
    kept = area[back] > 0
    labels, values, back = labels[kept], values[kept], back[kept]
    return Instances(labels, values * mean[back], boxes[back], inside[back])


def _box(inside_HW: torch.Tensor) -> torch.Tensor:
    """Return x0, y0, x1, y1 around a mask, the far edges exclusive; zeros for an empty one."""
    import torch

    rows, columns = inside_HW.any(1).nonzero().flatten(), inside_HW.any(0).nonzero().flatten()
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
