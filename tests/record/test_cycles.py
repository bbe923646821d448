"""What is imported at the beginning of a process is left out of every search for cycles."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowalign.record.cycles import importing


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_nothing_is_searched_while_modules_are_imported_and_they_never_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many_objects.py").write_text("kept = [[i] for i in range(50_000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    searched: list[int] = []
    gc.callbacks.append(lambda phase, facts: searched.append(facts["generation"]))
    frozen = gc.get_freeze_count()
    try:
        with importing():
            import many_objects  # type: ignore[import-not-found]
        assert not searched and gc.isenabled()
    finally:
        gc.callbacks.pop()
        del sys.modules["many_objects"]
    assert gc.get_freeze_count() > frozen + 50_000
    assert not any(found is many_objects.kept for found in gc.get_objects())


def test_where_nothing_was_new_cycles_are_found_as_ever() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        import gc as again
    assert again.get_freeze_count() == frozen and gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_is_as_it_was_after_an_import_that_failed(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(ModuleNotFoundError), importing():
        import absent_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled() is enabled


def test_the_last_search_of_a_process_finds_everything() -> None:
    code = (
        "import atexit, gc\natexit.register(lambda: print(gc.get_freeze_count()))\n"
        "from flowalign.record.cycles import importing\nwith importing():\n    import json\n"
        "print(gc.get_freeze_count() > 0)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "0"]
