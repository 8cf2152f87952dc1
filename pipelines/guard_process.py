"""An encoder in a process of its own, which may die without taking anybody along: `guard` sends suspect parts there.

The parent keeps one end of a pipe, the child the other. The child loads the encoder and the part once, then answers
row ranges until the pipe closes; when it dies, the next range starts another. It holds nothing but the encoder.

A child that hangs is as good as dead, and killed: a range may take many times what its tokens took in a trial at the
start, and a minute more.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy.typing as npt

from pipelines.encode import USUAL_TEXT, Encoder, EncoderSpec, ImageEncoder
from pipelines.errors import PinakesError
from pipelines.guard import (
    DeviceLostError,
    Guilty,
    RaisedThereError,
    RangeEncoder,
    UnusableError,
    WorkerDiedError,
    attempt,
    trace,
)
from pipelines.models.base import Tokens
from pipelines.storage import Store

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Content = Tokens | list[bytes]
"""A part as its encoder takes it: tokenised texts, or image files."""

_STARTS = 2  # the first may be a victim of somebody else
_START_SECONDS = 1800.0  # to load the largest model from the slowest disk
_PATIENCE = 20  # how many times slower than the trial a range may be: other work may have come to the machine
_LEAST_SECONDS = 60.0
_IMAGE_SECONDS = 30.0  # for each, however large; there is no trial
_TRIAL = 8  # texts alike, of about a passage's length
_CODE = "import sys; from pipelines.guard_process import serve; serve(int(sys.argv[1]))"


def encode_guarded(
    store: Store, name: str, encoder: Encoder | ImageEncoder, content: Content, device: str, allowed: int
) -> tuple[Array, list[Guilty]]:
    """Return emb_ND (N, D) float32 of the part `name`, and its guilty rows, with this attempt noted in `store`.

    Raises what `guard.trace` raises, and DeviceLostError: then this process has to end, for another to go on.
    """
    with attempt(store, name) as suspect, range_encoder(encoder, content, device, suspect=suspect) as encode:
        return trace(encode, len(content), encoder.spec.dim, encoder.spec.storage, allowed)


@contextmanager
def range_encoder(
    encoder: Encoder | ImageEncoder, content: Content, device: str, *, suspect: bool
) -> Iterator[RangeEncoder]:
    """Give the function that encodes rows `start:stop` of `content`: here, or when suspect in a process of its own."""
    if not suspect:
        yield lambda start, stop: encode_range(encoder, content, start, stop)
        return
    child = ChildEncoder(encoder, content, device)
    try:
        yield child
    finally:
        child.close()


def encode_range(encoder: Any, content: Content, start: int, stop: int) -> Array:
    """Return emb_ND (stop - start, D) float32 of these rows. Raises DeviceLostError after which no call can succeed."""
    try:
        result: Array = (
            encoder.encode_tokens(content.rows(start, stop))
            if isinstance(content, Tokens)
            else encoder.encode_images(content[start:stop])
        )
    except RuntimeError as error:
        if device_lost(error):
            raise DeviceLostError(str(error)) from error
        raise
    return result


def device_lost(error: Exception) -> bool:
    """Tell whether an error leaves a CUDA context that answers every later call with the same error."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


