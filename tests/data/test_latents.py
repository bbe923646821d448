"""Latent banks as real files: what is written is read, what is damaged is refused, draws are functions of the step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowalign.data.banks.files import write_tensors
from flowalign.data.banks.latents import Embeddings, LatentBank, LatentsError, Shard, load_bank, save_bank
from flowalign.data.feed import Captioned
from flowalign.flow.randomness import seeded
from tests.conditions import text_condition

PROMPTS = [f"prompt {i}" for i in range(12)]


def latents(count: int, size: tuple[int, int] = (4, 4), seed: int = 0) -> Tensor:
    return torch.randn(count, 16, *size, generator=seeded(seed)).half()


def shard(count: int, size: tuple[int, int], seed: int, *, noise: bool = False) -> Shard:
    rows = {
        name: torch.randint(12, (count,), generator=seeded(seed, k)) for k, name in enumerate(("original", "synthetic"))
    }
    return Shard(latents(count, size, seed), rows, latents(count, size, seed + 100) if noise else None)


def bank_of_three(noise: bool = False) -> LatentBank:
    shards = [shard(5, (4, 4), 1, noise=noise), shard(3, (4, 6), 2, noise=noise), shard(4, (4, 4), 3, noise=noise)]
    return LatentBank.of_shards(shards, PROMPTS, encoder="abc")


@pytest.mark.parametrize("noise", [False, True])
def test_a_bank_of_several_sizes_and_captions_is_read_as_it_was_written(tmp_path: Path, noise: bool) -> None:
    bank = bank_of_three(noise)
    save_bank(tmp_path, bank)
    read = load_bank(tmp_path)
    assert read.prompts == PROMPTS and read.captions == ("original", "synthetic") and read.encoder == "abc"
    assert read.buckets == {(4, 4): 9, (4, 6): 3} and len(read) == 12 and read.has_noise == noise
    for own, found in zip(bank.shards, read.shards, strict=True):
        assert torch.equal(own.latents, found.latents)
        assert all(torch.equal(own.rows[name], found.rows[name]) for name in own.rows)
        assert (own.noise is None and found.noise is None) or torch.equal(own.noise, found.noise)  # type: ignore[arg-type]


def test_a_bank_without_latents_is_refused(tmp_path: Path) -> None:
    save_bank(tmp_path, LatentBank(torch.zeros(0, 16, 8, 8).half(), torch.zeros(0).long(), []))
    with pytest.raises(LatentsError, match=r"manifest.json counts 0 latents; the bank is empty"):
        load_bank(tmp_path)


def test_noise_and_latents_of_a_draw_belong_together(tmp_path: Path) -> None:
    bank = bank_of_three(noise=True)
    pairs = {
        tuple(a.flatten().tolist()): b.float()
        for own in bank.shards
        for a, b in zip(own.latents, own.noise, strict=True)  # type: ignore[arg-type]
    }
    for step in range(8):
        drawn = bank.draw(step, 6, seed=0)
        assert drawn.noise is not None
        for clean, noise in zip(drawn.latents, drawn.noise, strict=True):
            assert torch.equal(pairs[tuple(clean.flatten().tolist())], noise)


def old_bank(directory: Path) -> tuple[Tensor, Tensor]:
    values, rows = latents(40), torch.randint(12, (40,), generator=seeded(9))
    save_file({"latents": values, "prompt": rows}, directory / "latents.safetensors")
    (directory / "prompts.json").write_text(json.dumps(PROMPTS) + "\n")
    return values, rows


def test_the_old_layout_of_one_file_draws_the_bits_it_always_drew(tmp_path: Path) -> None:
    values, rows = old_bank(tmp_path)
    bank = load_bank(tmp_path)
    for step in (0, 1, 77):
        index = torch.randint(40, (16,), generator=seeded(5, 2, step))
        drawn = bank.draw(step, 16, seed=5)
        assert torch.equal(drawn.latents, values[index].float()) and drawn.latents.dtype == torch.float32
        assert torch.equal(drawn.rows, rows[index]) and drawn.noise is None


def test_a_bank_draws_the_same_whether_it_lies_in_one_file_or_in_shards(tmp_path: Path) -> None:
    values, rows = old_bank(tmp_path)
    parts = [Shard(values[a:b], {"original": rows[a:b]}) for a, b in ((0, 7), (7, 8), (8, 40))]
    save_bank(tmp_path / "new", LatentBank.of_shards(parts, PROMPTS))
    one, many = load_bank(tmp_path), load_bank(tmp_path / "new")
    for step in range(5):
        a, b = one.draw(step, 64, seed=3), many.draw(step, 64, seed=3)
        assert torch.equal(a.latents, b.latents) and torch.equal(a.rows, b.rows)


def test_a_batch_has_one_size_which_is_drawn_as_often_as_it_has_latents() -> None:
    bank = bank_of_three()
    widths = [bank.draw(step, 2, seed=0).latents.shape[-1] for step in range(600)]
    assert widths == [bank.draw(step, 2, seed=0).latents.shape[-1] for step in range(600)]
    assert set(widths) == {4, 6} and 400 < widths.count(4) < 500  # 9 of 12 are square


def test_captions_are_mixed_sample_by_sample_by_their_weights() -> None:
    rows = {"original": torch.zeros(50).long(), "synthetic": torch.ones(50).long(), "other": torch.full((50,), 2)}
    bank = LatentBank.of_shards([Shard(latents(50), rows)], PROMPTS)
    drawn = torch.cat([bank.draw(s, 50, 0, {"synthetic": 0.3, "original": 0.1}).rows for s in range(40)])
    assert set(drawn.tolist()) == {0, 1} and 0.7 < drawn.float().mean() < 0.8
    for captions in (None, {}):
        assert set(bank.draw(0, 50, 0, captions).rows.tolist()) == {0}
    assert torch.equal(bank.draw(3, 50, 0).latents, bank.draw(3, 50, 0, {"other": 1.0}).latents)


@pytest.mark.parametrize(
    ("captions", "said"),
    [({"synthetik": 1.0}, "no captions 'synthetik'; it has original, synthetic"), ({"original": 0.0}, "positive")],
)
def test_captions_that_cannot_be_drawn_are_refused(captions: dict[str, float], said: str) -> None:
    with pytest.raises(LatentsError, match=said):
        bank_of_three().draw(0, 2, 0, captions)


def test_a_changed_byte_is_found_and_the_shard_named_with_both_hashes(tmp_path: Path) -> None:
    save_bank(tmp_path, bank_of_three())
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    expected = json.loads((tmp_path / "manifest.json").read_text())["shards"][1]["sha256"]
    with pytest.raises(LatentsError, match=f"shard-00001.*sha256 (?!{expected}).*expects {expected}.*copy the file"):
        load_bank(tmp_path)
    assert len(load_bank(tmp_path, verify=False)) == 12


def cut_shard(directory: Path) -> None:
    path = directory / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_shard(directory: Path) -> None:
    (directory / "shard-00002.safetensors").unlink()


def change(**values: Any) -> Any:
    def apply(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_shard, "shard-00002.safetensors has .* bytes, manifest.json says"),
        (without_shard, "shard-00002.safetensors is missing, which manifest.json names"),
        (change(version=2), "version 2, this program reads .* version 1"),
        (change(shards=[]), "the bank is empty"),
        (change(shards=[{"file": "../secret", "bytes": 1}]), "lie beside its manifest"),
        (change(captions=["original", "third"]), "no tensor 'caption.third'"),
        (change(noise=True), "holds .*'noise': False.* says .*'noise': True"),
        (lambda directory: (directory / "manifest.json").write_text("{"), "no manifest of a latent bank"),
    ],
)
def test_a_bank_that_is_not_whole_is_refused_without_reading_all_of_it(tmp_path: Path, damage: Any, said: str) -> None:
    save_bank(tmp_path, bank_of_three())
    damage(tmp_path)
    with pytest.raises(LatentsError, match=said):
        load_bank(tmp_path, verify=False)


def test_rows_beyond_the_prompts_are_refused(tmp_path: Path) -> None:
    save_bank(tmp_path, LatentBank(latents(2), torch.tensor([0, 12]), PROMPTS))
    with pytest.raises(LatentsError, match=r"has 12 prompts, shard-00000.safetensors refers to more"):
        load_bank(tmp_path)


def test_a_bank_written_over_another_one_is_the_new_one(tmp_path: Path) -> None:
    old_bank(tmp_path)
    save_bank(tmp_path, bank_of_three())
    save_bank(tmp_path, LatentBank(latents(2), torch.tensor([0, 1]), PROMPTS))
    assert len(load_bank(tmp_path)) == 2 and not (tmp_path / "latents.safetensors").exists()


def test_embeddings_are_shortened_but_never_lengthened() -> None:
    tokens = torch.arange(3 * 10).view(3, 10, 1).float()
    table = text_condition(tokens, torch.zeros(3, 2), torch.arange(3), tokens[0], torch.zeros(2))
    embeddings = Embeddings(table, max_sequence_length=6)
    short = embeddings.condition(2)
    assert torch.equal(short.text["tokens"], tokens[:, :6]) and torch.equal(short.null["tokens"][0], tokens[0, :6])
    with pytest.raises(LatentsError, match="max_sequence_length 6, the run asks for 7"):
        embeddings.condition(7)


@pytest.mark.parametrize("embedded", [False, True])
def test_a_file_that_is_cut_off_while_it_is_read_is_a_sentence_and_kills_nobody(tmp_path: Path, embedded: bool) -> None:
    """In a child: where nobody looks, the kernel ends the process that reads the file's mapping."""
    save_bank(tmp_path, bank_of_three())
    bank, name = load_bank(tmp_path), "shard-00000.safetensors"
    if embedded:
        entry = write_tensors(tmp_path / "embeddings.safetensors", {
            "tokens": torch.ones(12, 600, 8), "pooled": torch.ones(12, 4), "null_tokens": torch.ones(600, 8),
            "null_pooled": torch.ones(4),
        })  # fmt: skip
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["embeddings"] = {**entry, "max_sequence_length": 512}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        name = entry["file"]
    captioned = Captioned(tmp_path, cast(Any, None), 512, "abc", tmp_path) if embedded else None
    out = tmp_path / "said"
    if (child := os.fork()) == 0:
        os.truncate(tmp_path / name, 0)
        try:
            for step in range(8):
                drawn = bank.draw(step, 4, 0)
                if captioned:
                    captioned.condition(drawn.rows, 512)
        except LatentsError as error:
            out.write_text(str(error))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert f"{tmp_path / name} has been cut off to 0 of " in out.read_text()
