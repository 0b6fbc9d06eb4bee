"""A key-value cache for sequences of any lengths that come and go."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin


class _LaneLayer(CacheLayerMixin):
    """Keys and values of one layer: a buffer of fixed size, written where the cache says."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: LaneCache):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, size = key_states.shape
        # Zeros, since what nobody has written is masked, and a masked NaN is still a NaN.
        self.keys = key_states.new_zeros(1, heads, self.owner.num_slots, size)
        self.values = value_states.new_zeros(1, heads, self.owner.num_slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.owner.write_slots is not None
        self.keys.index_copy_(2, self.owner.write_slots, key_states)
        self.values.index_copy_(2, self.owner.write_slots, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.num_slots

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.2x
        return self.owner.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.num_slots, 0


class LaneCache(Cache):
    """
    Keys and values of several sequences in *lanes*: lane `l` owns the slots from `l * capacity` on, and its token at
    position `p` is in slot `l * capacity + p`. A forward pass takes one row that holds tokens of any lanes and writes
    them to `write_slots`, over what is there; which slots a token then looks at, the attention plan says. What is out of
    date is overwritten or not looked at, so nothing has to be cleared.

    Args:
        num_layers (`int`): layers of the policy.
        num_lanes (`int`): sequences held at once.
        capacity (`int`): most tokens that a sequence will hold.
    """

    def __init__(self, num_layers: int, num_lanes: int, capacity: int):
        self.num_slots = num_lanes * capacity
        self.write_slots: Tensor | None = None
        super().__init__(layers=[_LaneLayer(self) for _ in range(num_layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def lane_cache(config: PretrainedConfig, num_lanes: int, capacity: int) -> LaneCache:
    """A cache for a policy with this config."""
    return LaneCache(config.get_text_config().num_hidden_layers, num_lanes, capacity)


__all__ = ["LaneCache", "lane_cache"]
