"""What a pass holds, counted without memory, is what the allocator gives out for the same pass with numbers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flowalign.config.sections import AttentionKernel, LoraConfig, ModelConfig
from flowalign.config.updates import ActivationCheckpointing
from flowalign.engine.accumulate import autocast
from flowalign.models.activation_checkpointing import checkpoint_activations
from flowalign.models.build import load_encoders, load_network
from flowalign.models.directory import open_directory
from flowalign.models.inspect import empty_autoencoder, empty_network
from flowalign.models.traced import Held, decoding, held_by
from flowalign.types import Condition
from tests.families.tiny import FAMILIES

LENGTH, SIZE, SAMPLES = 96, 128, 4
DEEP = 5  # blocks, more than are run
TOLERANCE = 0.1
NAMES = [name for name in FAMILIES if name not in ("flux-schnell", "z_image-turbo")]
Dtype = Literal["float32", "bfloat16"]


@pytest.fixture(scope="module")
def deep(tiny: Callable[..., Path]) -> Callable[[str], Path]:
    """Return the pipeline of a family whose network has blocks that are only counted."""
    layers: dict[str, dict[str, Any]] = {"flux-dev": {"num_single_layers": DEEP}, "chroma": {"num_single_layers": DEEP}}
    layers |= {"z_image": {"n_layers": DEEP}}
    return lambda name: tiny(name, transformer=layers.get(name, {"num_layers": DEEP}))


def most_held(passes: Callable[[], object]) -> tuple[int, int]:
    """Bytes that the allocator had given out, beyond those of the beginning: the most at a time, and at the end."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        passes()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    now = most = 0
    events: list[Any] = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


def text_of(rows: dict[str, tuple[int, ...]]) -> Condition:
    generator = torch.Generator().manual_seed(0)
    text = {name: torch.randn(1, *row, generator=generator) for name, row in rows.items() if name != "mask"}
    index = torch.zeros(SAMPLES, dtype=torch.long)
    return Condition(text, text, index, index)


def measured(model: ModelConfig, how: ActivationCheckpointing, dtype: Dtype) -> tuple[int, int]:
    """Bytes of a pass without gradients, and of a forward and backward pass from the second micro-batch on."""
    network, directory = load_network(model), open_directory(model)
    checkpoint_activations(network.module, how)
    condition = text_of(directory.family.full_text(directory, model.max_sequence_length))
    x = torch.randn(SAMPLES, *network.latent_shape(model.height, model.width))
    t = torch.linspace(0.1, 0.9, SAMPLES)

    def learn() -> None:
        with autocast("cpu", dtype):
            loss = network.velocity(x, t, condition).square().mean()
        loss.backward()

    def roll() -> None:
        with torch.no_grad(), autocast("cpu", dtype):
            network.velocity(x, t, condition)

    rolled, tables = most_held(roll)  # some networks keep tables of positions from the first pass on
    learn()  # from here on gradients are there
    # What modules hold beside buffers is the traced pass's, which brings it where the pass runs.
    parts = network.module.modules()
    loose = sum(own.nbytes for part in parts for own in vars(part).values() if isinstance(own, Tensor))
    return rolled + loose, most_held(learn)[0] + tables + loose


def counted(model: ModelConfig, how: str, dtype: Dtype, **options: Any) -> Held:
    directory = open_directory(model)
    return held_by(
        empty_network(model),
        directory.latent_shape(model.height, model.width),
        directory.family.full_text(directory, model.max_sequence_length),
        half=dtype == "bfloat16",
        lora=model.lora,
        checkpointing=how,
        **options,
    )


def model_of(
    path: Path, dtype: Dtype = "float32", lora: bool = False, attention: AttentionKernel = "auto"
) -> ModelConfig:
    own = LoraConfig(rank=4) if lora else None
    size: dict[str, Any] = {"height": SIZE, "width": SIZE, "max_sequence_length": LENGTH}
    return ModelConfig(path=str(path), dtype=dtype, lora=own, attention=attention, **size)


