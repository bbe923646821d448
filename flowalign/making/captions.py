"""Asks a vision-language model behind an endpoint for a caption of each image, and keeps each as it comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config.section import ConfigError
from flowalign.data.images import ImageRow, ImagesError, ImageSource
from flowalign.making.keptcaptions import IMAGE, PROMPT, KeptCaptions
from flowalign.record.holder import DEAD_AFTER_S, RunDirectoryError
from flowalign.record.lock import LockLost, RunHeld, RunLock
from rewards.errors import InputError, ScorerError
from rewards.http.chat import KEY_REFUSED, Chat
from rewards.http.transport import ServerRefused, ServerUnavailable
from rewards.pictures import PictureError, read

INSTRUCTION = (
    "Describe this image in one or two sentences, as a prompt from which somebody could draw it: what is there and how "
    "many, which colours, what is where, and the style. Write the description alone, without 'the image shows'."
)
IN_A_ROW = 16  # images without an answer, behind which the next ones would have none either
Progress = Callable[[int, int], None]


class CaptionsError(RuntimeError):
    """Images cannot be captioned: why, and what to do. ``begun`` says that captions are there, which are kept."""

    def __init__(self, reason: str, begun: bool) -> None:
        super().__init__(f"{reason}; the same command goes on where it was" if begun else reason)
        self.begun = begun


class CaptionsHeld(ConfigError):
    """Another process writes captions into the same directory: who, and what to do. Nothing was written."""


@dataclass(frozen=True)
class Options:
    """The options of captioning; ``url`` to ``temperature`` are those of the reward ``vlm_judge``.

    ``captions`` are columns of the source that are kept beside the new caption, by kind. ``max_side`` is in pixels: a
    larger image is made smaller before it is sent.
    """

    source: str
    to: Path
    url: str
    model: str
    token_env: str | None = None
    concurrency: int = 8
    deadline_s: float = 120.0
    retries: int = 5
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    instruction: str = INSTRUCTION
    max_side: int = 1024
    captions: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    split: str = "train"
    hub: bool = False
    limit: int | None = None

    def opened(self) -> ImageSource:
        """Open the source. Raise ImagesError where it cannot be read."""
        own = {name: getattr(self, name) for name in ("image", "split", "hub", "limit")}
        return ImageSource(self.source, self.captions, captioned=False, **own)

    def chat(self) -> Chat:
        """Return the model to ask. Raise SpecError where an option cannot be."""
        names = ("max_tokens", "temperature", "seed", "concurrency", "deadline_s", "retries", "token_env")
        return Chat("endpoint", self.url, self.model, repairs=0, **{name: getattr(self, name) for name in names})

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what a caption is, as plain data. A source is told by where it lies from the captions."""
        named = ("model", "instruction", "temperature", "seed", "max_side", "image", "split")
        place = self.source if self.hub else os.path.relpath(Path(self.source).resolve(), self.to.resolve())
        own = {name: getattr(self, name) for name in named}
        return {"source": place, **own, "kept": dict(self.captions)}


