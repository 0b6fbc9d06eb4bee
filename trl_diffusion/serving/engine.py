"""The one thread that computes: it takes responses that are asked for from a queue, and denoises them together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..decoding.config import DecodingConfig
from ..decoding.live import LiveLoop
from ..policies.attention import plans_enabled
from ..policies.forward import NonFiniteLogits, unwrap
from ..policies.policy import Policy
from .errors import ApiError


logger = logging.getLogger(__name__)

MOST_LOOPS = 4  # different settings that are denoised at once; each has a cache of its own


def _ending() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down")


@dataclass(eq=False)
class Job:
    """
    A response that was asked for.

    Attributes:
        prompt (`list[int]`): token ids.
        config ([`DecodingConfig`]): settings. Its `max_new_tokens` is the limit of the server.
        new_tokens (`int`): most tokens of this response.
        seed (`int`): source of randomness.
        listen (`Callable`): called in the thread of the engine with the result, a [`TrajectoryBatch`] of one response, or with
            an [`ApiError`]. With `watch`, it is called before that, too.
        watch (`str`, *optional*): `"blocks"`: `listen` is called with the list of all tokens that no later step can change,
            after each block. `"steps"`: it is also called with a dictionary of what each step changed.
        is_cancelled (`bool`): whether nobody waits for it any more.
    """

    prompt: list[int]
    config: DecodingConfig
    new_tokens: int
    seed: int
    listen: Callable[[Any], None]
    watch: Literal["blocks", "steps"] | None = None
    is_cancelled: bool = False
    blocks: int = 0  # finished blocks
    steps: int = 0
    reported: int = 0  # steps that were reported
    shown: list[tuple[int, bool]] = field(default_factory=list)  # the canvas after the last step

    def restart(self) -> None:
        """The response begins again. It will be the same."""
        self.blocks, self.steps, self.shown = 0, 0, []


@dataclass
class _Desk:
    """A loop for settings, and the job of each of its rows."""

    loop: LiveLoop
    jobs: dict[int, Job] = field(default_factory=dict)


class Engine:
    """
    Denoises responses in a thread of its own. A response that is asked for joins those that are being denoised at their next
    step, and does not depend on them. Nothing else may use the model meanwhile.

    Args:
        policy ([`Policy`]): the policy.
        longest_prompt (`int`): most tokens of a prompt.
        max_batch (`int`): most responses that are denoised at once.
        max_queue (`int`): most responses that wait.
    """

    def __init__(self, policy: Policy, longest_prompt: int, max_batch: int, max_queue: int):
        self.policy, self.longest_prompt = policy, longest_prompt
        self.max_batch, self.max_queue = max_batch, max_queue
        self._waiting: deque[Job] = deque()
        self._desks: dict[DecodingConfig, _Desk] = {}
        self._news = threading.Condition()
        self._is_draining = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)

    # ------------------------------------------------------------------------------------------------- other threads

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queues responses, all of them or none. Raises an [`ApiError`] if there is no room."""
        with self._news:
            if self._is_draining:
                raise _ending()
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} responses are waiting, and there is room for {self.max_queue}. Ask again later.",
                    code="queue_full",
                )
            self._waiting += jobs
            self._news.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Says that nobody waits for these responses any more. They leave the queue, or the loop at its next step."""
        with self._news:
            for job in jobs:
                job.is_cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)

    def drain(self) -> None:
        """Accepts nothing any more, and refuses what waits. What is being denoised goes on."""
        with self._news:
            self._is_draining = True
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.listen(_ending())

    def close(self) -> None:
        """Ends the thread, after its current step."""
        self.drain()
        with self._news:
            self._is_closed = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def load(self) -> dict[str, int]:
        """How many responses are being denoised and how many wait."""
        return {"decoding": sum(len(desk.jobs) for desk in list(self._desks.values())), "waiting": len(self._waiting)}

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # ---------------------------------------------------------------------------------------------------- its thread

    @torch.no_grad()
    def _run(self) -> None:
        try:
            with plans_enabled(unwrap(self.policy.model)):
                while self._go_on():
                    self._drop_cancelled()
                    self._admit()
                    for config, desk in list(self._desks.items()):
                        if desk.jobs:
                            self._advance(config, desk)
        finally:
            self.drain()
            for desk in self._desks.values():
                for job in desk.jobs.values():
                    job.listen(_ending())

    def _go_on(self) -> bool:
        """Waits until there is something to do. False at the end."""
        with self._news:
            self._news.wait_for(lambda: self._is_closed or self._waiting or self._desks)
            return not self._is_closed

    def _drop_cancelled(self) -> None:
        for config, desk in list(self._desks.items()):
            for row, job in list(desk.jobs.items()):
                if job.is_cancelled:
                    del desk.jobs[row]
                    desk.loop.drop(row)
            if not desk.jobs:
                del self._desks[config]

    def _admit(self) -> None:
        """Takes responses from the queue, in order, as long as there is room."""
        while sum(len(desk.jobs) for desk in self._desks.values()) < self.max_batch:
            with self._news:
                if not self._waiting:
                    return
                job = self._waiting[0]
                if job.config not in self._desks and len(self._desks) == MOST_LOOPS:
                    return
                self._waiting.popleft()
            try:
                desk = self._desks.setdefault(job.config, _Desk(self._loop(job.config)))
                desk.jobs[desk.loop.admit(job.prompt, job.new_tokens, job.seed)] = job
            except Exception as error:
                logger.exception("A response could not begin.")
                job.listen(_unexpected(error))

    def _loop(self, config: DecodingConfig) -> LiveLoop:
        """The loop for settings, a new one if there is none."""
        if config in self._desks:
            return self._desks[config].loop
        spec = self.policy.spec
        if config.stop_token_ids is not None:
            spec = spec.replace(stop_token_ids=config.stop_token_ids)
        return LiveLoop(self.policy.model, config, spec, self.max_batch, self.longest_prompt)

    def _advance(self, config: DecodingConfig, desk: _Desk) -> None:
        """One step of a loop."""
        try:
            ended = desk.loop.step()
            for row, job in desk.jobs.items():
                _report(desk.loop, row, job)
            for row in ended:
                desk.jobs.pop(row).listen(desk.loop.trajectory(row))
        except NonFiniteLogits as error:
            del self._desks[config]
            others = [job for row, job in desk.jobs.items() if row != error.row]
            for job in others:
                job.restart()
            with self._news:
                self._waiting.extendleft(reversed(others))
            desk.jobs[error.row].listen(ApiError(500, error.reason, code="non_finite_logits"))
        except Exception as error:
            logger.exception("Decoding failed.")
            del self._desks[config]
            for job in desk.jobs.values():
                job.listen(_unexpected(error))


def _unexpected(error: Exception) -> ApiError:
    return ApiError(500, f"Decoding failed ({type(error).__name__}: {error!s:.200}).", code="decoding_failed")


def _report(loop: LiveLoop, row: int, job: Job) -> None:
    """Tells a listener what a step changed, if it wants to know."""
    if job.watch == "steps":
        canvas, job.steps = loop.canvas(row), job.steps + 1
        before = [*job.shown, *[(0, True)] * (len(canvas) - len(job.shown))]
        differs = [now != then for now, then in zip(canvas, before, strict=True)]
        written = [place for place, (_, masked) in enumerate(canvas) if differs[place] and not masked]
        erased = [place for place, (_, masked) in enumerate(canvas) if masked and not before[place][1]]
        tokens = [canvas[place][0] for place in written]
        job.shown = canvas
        if job.steps > job.reported:
            job.reported = job.steps
            job.listen({"step": job.steps - 1, "positions": written, "token_ids": tokens, "erased": erased})
    lane = loop.lanes[row]
    if job.watch is not None and lane is not None and lane.block > job.blocks:
        job.blocks = lane.block
        job.listen(loop.settled(row))