@pytest.mark.parametrize(
    ("name", "lora", "dtype", "hows"),
    [
        *((name, False, "float32", ("none", "blocks")) for name in NAMES),
        *((name, True, "bfloat16", ("none",)) for name in NAMES),
        ("sd3", False, "bfloat16", ("none", "selective")),
    ],
)
def test_a_pass_holds_what_was_counted_without_memory(
    deep: Callable[[str], Path], name: str, lora: bool, dtype: Dtype, hows: Sequence[ActivationCheckpointing]
) -> None:
    model = model_of(deep(name), dtype, lora)
    for how in hows:
        rolled, learned = measured(model, how, dtype)
        own = counted(model, how, dtype)
        assert own.learned.at(SAMPLES) == pytest.approx(learned, rel=TOLERANCE), how
        # A pass this small in bfloat16 held 14 % more on a processor with AMX; why is not known.
        loose = dtype == "bfloat16" and not lora
        assert own.rolled.at(SAMPLES) == pytest.approx(rolled, rel=0.2 if loose else TOLERANCE), how


def test_plain_attention_holds_a_number_for_each_pair_of_tokens(deep: Callable[[str], Path]) -> None:
    found = {}
    for kernel in ("math", "flash"):
        model = model_of(deep("sd3"), attention=kernel)
        found[kernel] = counted(model, "none", "float32").learned.at(SAMPLES)
        assert found[kernel] == pytest.approx(measured(model, "none", "float32")[1], rel=0.02)
    assert found["math"] > 1.2 * found["flash"]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_are_alike_are_counted_and_not_run(deep: Callable[[str], Path], name: str) -> None:
    model = model_of(deep(name))
    short, whole = (counted(model, "none", "float32", whole=whole) for whole in (False, True))
    assert short.learned.each == pytest.approx(whole.learned.each, rel=0.01)
    assert short.rolled.each == pytest.approx(whole.rolled.each, rel=0.01)


@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_the_decoding_of_images_holds_what_was_counted(tiny: Callable[..., Path], name: str) -> None:
    model = model_of(tiny(name))
    encoders, directory = load_encoders(model, text=False), open_directory(model)
    shape = directory.latent_shape(SIZE, SIZE)
    latents = torch.randn(SAMPLES, *shape)
    with torch.no_grad():
        found, _ = most_held(lambda: encoders.decode_pixels(latents))
    autoencoder = empty_autoencoder(model)
    assert autoencoder is not None
    line, flops = decoding(directory.family.decode, autoencoder, shape, torch.float32)
    assert line.at(SAMPLES) == pytest.approx(found, rel=0.2)  # convolutions rearrange what they are given
    assert flops > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_s_autocast_is_followed(deep: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch itself keeps of tensors that are said to lie on a GPU, by its own list of what is float32 there."""
    import flowalign.models.traced as traced

    model = model_of(deep(name), "bfloat16")
    found = {device: forward_on(model, device, traced) for device in ("cpu", "gpu", "cuda")}
    # FLUX.1 and Chroma have torch's RMS norm, of which a GPU keeps less than the parts that it is made of here.
    assert 0.98 * found["cuda"] < found["gpu"] < 1.15 * found["cuda"]
    assert found["cpu"] <= 1.02 * found["cuda"] or name in ("flux-dev", "chroma")


def forward_on(model: ModelConfig, device: str, traced: Any) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, casts of weights left out."""
    directory = open_directory(model)
    rows = directory.family.full_text(directory, LENGTH)
    counts = []
    real = "cuda" if device == "cuda" else "cpu"
    for samples in (2, 4):
        own, _ = traced._ready(empty_network(model), None, "none", True, "gpu" if device == "gpu" else "cpu")
        own = replace(own, mixed=False)  # torch.autocast would be off where there is no GPU
        with FakeTensorMode(allow_non_fake_inputs=True), traced._Fused():
            with torch.device(real):
                module = traced._without_numbers(own.module, torch.bfloat16)
                x, t, condition = traced._inputs(directory.latent_shape(SIZE, SIZE), rows, samples)
            emulated = traced._AsOnAGpu() if device == "gpu" else nullcontext()
            with emulated, traced._Live([*module.parameters(), *module.buffers()]) as live:
                torch.set_autocast_enabled(real, True)
                torch.set_autocast_dtype(real, torch.bfloat16)
                try:
                    loss = own.velocity(x, t, condition)
                finally:
                    torch.set_autocast_enabled(real, False)
                    torch.clear_autocast_cache()
                counts.append(live.now)
                del loss
    return counts[1] - counts[0]
