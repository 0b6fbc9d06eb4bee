"""A denoising loop that takes prompts while it runs, for a server."""

from __future__ import annotations

from torch import Generator, nn, tensor

from ..policies.spec import DiffusionSpec
from ..trajectories.revisions import NEVER
from ..trajectories.trajectory import TrajectoryBatch
from .config import DecodingConfig
from .loop import DenoisingLoop, Lane


class LiveLoop(DenoisingLoop):
    """
    A [`DenoisingLoop`] whose prompts come one by one. Each lane has a row of its own, which the next response of the lane uses
    again. A response equals that of [`decode`] with the same prompt, settings and seed. Call it under `torch.no_grad()` and
    [`plans_enabled`].

    Args:
        model (`nn.Module`): the policy.
        config ([`DecodingConfig`]): settings of all responses. `max_new_tokens` is the most that a response may ask for.
        spec ([`DiffusionSpec`]): facts about the policy.
        num_lanes (`int`): most responses that are denoised at once.
        longest_prompt (`int`): most tokens of a prompt.
    """

    def __init__(
        self, model: nn.Module, config: DecodingConfig, spec: DiffusionSpec, num_lanes: int, longest_prompt: int
    ):
        reserved = [spec.mask_token_id] * longest_prompt  # so that each row has room for the longest response
        super().__init__(model, [reserved] * num_lanes, config, spec, seeds=[0] * num_lanes)
        self.queue = iter(())

    @property
    def active(self) -> int:
        """Number of responses that are being denoised."""
        return len(self.active_lanes())

    def admit(self, prompt: list[int], new_tokens: int, seed: int) -> int:
        """
        Begins a response in a free lane.

        Args:
            prompt (`list[int]`): token ids, at most `longest_prompt`.
            new_tokens (`int`): most tokens of the response, at most `config.max_new_tokens`.
            seed (`int`): source of its randomness.

        Returns:
            `int`: its row.
        """
        row, length, spec = self.lanes.index(None), len(prompt), self.spec
        self.prompts[row], self.lengths[row], self.new_tokens[row] = prompt, length, new_tokens
        self.tails[row], self.heads[row] = spec.prompt_tail(length), spec.head(length)
        self.num_blocks[row] = spec.num_blocks(length, new_tokens)
        self.canvas_ends[row] = spec.canvas_end(length, new_tokens)
        self.writing_ends[row] = spec.writing_end(length, new_tokens)
        self.ids[row] = spec.mask_token_id
        self.ids[row, :length] = tensor(prompt, device=self.device)
        self.logps[row] = 0.0
        self.masked[row] = False
        self.masked[row, length : self.writing_ends[row]] = True
        self.steps[row], self.stopped_at[row], self.reached[row] = NEVER, self.NOWHERE, 0
        if self.history is not None:
            self.history.forget(row)
        if self.generators is not None:
            self.generators[row] = Generator().manual_seed(seed)
        self.lanes[row] = self._begin_block(Lane(row))
        return row

    def step(self) -> list[int]:
        """One denoising step of every response. Returns the rows of those that have ended."""
        rows = [lane.row for lane in self.active_lanes()]
        self._step()
        return [row for row in rows if self.lanes[row] is None]

    def trajectory(self, row: int) -> TrajectoryBatch:
        """The response of a row, until the row is used again: a batch of one, on the CPU."""
        return self._trajectories().select(slice(row, row + 1)).to("cpu")

    def settled(self, row: int) -> list[int]:
        """The tokens of the finished blocks of a response that is being denoised. No later step can change them."""
        lane = self.lanes[row]
        if lane is None or (self.revising is not None and self.spec.attention == "full"):
            return []
        return self.ids[row, self.lengths[row] : self.spec.block_start(lane.block, self.lengths[row])].tolist()

    def drop(self, row: int) -> None:
        """Ends a response before its end."""
        self.lanes[row] = None
