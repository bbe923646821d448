"""Every algorithm on the mixture of three Gaussians: figures docs/figures/toy_<name>.png, masses and seconds as JSON.

The world and the runs are those of tests/algorithms; they take about half a minute on one thread.

python -m scripts.figures.toy [--only "flow_grpo fast"] [--out docs/figures]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from flowalign.models.base import Policy
from tests.algorithms.cases import CASES, Case
from tests.algorithms.mixture import MODES, RADIUS, mass, mixture_policy, samples

matplotlib.use("agg")
from matplotlib import pyplot

COLORS = ("#2563eb", "#ea580c")
DRAWN = 500
WIDEST = 3.7  # samples further out are drawn at the edge, not lost


def panel(axes: pyplot.Axes, made: dict[int, Tensor], title: str) -> None:
    """Samples (N, 2) of each prompt over the modes; the rewarded ones have the prompt's colour."""
    for mode, (x, y) in enumerate(MODES.tolist()):
        color = COLORS[mode] if mode in made else "#9ca3af"
        axes.add_patch(pyplot.Circle((x, y), RADIUS, fill=mode in made, color=color, alpha=0.18, linewidth=0))
        axes.add_patch(pyplot.Circle((x, y), RADIUS, fill=False, color=color, linewidth=1.2))
    for prompt, points in made.items():
        x, y = points.clamp(-WIDEST, WIDEST).T.tolist()
        axes.scatter(x, y, s=3, color=COLORS[prompt], linewidths=0)
    axes.set(xlim=(-3.8, 3.8), ylim=(-3.8, 3.8), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def draw(name: str, case: Case, before: Policy, after: Policy, path: Path) -> None:
    """Before and after side by side, with the share of each prompt's mass that lies at its rewarded mode."""
    figure, panels = pyplot.subplots(1, 2, figsize=(5.2, 3.15), dpi=100)
    for axes, policy, when in zip(panels, (before, after), ("before", "after"), strict=True):
        made = {prompt: samples(policy, prompt, DRAWN, seed=prompt).flatten(1) for prompt in case.prompts}
        shares = " / ".join(f"{100 * mass(policy, prompt):.1f}" for prompt in case.prompts)
        where = "the shaded mode" if len(made) == 1 else "own mode"
        panel(axes, made, f"{when}: {shares} % at {where}")
    figure.suptitle(f"{name}, {case.iterations} iterations", fontsize=10)
    figure.tight_layout(pad=0.6, rect=(0, 0, 1, 0.98))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(48).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--only", choices=list(CASES), nargs="+", default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    before, results = mixture_policy(), {}
    for name in options.only:
        case, began = CASES[name], time.perf_counter()
        if case.models is not None:
            case.models()  # teachers are made once, and not in the student's time
            began = time.perf_counter()
        after = case.run()
        seconds = time.perf_counter() - began
        draw(name, case, before, after, options.out / f"toy_{name.replace(' ', '_').replace('-', '_')}.png")
        results[name] = {
            "iterations": case.iterations,
            "seconds": round(seconds, 2),
            "mass_before": [round(mass(before, prompt), 3) for prompt in case.prompts],
            "mass_after": [round(mass(after, prompt), 3) for prompt in case.prompts],
        }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
