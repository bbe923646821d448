"""Names of path families in a configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.algorithms import build_algorithm
from flowalign.config.pathfamilies import FORMULATIONS, canonical, formulation, may_learn
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.flow.path import PATHS
from flowalign.flow.pathfamilies import PATH_FAMILIES, path_family
from flowalign.intake.file import load_pretrain


def test_every_name_is_a_family_and_every_path_has_a_name() -> None:
    assert list(PATH_FAMILIES) == list(FORMULATIONS)
    assert {kind.path for kind in FORMULATIONS.values()} == set(PATHS)
    for name, kind in FORMULATIONS.items():
        assert canonical(name) == name and formulation(name) is kind
        assert path_family(name) is PATH_FAMILIES[name] and path_family(name).name == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("edm(0.00, 0.60)", "edm(0.0, 0.6)"),
        ("edm(0,.6)", "edm(0.0, 0.6)"),
        (" edm( 6e-1 , 1.2 ) ", "edm(0.6, 1.2)"),
        ("edm(-1.2, 1.2)", "edm"),
        ("v/cos ", "v/cos"),
    ],
)
def test_spellings_of_one_family_are_one_name(written: str, name: str) -> None:
    assert canonical(written) == name == canonical(name)
    assert path_family(written).name == path_family(name).name == name
    assert ModelConfig(family=written).family == name


def test_the_whole_grid_of_the_report_can_be_written() -> None:
    """P_m from -1.2 to 1.2, P_s from 0.6 to 1.8 (arXiv:2403.03206, sec. 5.1)."""
    for p_mean in (-1.2, -0.6, 0.0, 0.6, 1.2):
        for p_std in (0.6, 1.2, 1.8):
            family = path_family(f"edm({p_mean:.2f}, {p_std:.2f})")
            assert family.path.name == "edm" and 0.87 < family.initial_scale < 1


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("edn", "did you mean edm?"),
        ("ep/cos", "did you mean eps/cos?"),
        ("flow", r"known: rf, .*, edm\(p_mean, p_std\)"),
        ("edm(0.6)", r"write edm\(p_mean, p_std\)"),
        ("edm(a, b)", r"write edm\(p_mean, p_std\)"),
        ("edm(0, 1, 2)", r"write edm\(p_mean, p_std\)"),
        ("edm(0, nan)", "p_std lies between 0.3 and 3"),
        ("edm(inf, 1)", "p_mean lies between -3 and 3"),
        ("edm(0, -1.2)", "p_std lies between 0.3 and 3"),
        ("edm(-3, 0.3)", "its noise ends at 0.24 times the image"),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_there_is(written: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        canonical(written)
    with pytest.raises(ValueError, match=said):
        ModelConfig(family=written)


def test_rollouts_begin_where_a_path_ends_in_noise_and_the_network_can_be_asked() -> None:
    begin = [name for name in FORMULATIONS if formulation(name).begins_with_noise]
    assert begin == ["rf", "v/cos"]
    assert begin == [name for name, family in PATH_FAMILIES.items() if family.initial_scale == 1]


def test_what_one_family_may_learn_of_another() -> None:
    assert [name for name in (*FORMULATIONS, "edm(0, 0.6)") if may_learn(name, "rf")] == [
        "rf",
        "v/cos",
        "edm",
        "edm/rf",
        "edm/cos",
        "edm(0, 0.6)",
    ]
    assert may_learn("edm(0, .6)", "edm(0.0, 0.60)") and may_learn("edm(-1.2, 1.2)", "edm")
    assert not may_learn("edm(0, .6)", "edm") and not may_learn("rf", "edm") and not may_learn("eps/cos", "v/cos")


def test_a_family_is_written_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    path, bank = tmp_path / "run.yaml", tmp_path / "bank"
    bank.mkdir()
    for name in ("manifest.json", "prompts.json"):
        (bank / name).write_text("{}")
    path.write_text(
        "name: a\nmodel: {path: shapes, family: edm/rf}\nlatents: bank\n"
        "algorithm: {type: rectified_flow, family: edm/rf, density: uniform}\n"
        "phases: [{iterations: 1, learning_rate: 1.0e-4, final_learning_rate: 1.0e-4}]\n"
    )
    written = ["model.family=edm(0.00, 0.60)", "algorithm.family=edm(0,.6)"]
    config = load_pretrain(path, written).config
    needs = build_algorithm(config.algorithm).needs
    assert config.model.family == needs.path_family == "edm(0.0, 0.6)" == path_family(needs.path_family).name
    with pytest.raises(ConfigError, match=r"^model\.family: is edm/rf, which cannot learn edm\(0\.0, 0\.6\)"):
        load_pretrain(path, written[1:])
    with pytest.raises(ConfigError, match=r"^algorithm\.family: got 'edm/coz'; did you mean edm/cos\?"):
        load_pretrain(path, ["algorithm.family=edm/coz"])
    with pytest.raises(ConfigError, match=r"^model\.family: got 'edm\(0, 9\)'; p_std lies between 0\.3 and 3"):
        load_pretrain(path, ["model.family=edm(0, 9)"])


def test_names_are_read_without_torch() -> None:
    program = (
        "import sys, flowalign.config.pathfamilies as p; p.canonical('edm(0, 0.6)'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
