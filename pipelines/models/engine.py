"""The engine every text model runs through: ragged texts in, one row of numbers a text out.

Micro-batches are cut from the length-sorted texts under a budget of padded tokens, so what comes out depends on the
texts, the model and the budget, never on who else is at work. A budget that does not fit the memory is halved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import PinakesError
from pipelines.models.base import Tokens
from pipelines.models.tokens import first_batch, longest_first, pad

Array = npt.NDArray[Any]

Forward = Callable[[Any, Any, Any], Any]
"""(ids_BL, mask_BL, types_BL or None), int64 tensors in the CPU's memory, to out_BC, a tensor on any device."""

# Tokens: a CPU core is busy with a few thousand, a GPU waits for its next kernel below some ten thousand.
_BUDGETS = {"cpu": 4096, "cuda": 131_072}
_LADDERS = {"cpu": (2048, 4096, 8192), "cuda": (16_384, 32_768, 65_536, 131_072, 262_144)}
_WORTH = 1.01  # a larger budget has to be this much faster, because it also takes more memory
_SLOW_SECONDS = 1.0  # a micro-batch that takes this long is large enough
_RUNS = 3  # of one budget, the first of which warms up
_NO_MEMORY = "can't allocate memory"  # in torch's words for the CPU, where it raises a bare RuntimeError


def default_budget(device: str) -> int:
    """Return the tokens in a micro-batch where nobody has measured."""
    return _BUDGETS[device.partition(":")[0]]


@dataclass
class Engine:
    """Runs `forward` over any number of texts.

    width: C, the numbers a text. budget: padded tokens in a micro-batch; it falls when memory runs out. packs: 0, or
    where `forward` leaves padding out, what it rounds a micro-batch's tokens up to a multiple of. computed_tokens: what
    the last call computed, with the padding it could not leave out.
    """

    forward: Forward
    pad_id: int
    width: int
    device: str
    budget: int
    packs: int = 0
    computed_tokens: int = 0

    def run(self, tokens: Tokens) -> Array:
        """Return out_NC (N, C) fp32 for N texts, in their order.

        Raises PinakesError when a text alone does not fit the memory.
        """
        return fetch(self.start(tokens))

    def start(self, tokens: Tokens) -> Any:
        """Return what `run` returns, as a tensor on the device, which may still be at work on it.

        A GPU computes one micro-batch while the CPU prepares the next: nothing here waits for it.
        """
        import torch

        from pipelines.models.packed import move

        length_N, device = tokens.lengths, torch.device(self.device)
        rest = longest_first(length_N)
        # Its dtype is said: torch's default is another's for as long as another thread loads a model.
        out_NC = torch.zeros(len(tokens), self.width, dtype=torch.float32, device=device)
        self.computed_tokens = 0
        with torch.inference_mode():
            while len(rest):
                batch, longest = first_batch(rest, length_N, self.budget), int(length_N[rest[0]])
                try:
                    result_BC = self._forward(tokens, batch)
                except (MemoryError, RuntimeError) as error:
                    self._shrink(error, len(batch), longest)
                    continue
                out_NC[move(torch.from_numpy(batch), device)] = result_BC.float()
                self.computed_tokens += self._computed(length_N[batch])
                rest = rest[len(batch) :]
        return out_NC

    def _computed(self, length_B: Array) -> int:
        if self.packs:
            return -(-int(length_B.sum()) // self.packs) * self.packs
        return len(length_B) * int(length_B.max())

    def _forward(self, tokens: Tokens, batch: Array) -> Any:
        import torch

        padded = pad(tokens, batch, self.pad_id)
        return self.forward(*(None if array is None else torch.from_numpy(array) for array in padded))

    def _shrink(self, error: Exception, texts: int, longest: int) -> None:
        """Halve the budget after running out of memory; raise `error` again when it is anything else."""
        import torch

        if not is_out_of_memory(error):
            raise error
        if texts == 1:
            what = f"a text of {longest} tokens does not fit the memory of {self.device}, even alone"
            hint = "lower encoder.max_length, or give the workers more memory"
            raise PinakesError(what, hint=hint) from error
        self.budget = max(1, texts * longest // 2)
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def measure_budget(self, text: Tokens) -> int:
        """Find the budget that computes copies of one text fastest, set it and return it.

        The smallest near the best wins.
        """
        best, best_rate = self.budget, 0.0
        for budget, rate, seconds in self._rates(text):
            if rate > best_rate * _WORTH:
                best, best_rate = budget, rate
            elif rate < best_rate / _WORTH:
                break
            if seconds > _SLOW_SECONDS:
                break
        self.budget = best
        return best

    def _rates(self, text: Tokens) -> Iterator[tuple[int, float, float]]:
        """Yield (budget, tokens/s, seconds of a micro-batch) up the ladder, as long as the memory suffices."""
        for budget in _LADDERS[self.device.partition(":")[0]]:
            copies = text.take(np.zeros(max(1, budget // len(text.ids)), np.int64))
            self.budget = budget
            seconds: list[float] = []
            while len(seconds) < _RUNS and sum(seconds) < _SLOW_SECONDS / 2:
                started = time.perf_counter()
                self.run(copies)
                seconds.append(time.perf_counter() - started)
            if self.budget < budget:  # it ran out of memory
                return
            yield budget, len(copies.ids) / min(seconds), min(seconds)


def fetch(tensor: Any) -> Array:
    """Return a tensor as an array once it is computed; from a GPU by way of pinned memory, ten times as fast."""
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor)
    result: Array = host.numpy()
    return result


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch or Python ran out of memory, on a GPU or a CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error)