def caption(options: Options, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Caption the images that have no caption yet; returns the card. ``progress`` is told how many are done, of all.

    An image that cannot be read, or that gets no answer, is left out and named; the next call tries it again.

    Raises:
        ImagesError: the source cannot be read, or holds no image. ConfigError: the directory was begun with other
            options, or a kind of caption has a name that is taken; CaptionsHeld, where another process is at work in
            it. ScorerError: nothing answers at the endpoint, or it refuses the key. CaptionsError: most images are left
            out, the endpoint gives no answers any more, or another process took the directory over. DiskError.
    """
    if taken := next((kind for kind in options.captions if kind in (IMAGE, PROMPT)), None):
        raise ConfigError("--caption", f"{taken} is what a row has already; call the kind something else")
    source, chat = options.opened(), options.chat()
    with _held(options.to) as lock:
        return _caption_all(chat, options, source, KeptCaptions(lock, options.identity), progress)


@contextmanager
def _held(to: Path) -> Iterator[RunLock]:
    """Keep other processes out of ``to``, as runs do of their directory. Raise CaptionsHeld where one is at work."""
    try:
        lock = RunLock.take(to)
    except RunHeld as error:
        found, minutes = error.holder, DEAD_AFTER_S / 60
        silent = (
            f"once it has been silent for {minutes:g} minutes, which it may be on another machine, it is taken over"
        )
        said = "wait until it has ended" if error.lives else silent
        raise CaptionsHeld("--to", f"{to} is held by {found}: {said}, or name another directory") from error
    except RunDirectoryError as error:
        raise ConfigError("--to", str(error).removeprefix("runs_dir: ")) from error
    try:
        with lock:
            yield lock
    except LockLost as error:
        raise CaptionsError(str(error), begun=True) from error


def _caption_all(
    chat: Chat, options: Options, source: ImageSource, kept: KeptCaptions, progress: Progress
) -> dict[str, Any]:
    lacking = kept.lacking(source)
    if (first := next(lacking, None)) is not None:
        chat.check()

        def told() -> None:
            if (total := source.total) is not None:
                progress(kept.settled, total)

        _ask(chat, options, chain([first], lacking), kept, told)
    if not kept.settled:
        raise ImagesError(f"{options.source} holds no image")
    card, count = kept.finish(), len(kept.left_out)
    if count > len(kept.rows):
        name, reason = next(iter(kept.left_out.items()))
        said = f"{count} of {count + len(kept.rows)} images have no caption ({name} {reason})"
        raise CaptionsError(said, bool(kept.rows))
    return card


def _ask(chat: Chat, options: Options, rows: Iterator[ImageRow], kept: KeptCaptions, told: Callable[[], None]) -> None:
    """Ask about images, some at once; what was answered is kept whatever happens to the others."""
    pool, waiting, silent = ThreadPoolExecutor(chat.concurrency), dict[Future[str], ImageRow](), 0

    def settle(done: set[Future[str]]) -> None:
        nonlocal silent
        for future in done:
            row, error = waiting.pop(future), future.exception()
            if error is None:
                kept.add(row, future.result())
                silent = 0
            elif isinstance(error, PictureError):
                kept.leave_out(row, str(error))
            elif isinstance(error, ScorerError):
                silent += 1
                kept.leave_out(row, f"got no caption: {error}")
                if _hopeless(error) or silent == IN_A_ROW:
                    raise CaptionsError(str(error), bool(kept.rows)) from error
            else:
                raise error
        told()

    def answer(row: ImageRow) -> str:
        return _caption(chat, options, row.content)

    try:
        for row in rows:
            waiting[pool.submit(answer, row)] = row
            if len(waiting) > 2 * chat.concurrency:
                settle(wait(waiting, return_when=FIRST_COMPLETED).done)
        while waiting:
            settle(wait(waiting, return_when=FIRST_COMPLETED).done)
    finally:
        pool.shutdown(cancel_futures=True)
        for future, row in waiting.items():
            if not future.cancelled() and future.exception() is None:
                kept.add(row, future.result())


def _hopeless(error: ScorerError) -> bool:
    """Tell whether the next image would fare no better: nobody answers, or not to this key or of this model."""
    refused = isinstance(error, ServerRefused) and error.status in (*KEY_REFUSED, 404)
    return refused or isinstance(error, ServerUnavailable)


def _caption(chat: Chat, options: Options, content: bytes) -> str:
    """Return the caption of one image file, in one line. Raise PictureError or another ScorerError."""
    text = chat.describe(_within(read(content), options.max_side), options.instruction)
    text = text.rpartition("</think>")[2].replace("\0", " ").encode("utf-8", "ignore").decode()
    line = " ".join(text.split())
    if line[:1] == line[-1:] == '"' and line.count('"') == 2:
        line = line[1:-1].strip()
    if not line:
        raise InputError("the model's answer is empty")
    return line


def _within(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image (H, W, 3) whose longer side is at most ``side`` pixels."""
    if max(pixels.shape[:2]) <= side:
        return pixels
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)
