"""Embeddings of prompts on disk: what decides them, what is read and encoded, and that the bits are the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_encoders
from flowalign.models.embeddings import DamagedEmbedding, EmbeddingStore, NotEmbedded
from flowalign.models.encoders import Encoders
from flowalign.run import encoded
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.run.workers import RolloutWorker
from flowalign.samples.joined import join_trajectories
from flowalign.samples.opened import torch_threads
from flowalign.samples.texts import texts_of_run
from flowalign.types import Condition, Trajectories
from tests.tiny import run_config

LENGTH = 96
LONG = "two small dogs run over the grass near the old house, with a zebra and a camel, two red cubes on the grass"
ROWS = [{"prompt": "a red cube", "negative_prompt": "blurry"}, {"prompt": LONG}, {"prompt": "a zebra"}]
TEXTS = ["a red cube", LONG, "blurry"]
PIPELINES: dict[str, dict[str, Any]] = {"sd3": {"t5": True}, "z_image": {}, "qwen_image": {}}
WRITTEN_EARLIER = "ca3a9e79a3f17733d4d69d5017089e4c25e32f718e088b21ac656cb071e6cefd"  # as commit 01b674d hashes
Build = Callable[..., Path]


@contextmanager
def calls_of(encoders: Encoders) -> Iterator[list[str]]:
    """Give the list of the text encoders that were called, one entry a call."""
    called: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda module, *_: called.append(type(module).__name__))
        for part in encoders.text_encoders
    ]
    yield called
    for hook in hooks:
        hook.remove()


def store(folder: Path, model: ModelConfig, texts: list[str] | None = None) -> list[str]:
    """Encode ``texts`` through a store in ``folder`` by encoders that are loaded anew; return the calls of these."""
    encoders = load_encoders(model, embeddings=EmbeddingStore(folder, model, "cpu"))
    with torch_threads(1), calls_of(encoders) as called:
        for text in TEXTS if texts is None else texts:
            encoders.encode_text(text, model.max_sequence_length)
    return called


def config_of(folder: Path, model: Path, name: str, **rollout: Any) -> AlignConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    guidance = {"guidance_scale": 4.0}
    config = run_config(
        model,
        name=name,
        iterations=2,
        runs_dir=str(folder / "runs"),
        algorithm={"type": "flow_grpo", "group_size": 2, "num_steps": 2, **guidance},
        data={"prompts": str(folder / "prompts.jsonl"), "groups_per_iteration": 3},
        rewards=[{"spec": "jpeg"}],
        learner={"engine": "torch", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-3}},
        rollout={"chunk_size": 4, **rollout},
        evaluation={"prompts": str(folder / "prompts.jsonl"), "num_samples": 3, "num_steps": 2, "scorer": "jpeg"},
    )
    own = {"max_sequence_length": LENGTH, "negative_prompt": "low quality", "height": 64, "width": 64}
    return config.model_copy(update={"model": config.model.model_copy(update=own)})


def collected(config: AlignConfig, base: Path) -> tuple[dict[str, Tensor], list[str], LocalBackend]:
    """Roll out an iteration and an evaluation; return what was made, the calls of text encoders, and the backend."""
    run, backend = build_run(config), LocalBackend(config, base)
    assert backend.rollouts is not None and run.evaluation is not None
    plan = run.plan(0)
    assert plan is not None
    backend.sync()
    with calls_of(backend.rollouts.policy.encoders) as called:
        made = backend.collect(run.sampler.batch(0), plan, seed=0)
        batch, walk, seed = run.evaluation
        seen = backend.collect(batch, walk, seed=seed, evaluation=True)
    joined = join_trajectories(made.trajectories)
    evaluated = torch.as_tensor(join_trajectories(seen.trajectories).final_NCHW[torch.arange(len(batch))])
    final = torch.as_tensor(joined.final_NCHW[torch.arange(len(joined))])
    rows = {f"{place} {name}": row for place, part in enumerate(made.trajectories) for name, row in named(part).items()}
    update = backend.update(made.trajectories, made.scores, 0)
    assert update.metrics["replay/max_abs_dlogp"] == 0
    own = {"final": final, "log_prob": joined.log_prob_NS, "evaluated": evaluated, "images": _images(made)}
    return own | rows | backend.learner.weights(), called, backend


def _images(made: Any) -> Tensor:
    return torch.as_tensor(made.preview.thumbnails)


def named(chunk: Trajectories) -> dict[str, Tensor]:
    """Return the rows of each sample of a chunk, by name."""
    condition = chunk.condition
    assert isinstance(condition, Condition)
    rows = {f"text.{name}": row for name, row in condition.expand().items()}
    return rows | {f"null.{name}": row for name, row in condition.negative.expand().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("name", ["sd3", "z_image", pytest.param("qwen_image", marks=pytest.mark.slow)])
def test_the_bits_are_those_of_a_run_without_a_store_and_a_second_start_encodes_nothing(
    name: str, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the text encoders are dropped; rows and the run have negative prompts."""
    model = tiny(name, **PIPELINES[name])
    plain, called, _ = collected(config_of(tmp_path, model, "plain"), tmp_path)
    assert called and not (tmp_path / "runs" / ".encoded").exists()
    folder = {"embeddings": str(tmp_path / "kept")}
    first, called, _ = collected(config_of(tmp_path, model, "first", **folder), tmp_path)
    texts = {"a red cube", LONG, "a zebra", "blurry", "low quality"}
    assert equal(first, plain) and len(called) == len(texts) * (3 if name == "sd3" else 1)
    second, called, _ = collected(config_of(tmp_path, model, "second", **folder), tmp_path)
    assert equal(second, plain) and called == []
    config = config_of(tmp_path, model, "dropped", text_encoders="drop", **folder)
    missing = set(texts_of_run(config, build_run(config).algorithm)) - texts
    store(tmp_path / "kept", config.model, sorted(missing))  # the empty text, which no row here is led away from
    monkeypatch.setattr(encoded.subprocess, "Popen", None)
    dropped, called, backend = collected(config, tmp_path)
    assert equal(dropped, plain) and called == []
    assert backend.rollouts is not None and backend.rollouts.policy.encoders.text_encoders == []