class ChildEncoder:
    """A range encoder whose work is done by a child process; `encoder` says with what settings."""

    def __init__(
        self,
        encoder: Encoder | ImageEncoder,
        content: Content,
        device: str,
        least_seconds: float = _LEAST_SECONDS,
    ) -> None:
        """least_seconds: that every range may take, however few rows it has."""
        import torch

        spec = encoder.spec
        if isinstance(encoder, Encoder):  # the same budget cuts the same micro-batches: the same vectors
            spec = replace(spec, token_budget=encoder.engine.budget)
        self._work = (spec, device, torch.get_num_threads(), content)
        self._least_seconds, self._token_seconds = least_seconds, 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, start: int, stop: int) -> Array:
        """Return emb_ND (stop - start, D) float32 of these rows.

        Raises WorkerDiedError when the child died of them or hung, UnusableError when no child gets so far as to try,
        PinakesError and RaisedThereError for what the encoder raised.
        """
        if self._pipe is None:
            self._start()
        kind, answer = self._ask((start, stop), self._allowed_seconds(start, stop))
        if kind == "emb":
            return answer
        if kind == "lost":
            self.close()
            raise WorkerDiedError(f"process lost its device ({answer})")
        raise answer

    def close(self) -> None:
        """End the child, which leaves when its pipe closes."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None

    def _allowed_seconds(self, start: int, stop: int) -> float:
        content = self._work[-1]
        if not isinstance(content, Tokens):
            return self._least_seconds + _IMAGE_SECONDS * (stop - start)
        num_tokens = int(content.offsets[stop] - content.offsets[start])
        return self._least_seconds + _PATIENCE * self._token_seconds * num_tokens

    def _start(self) -> None:
        """Start a child and wait until it has loaded its encoder."""
        for left in reversed(range(_STARTS)):
            ours, theirs = Pipe()
            command = [sys.executable, "-X", "faulthandler", "-c", _CODE, str(theirs.fileno())]
            # Output goes to stderr: stdout belongs to results.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env=_environment()
            )
            theirs.close()
            self._pipe = ours
            try:
                kind, answer = self._ask(self._work, _START_SECONDS)
            except WorkerDiedError as error:
                if left:
                    continue
                raise _unusable(f"its {error}") from error
            if kind == "ready":
                self._token_seconds = answer
                return
            self.close()
            raise UnusableError(answer) if isinstance(answer, PinakesError) else _unusable(str(answer))

    def _ask(self, question: Any, seconds: float) -> tuple[str, Any]:
        """Send and receive once. Raises WorkerDiedError when the child is gone, or has not answered in time."""
        assert self._pipe is not None
        assert self._process is not None
        overdue = threading.Event()

        def end(process: subprocess.Popen[bytes]) -> None:
            overdue.set()
            process.kill()

        timer = threading.Timer(seconds, end, [self._process])  # ends a send that blocks, too
        timer.daemon = True
        timer.start()
        try:
            self._pipe.send(question)
            kind, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            self.close()
            if overdue.is_set():
                _log.warning("an encoder's process gave no answer in %.0f s and was killed", seconds)
                raise WorkerDiedError("process hung (and was killed)") from error
            raise WorkerDiedError(f"process died ({_ending(code)})") from error
        finally:
            timer.cancel()
        return kind, answer


def serve(descriptor: int) -> None:
    """Load an encoder and answer row ranges until the pipe closes: the child's whole life."""
    pipe = Connection(descriptor)
    with suppress(EOFError, OSError):
        spec, device, num_threads, content = pipe.recv()
        try:
            encoder = _load(spec, content, device, num_threads)
            seconds = _token_seconds(encoder)
        except Exception as error:
            pipe.send(("failed", _portable(error)))
            return
        pipe.send(("ready", seconds))
        while True:
            start, stop = pipe.recv()
            try:
                answer: tuple[str, Any] = ("emb", encode_range(encoder, content, start, stop))
            except DeviceLostError as error:
                answer = ("lost", str(error))
            except Exception as error:
                answer = ("failed", _portable(error))
            pipe.send(answer)


def _load(spec: EncoderSpec, content: Content, device: str, num_threads: int) -> Encoder | ImageEncoder:
    if isinstance(content, Tokens):
        return Encoder(spec, "passage", device, num_threads)
    return ImageEncoder(spec, device, num_threads)


def _token_seconds(encoder: Encoder | ImageEncoder) -> float:
    """Return what a token of a passage takes, by a trial; 0 for images."""
    if not isinstance(encoder, Encoder):
        return 0.0
    tokens = encoder.tokeniser.passages([""] * _TRIAL, [USUAL_TEXT] * _TRIAL)
    encoder.encode_tokens(tokens)  # the first call also sets things up
    began = time.perf_counter()
    encoder.encode_tokens(tokens)
    return (time.perf_counter() - began) / int(tokens.offsets[-1])


def _portable(error: Exception) -> Exception:
    """Return an error that crosses a pipe: ours as they are, others by their name and message."""
    return error if isinstance(error, PinakesError) else RaisedThereError(f"{type(error).__name__}: {error}")


def _unusable(why: str) -> UnusableError:
    hint = "look at the worker's log; is there memory for the model twice?"
    return UnusableError(PinakesError(f"the encoder cannot be loaded in a process of its own: {why}", hint=hint))


def _environment() -> dict[str, str]:
    """Return the environment of a child that finds the modules that this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"signal {-code}"
