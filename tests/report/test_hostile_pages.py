"""Pages about somebody else's run: what it calls scores, prompts and files is text, and only its files are shown."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from flowalign.config.alignment import AlignConfig
from flowalign.export.card import write_card
from flowalign.report import figures, write_report
from tests.report.test_report import Page, config, iteration, write_samples

SCRIPT = "document.title='ow'+'ned'"
PAYLOADS = (
    f'"><img src=x onerror={SCRIPT}>',
    f"'><svg/onload={SCRIPT}>",
    f"</title></style></script><script>{SCRIPT}</script>",
    f"]]><script>{SCRIPT}</script>",
    f"&lt;script&gt;{SCRIPT}&lt;/script&gt;",
    f"<iframe srcdoc='<script>{SCRIPT.replace('document', 'top.document')}</script>'></iframe>",
    "{{ config }}{% include 'x' %}",
    r"$\frac{$ \1 \g<0> a\b",
    "_hidden",
    ' id="text_1" #010203 xmlns="x" font: 9px y; width="1"',
    "\x1b[31m\u202ecba\u2066\n<!--",
)


def hostile_run(directory: Path) -> tuple[Path, AlignConfig]:
    """A run whose names, prompts, tags and settings are all of ``PAYLOADS``."""
    directory.mkdir(parents=True)
    rewards = {f"reward/{payload.replace('/', '|')}/mean": 0.5 + i / 100 for i, payload in enumerate(PAYLOADS)}
    scores = {f"eval/geneval/{payload.replace('/', '|')}": 0.5 for payload in PAYLOADS} | {"eval/geneval/overall": 0.5}
    rows = [{"iteration": n, **iteration(n), **rewards, **(scores if n in (1, 3) else {})} for n in range(1, 4)]
    rows += [{"iteration": PAYLOADS[0]}, {"iteration": 4, "ratio/mean": PAYLOADS[0], "grad_norm": 10**400}, PAYLOADS]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (1, 3):
        write_samples(directory, number, [0.0] * len(PAYLOADS))
        index = directory / "samples" / f"iteration_{number:06d}" / "index.json"
        listed = [
            row | {"prompt": text, "tag": text}
            for row, text in zip(json.loads(index.read_text()), PAYLOADS, strict=True)
        ]
        index.write_text(json.dumps(listed))
    named = [{"spec": "jpeg", "name": text, "options": {text: text}, "weight": 2} for text in PAYLOADS]
    sections = {"rewards": named, "runs_dir": PAYLOADS[0], "data": {"prompts": PAYLOADS[1]}}
    return directory, config(**sections, evaluation={"prompts": PAYLOADS[2], "every": 1})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run, own = hostile_run(tmp_path_factory.mktemp("hostile") / "run")
    return Page(write_report(run, own, {PAYLOADS[0]: PAYLOADS[1]}))


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.labels = set[str](), set[str](), list[str]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]


def test_a_page_has_the_elements_of_its_template_and_no_others(page: Page) -> None:
    found = Elements(page.source)
    assert not found.tags & {"script", "iframe", "object", "embed", "form", "base", "link", "foreignobject", "animate"}
    assert not [name for name in found.attributes if name.startswith("on") or name in ("srcdoc", "srcset", "action")]
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)


def test_every_hostile_text_stands_on_the_page_as_it_is(page: Page) -> None:
    for payload in PAYLOADS[:-1]:
        assert " ".join(payload.split()) in page.text, payload
    assert r"\x1b[31m\u202ecba\u2066\n<!--" in page.text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)


def test_a_figure_draws_names_as_they_are_and_is_labelled_with_them() -> None:
    names = [name for name in PAYLOADS if len(name) <= figures.LONGEST_NAME]
    svg = str(figures.lines([1, 2], {name: [0.0, 1.0] for name in names}))
    drawn = Elements(svg)
    text = HTMLText(svg).text
    for name in names[:-1]:
        assert name in text and name in drawn.labels[0], name
    assert drawn.tags <= {"svg", "g", "defs", "style", "path", "use", "text", "clippath", "rect"}


class HTMLText(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(source)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_template_calls_a_text_safe() -> None:
    template = Path(figures.__file__).with_name("template.html").read_text()
    assert not re.search(r"\|\s*safe|autoescape", template)
    assert "default-src 'none'" in template


def test_a_model_card_shows_names_as_they_are(tmp_path: Path) -> None:
    run, own = hostile_run(tmp_path / "run")
    base = tmp_path / ("models " + PAYLOADS[0].replace("/", "") + "`|`\n```\n# a")
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: 'x\\n# y <b>'\nlicense_link: [1, '\"']\ntags: [x]\n---\n")
    own = own.model_copy(update={"model": own.model.model_copy(update={"path": str(base)})})
    metrics = {f"eval/{payload}/overall": 0.5 for payload in PAYLOADS}
    write_card(tmp_path, own, {"iteration": 3, "metrics": metrics, "base_hash": PAYLOADS[0]}, kind="lora", run_dir=run)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    stated = yaml.safe_load(head)
    assert stated["license"] == "x\\n# y <b>" and stated["license_link"] == [1, '"'] and "tags" in stated
    found = Elements(MarkdownIt("gfm-like", {"linkify": False}).render(body))
    assert found.tags == {"h1", "h2", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}
    shown = " ".join(HTMLText(MarkdownIt("gfm-like", {"linkify": False}).render(body)).text.split())
    for payload in PAYLOADS[:-1]:
        assert f"{' '.join(payload.split())}/overall" in shown and f"{' '.join(payload.split())} × 2" in shown, payload
    assert len(re.findall("^ *```", body, re.MULTILINE)) == 2  # the example's own


@pytest.mark.parametrize("head", ["license: 'open", "license: {a: [", "[" * 9000, "a: b", "license: &a [*a]", "- x"])
def test_a_base_models_card_that_cannot_be_read_is_pointed_to(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    own = config().model_copy(update={"model": config().model.model_copy(update={"path": str(tmp_path)})})
    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", own, {"iteration": 1}, kind="pipeline", run_dir=tmp_path)
    assert "\nlicense: other\nlicense_name: same-as-base-model\n" in (tmp_path / "out" / "README.md").read_text()


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def title(file: Path, tmp_path: Path) -> str:
    """What a real browser shows as the page's title when all its scripts have run."""
    command = [browser() or "", "--headless", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return found[1]


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine; the parser's tests above run everywhere")
def test_a_real_browser_runs_nothing_of_a_hostile_run(page: Page, tmp_path: Path) -> None:
    bare = "".join(f"<p>{payload}</p>" for payload in PAYLOADS)
    (tmp_path / "bare.html").write_text(f"<!doctype html><title>calm</title>{bare}")
    (tmp_path / "page.html").write_text(page.source)
    (tmp_path / "broken.html").write_text(page.source.replace("<main>", f"<main>{bare}"))  # as if one were not escaped
    assert title(tmp_path / "bare.html", tmp_path) == "owned"  # this browser would
    assert title(tmp_path / "page.html", tmp_path) == "tiny · flowalign report"
    assert title(tmp_path / "broken.html", tmp_path) == "tiny · flowalign report"  # the page's policy holds it


SECRET = b"\x89PNG\r\n\x1a\n"


def test_a_report_shows_only_what_lies_inside_its_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "theirs"
    write_samples(run, 0, [1.0] * 6)
    write_samples(tmp_path / "elsewhere", 0, [1.0] * 6)
    secret = tmp_path / "elsewhere" / "samples" / "iteration_000000" / "0005.png"
    folder = run / "samples" / "iteration_000000"
    (folder / "0001.png").unlink()
    (folder / "0001.png").symlink_to(secret)
    (folder / "deep").symlink_to(secret.parent)
    (folder / "0004.png").write_bytes(b"no picture")
    os.mkfifo(folder / "pipe.png")
    files = ["0000.png", "0001.png", str(secret), f"../../../../elsewhere/samples/iteration_000000/{secret.name}"]
    files += ["deep/0002.png", "pipe.png", "0004.png", "gone.png", "a\0b", "x" * 5000, "../iteration_000000/0002.png"]
    rows = [
        {"file": file, "prompt": f"prompt of {number}.", "scores": {"geneval": "1"}}
        for number, file in enumerate(files)
    ]
    (folder / "index.json").write_text(json.dumps(rows))
    page = Page(write_report(run, config(), {}))
    assert [number for number in range(len(files)) if f"prompt of {number}." in page.text] == [0, 10]
    assert "Left out of what the index names: 5 outside of this run and 1 that cannot be read as pictures." in page.text


@pytest.mark.parametrize("linked", ["samples", "samples/iteration_000000", "samples/iteration_000000/index.json"])
def test_a_set_of_samples_that_lies_elsewhere_is_left_out_and_said(tmp_path: Path, linked: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    write_samples(run, 0, [1.0])
    write_samples(other, 0, [1.0])
    (run / linked).rename(tmp_path / "away")
    (run / linked).symlink_to(other / linked)
    page = Page(write_report(run, config(), {}))
    assert "photo of" not in page.text and "1 outside of this run" in page.text


def test_a_report_writes_over_nothing_outside_of_its_run(tmp_path: Path) -> None:
    write_samples(tmp_path / "run", 0, [1.0])
    (tmp_path / "mine").write_text("precious")
    for name in ("report.html", "report.part", ".report.html.part"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    made = write_report(tmp_path / "run", config(), {})
    assert (tmp_path / "mine").read_text() == "precious" and not made.is_symlink()


@pytest.mark.parametrize("content", ["[" * 5000, '{"file": 1}', '[{"file": 1, "prompt": "x"}]', "[null]", "no JSON"])
def test_an_index_that_cannot_be_understood_is_refused_by_name(tmp_path: Path, content: str) -> None:
    write_samples(tmp_path / "run", 0, [1.0])
    index = tmp_path / "run" / "samples" / "iteration_000000" / "index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(index))):
        write_report(tmp_path / "run", config(), {})