def changed_copy(directory: Path, to: Path, change: Callable[[Path], None]) -> ModelConfig:
    shutil.copytree(directory, to)
    change(to)
    return ModelConfig(path=str(to), max_sequence_length=LENGTH)


def another_template(model: Path) -> None:
    template = model / "tokenizer" / "chat_template.jinja"
    template.write_text("please draw: " + template.read_text())


def another_weight(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last] + 1e-3
    save_file(tensors, file, {"format": "pt"})


def another_norm(model: Path) -> None:
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))


def another_vocabulary(model: Path) -> None:
    file = model / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    first, second, *_ = sorted(words, key=lambda word: words[word])
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(content))


CHANGES = [another_template, another_weight, another_norm, another_vocabulary]


def test_another_template_encoder_tokenizer_length_or_precision_encodes_anew_and_a_copy_nothing(
    tiny: Build, tmp_path: Path
) -> None:
    folder, own = tmp_path / "kept", ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)
    assert len(store(folder, own)) == len(TEXTS) and store(folder, own) == []

    def called_cut(model: Path) -> None:  # as a tokenizer that was called so leaves its file
        file = model / "tokenizer" / "tokenizer.json"
        cut = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}, indent=1))

    assert store(folder, changed_copy(Path(own.path), tmp_path / "copy", called_cut)) == []
    for change in CHANGES:
        other = changed_copy(Path(own.path), tmp_path / change.__name__, change)
        assert len(store(folder, other)) == len(TEXTS), change.__name__
        assert store(folder, other) == []
    shorter, half = own.model_copy(update={"max_sequence_length": 64}), own.model_copy(update={"dtype": "bfloat16"})
    for other in (shorter, half):
        assert len(store(folder, other)) == len(TEXTS) and store(folder, other) == []
    assert store(folder, own, [*TEXTS, "a camel"]) == ["Qwen3Model"]


