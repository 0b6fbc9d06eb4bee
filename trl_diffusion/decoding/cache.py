"""A key-value cache for finished blocks."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class _BlockLayer(CacheLayerMixin):
    """Keys and values of one layer in a buffer of fixed size; what is not committed is overwritten by the next call."""

    def __init__(self, owner: BlockCache):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.owner.capacity, size)
        self.values = value_states.new_empty(rows, heads, self.owner.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.owner.length
        end = start + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return self.owner.capacity

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.2x
        return self.owner.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.length + query_length, 0


class BlockCache(Cache):
    """
    Keys and values of the finished blocks of a batch, in preallocated buffers.

    A forward pass writes behind what is committed and sees all of it; [`BlockCache.commit`] then keeps the first tokens
    of what was written. A noisy block is written and never committed, so the next pass overwrites it.

    Args:
        num_layers (`int`): layers of the policy.
        capacity (`int`): most tokens a row will hold, the noisy block included.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity = capacity
        self.length = 0
        super().__init__(layers=[_BlockLayer(self) for _ in range(num_layers)])

    def commit(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens that the last forward pass wrote."""
        self.length += num_tokens

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def block_cache(config, capacity: int) -> BlockCache:
    """A cache for a policy with this config."""
    return BlockCache(config.get_text_config().num_hidden_layers, capacity)


__all__ = ["BlockCache", "block_cache"]
