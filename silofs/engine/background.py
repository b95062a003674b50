"""Runs the store's policies (silofs/layers/rewrite.py) beside what clients want, and after it.

One bounded step at a time, on the writer's thread, between commits: a step begins only when no commit runs, waits or is
near, so an fsync waits for the rest of one step at most. A policy in a hurry, whose work piles up, takes turns with
commits instead, else a load that never pauses would starve it and the file would grow. Nothing runs while a volume is
frozen for its switch-over, while commits fail, or when the store is read-only; what a step had not committed is as if
never begun.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from silofs.engine.commits import Commits
from silofs.layers.rewrite import Policy
from silofs.layers.store import Store
from silofs.limits import BACKGROUND_RETRY_S, BACKGROUND_SHARE, BACKGROUND_WAIT_S

log = logging.getLogger(__name__)

PEEK_S = 0.05  # between looks at whether commits leave room, which is when one has landed if at all
IDLE_S = 0.25  # between rounds that find nothing to do


@dataclass
class Turn:
    """A policy and how it fares."""

    policy: Policy
    steps: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    failures: int = 0
    not_before: float = 0.0  # after a failure


class Background:
    """`run` in the engine's nursery."""

    def __init__(
        self, store: Store, commits: Commits, quiet: Callable[[], bool], policies: Sequence[Policy]
    ) -> None:
        self._store = store
        self._commits = commits
        self._quiet = quiet
        self.turns = [Turn(policy) for policy in policies]

    async def run(self) -> None:
        """Step for ever, the policies in turn."""
        while self.turns:
            worked = False
            for turn in self.turns:
                if await self._may(turn):
                    worked |= await self._step(turn)
            if not worked:
                # What commits leave to do is looked for after some of them, not after each.
                await trio.sleep(IDLE_S)
                with trio.move_on_after(BACKGROUND_WAIT_S):
                    await self._commits.landed.wait()

    async def _may(self, turn: Turn) -> bool:
        """Wait for the policy's turn; False when there is none for it in this round."""
        while True:
            if trio.current_time() < turn.not_before:
                return False
            allowed = not self._store.broken and self._commits.failed is None and self._quiet()
            if allowed and (not self._commits.busy or turn.policy.hurry()):
                return True
            if any(other is not turn and self._hurries(other) for other in self.turns):
                return False  # and it would wait as long as this one does
            with trio.move_on_after(PEEK_S):
                await self._commits.landed.wait()

    @staticmethod
    def _hurries(turn: Turn) -> bool:
        return trio.current_time() >= turn.not_before and turn.policy.hurry() > 0

    async def _step(self, turn: Turn) -> bool:
        """One step, and a pause in proportion; whether there is more to do."""
        begun = time.monotonic()
        try:
            stepped = await self._commits.step(turn.policy)
        except Exception as error:
            # A bug in here must not take the volumes with it.
            turn.failures += 1
            wait = BACKGROUND_RETRY_S * min(turn.failures, 6)
            turn.not_before = trio.current_time() + wait
            log.error("%s stopped, and tries again in %d s: %r", turn.policy.name, wait, error)
            return False
        took = time.monotonic() - begun
        turn.failures = 0
        if stepped.changed:
            turn.steps += 1
            turn.seconds += took
            turn.longest = max(turn.longest, took)
        if stepped.more and not turn.policy.hurry():
            await trio.sleep(took * (1 - BACKGROUND_SHARE) / BACKGROUND_SHARE)
        return stepped.more

    def statistics(self) -> dict[str, object]:
        """By policy: steps, time, the longest step, and the policy's own figures."""
        return {
            turn.policy.name: {
                "steps": turn.steps,
                "ms": int(turn.seconds * 1e3),
                "longest_us": int(turn.longest * 1e6),
                "failures": turn.failures,
                **turn.policy.statistics(),
            }
            for turn in self.turns
        }