def test_files_that_were_touched_are_read_again_and_others_are_not(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed_copy(tiny("z_image"), tmp_path / "model", lambda path: None)

    def key() -> str:
        return EmbeddingStore(tmp_path / "kept", model, "cpu").key("a", LENGTH)

    first = key()
    assert not (tmp_path / "kept").exists()  # they are too fresh for their times to tell
    monkeypatch.setattr("flowalign.models.fingerprint.FRESH_S", 0)
    assert key() == first
    (kept,) = (tmp_path / "kept" / "encoders").iterdir()
    known = kept.read_text()
    kept.write_text("0" * len(known))
    assert key() != first  # what it says was read, and no weight
    kept.write_text("damaged")
    assert key() == first and kept.read_text() == known
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    before = file.stat()
    flipped(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = file.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert key() != first


def test_the_kind_of_device_and_on_a_cpu_the_threads_are_a_part_of_the_name(tiny: Build, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)

    def key(device: str, threads: int) -> str:
        with torch_threads(threads):
            return EmbeddingStore(tmp_path, model, device).key("a", LENGTH)

    assert len({key("cpu", 1), key("cpu", 2), key("cuda", 1)}) == 3
    assert key("cuda:1", 2) == key("cuda", 1)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {"flipped": flipped, "cut": cut, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_encoded_anew_or_refused_where_nothing_encodes(
    damage: str, tiny: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)
    store(tmp_path, model)
    embeddings = EmbeddingStore(tmp_path, model, "cpu")
    with torch_threads(1):
        path = embeddings.path(embeddings.key("blurry", LENGTH))
        whole = path.read_bytes()
        DAMAGES[damage](path)
        assert store(tmp_path, model) == ["Qwen3Model"] and path.read_bytes() == whole
        assert f"{path} was damaged" in caplog.text and "'blurry' is encoded anew" in caplog.text
        DAMAGES[damage](path)
        alone = load_encoders(model, text=False, embeddings=embeddings)
        with pytest.raises(DamagedEmbedding, match=rf"{path.name} was damaged .*'blurry' anew"):
            alone.encode_text("blurry", LENGTH)
        with pytest.raises(NotEmbedded, match="no embedding of 'a camel'"):
            alone.encode_text("a camel", LENGTH)
        assert embeddings.lacking(TEXTS, LENGTH) == ["blurry"]


def test_before_a_start_a_file_that_was_cut_short_counts_as_missing(tiny: Build, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)
    store(tmp_path, model)
    embeddings = EmbeddingStore(tmp_path, model, "cpu")
    with torch_threads(1):
        assert embeddings.lacking([*TEXTS, "a camel", "a camel"], LENGTH) == ["a camel"]
        cut(embeddings.path(embeddings.key(LONG, LENGTH)))
        assert embeddings.lacking(TEXTS, LENGTH) == [LONG]


def test_what_an_earlier_version_wrote_is_read_and_its_damages_are_found(tiny: Build, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)
    embeddings = EmbeddingStore(tmp_path, model, "cpu")
    rows = {
        "tokens": torch.arange(6, dtype=torch.bfloat16).view(1, 2, 3),
        "mask": torch.tensor([[True, False]]),
    }
    with torch_threads(1):
        key = embeddings.key("blurry", LENGTH)
        said = {"key": key, "text": "blurry", "sha256": WRITTEN_EARLIER}
        embeddings.path(key).parent.mkdir()
        save_file(rows, embeddings.path(key), {"embedding": json.dumps(said)})
        read = embeddings.read(key)
        assert read is not None and all(torch.equal(read[name], row) for name, row in rows.items())
        assert embeddings.lacking(["blurry"], LENGTH) == []
        flipped(embeddings.path(key))
        with pytest.raises(DamagedEmbedding, match="its content has changed"):
            embeddings.read(key)


def test_what_is_read_stays_when_its_file_is_written_over(tmp_path: Path) -> None:
    embeddings, rows = EmbeddingStore(tmp_path, ModelConfig(), "cpu"), {"tokens": torch.ones(1, 64, 512)}
    embeddings.write("a" * 64, "blurry", rows)
    read = embeddings.read("a" * 64)
    flipped(embeddings.path("a" * 64))
    assert read is not None and torch.equal(read["tokens"], rows["tokens"])


def _write_often(folder: Path, model: ModelConfig, rows: dict[str, Tensor]) -> None:
    embeddings = EmbeddingStore(folder, model, "cpu")
    for _ in range(40):
        for text in TEXTS:
            embeddings.write(embeddings.key(text, LENGTH), text, rows)


def test_processes_that_write_the_same_at_once_leave_whole_files_alone(tiny: Build, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)
    rows, forked = {"tokens": torch.randn(1, 64, 512)}, multiprocessing.get_context("fork")
    embeddings = EmbeddingStore(tmp_path, model, "cpu")
    keys = [embeddings.key(text, LENGTH) for text in TEXTS]
    writers = [forked.Process(target=_write_often, args=(tmp_path, model, rows)) for _ in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        for key in keys:
            found = embeddings.read(key)
            seen += found is not None
            assert found is None or torch.equal(found["tokens"], rows["tokens"])
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and seen > 0
    assert embeddings.lacking(TEXTS, LENGTH) == []
    assert sorted(path.stem for path in tmp_path.rglob("*.safetensors")) == sorted(keys)
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_written_to_is_said_and_does_not_end_what_has_encoders(
    tiny: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    model = ModelConfig(path=str(tiny("z_image")), max_sequence_length=LENGTH)
    assert len(store(tmp_path / "file" / "kept", model)) == len(TEXTS)
    assert "from here on no embeddings are kept" in caplog.text


def test_a_worker_without_text_encoders_says_which_prompt_it_was_not_told_of(tiny: Build, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny("z_image"), "run", text_encoders="drop")
    worker = RolloutWorker(config)
    with pytest.raises(NotEmbedded, match=r"\.encoded has no embedding of 'a red cube', and the text encoders were"):
        worker.policy.encoders.encode_prompts(["a red cube"], LENGTH)
