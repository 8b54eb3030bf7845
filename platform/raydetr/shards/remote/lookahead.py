"""What will be read of each piece, and when: the order is known, so nothing has to be guessed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

WORTH = 0.75  # share of a piece that must be read before the one it replaces
MOST_USES = 65_536  # samples of a rank that are looked ahead

Turn = Sequence[tuple[int, int]]  # what a step reads: (number of the piece, bytes)


class Lookahead:
    """The coming uses of pieces by one rank.

    Args:
        turns: what each step reads, from step 0 on; read as far as is needed.
        most_uses: that are known at a time.
    """

    def __init__(self, turns: Iterable[Turn], most_uses: int = MOST_USES) -> None:
        self._most_uses = most_uses
        self._turns: Iterator[Turn] = iter(turns)
        self._uses: dict[int, deque[tuple[int, int]]] = {}  # piece -> (step, bytes), the next one first
        self._steps: deque[tuple[int, Turn]] = deque()
        self._num_uses = 0
        self._next_step = 0
        self.step = 0  # what was before is over
        self.is_complete = False  # everything to come is known

    def extend(self, num_steps: int) -> bool:
        """Look further ahead, unless it is far enough; whether there was more."""
        for _ in range(num_steps):
            if self.is_complete or self._num_uses >= self._most_uses:
                return False
            turn = next(self._turns, None)
            if turn is None:
                self.is_complete = True
                return False
            self._steps.append((self._next_step, turn))
            for chunk, num_bytes in turn:
                self._uses.setdefault(chunk, deque()).append((self._next_step, num_bytes))
            self._num_uses += len(turn)
            self._next_step += 1
        return True

    def advance(self, step: int) -> None:
        """Forget the uses before a step."""
        self.step = max(self.step, step)
        while self._steps and self._steps[0][0] < self.step:
            for chunk, _ in self._steps.popleft()[1]:
                self._num_uses -= 1
                uses = self._uses[chunk]
                uses.popleft()
                if not uses:
                    del self._uses[chunk]

    def next_uses(self) -> dict[int, int]:
        """In how many steps each piece is used next, the nearest first."""
        return dict(
            sorted(((p, uses[0][0] - self.step) for p, uses in self._uses.items()), key=lambda u: u[1])
        )

    def bytes_before(self, chunk: int, steps: float) -> int:
        """Bytes of a piece that are read in fewer than so many steps."""
        return sum(n for step, n in self._uses.get(chunk, ()) if step - self.step < steps)


def is_worth_it(ahead: Lookahead, chunk: int, use: float, size: int, steps: float) -> bool:
    """Whether a piece of `size` bytes, used next in `use` steps, may replace one that is used in `steps`."""
    return steps > use and ahead.bytes_before(chunk, steps) >= WORTH * size


def choose_victims(
    missing: int,
    sizes: Mapping[str, int],
    next_use: Mapping[str, float],
    gain: Callable[[float], bool],
) -> list[str] | None:
    """Entries to remove for a piece: those that are used last, as long as that pays.

    Belady's rule is for pages that are fetched whole for each use. A piece is used a sample at a time, and a sample
    of an absent piece can be read by itself. So exchanging pieces pays only if much of the new one is read before
    the old one is needed again; otherwise a cache that is too small would fetch the same pieces over and over.

    Args:
        missing: bytes that must become free.
        sizes: of the entries.
        next_use: in how many steps an entry is used; none where nobody is known to use it.
        gain: whether the piece is worth it, given the steps until the first of the removed is used.
    """
    chosen, free = [], 0
    for name in sorted(sizes, key=lambda name: -next_use.get(name, math.inf)):
        if not gain(next_use.get(name, math.inf)):
            return None
        chosen.append(name)
        free += sizes[name]
        if free >= missing:
            return chosen
    return None
