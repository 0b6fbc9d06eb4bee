"""A key-value cache for sequences of any lengths that come and go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin


@dataclass
class _Slots:
    """
    What a cache and its layers share. (A layer that held the cache itself would be in a cycle with it, and keys and values
    would stay on the GPU until Python looks for cycles, which it does by the number of objects, not by their size.)

    Attributes:
        number (`int`): slots of a layer.
        write (`Tensor` of shape `(N,)`, *optional*): where the tokens of the next pass go.
        copy (two `Tensor` of shape `(C,)`, *optional*): slots that are copied after that, before the layer attends, and where
            they go.
    """

    number: int
    write: Tensor | None = None
    copy: tuple[Tensor, Tensor] | None = None


class _LaneLayer(CacheLayerMixin):
    """Keys and values of one layer: a buffer of fixed size, written where the cache says."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, size = key_states.shape
        # Zeros, since what nobody has written is masked, and a masked NaN is still a NaN.
        self.keys = key_states.new_zeros(1, heads, self.slots.number, size)
        self.values = value_states.new_zeros(1, heads, self.slots.number, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.slots.write is not None
        self.keys.index_copy_(2, self.slots.write, key_states)
        self.values.index_copy_(2, self.slots.write, value_states)
        if self.slots.copy is not None:
            sources, targets = self.slots.copy
            for values in (self.keys, self.values):
                values.index_copy_(2, targets, values.index_select(2, sources))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.slots.number

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.2x
        return self.slots.number

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.number, 0


class LaneCache(Cache):
    """
    Keys and values of several sequences in *lanes*: lane `l` owns the slots from `l * capacity` on, and its token at
    position `p` is in slot `l * capacity + p`. A forward pass takes one row that holds tokens of any lanes and writes
    them to `slots.write`, over what is there; which slots a token then looks at, the attention plan says. What is out of
    date is overwritten or not looked at, so nothing has to be cleared.

    Args:
        num_layers (`int`): layers of the policy.
        num_lanes (`int`): sequences held at once.
        capacity (`int`): most tokens that a sequence will hold.
    """

    def __init__(self, num_layers: int, num_lanes: int, capacity: int):
        self.slots = _Slots(num_lanes * capacity)
        super().__init__(layers=[_LaneLayer(self.slots) for _ in range(num_layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def lane_cache(config: PretrainedConfig, num_lanes: int, capacity: int) -> LaneCache:
    """A cache for a policy with this config."""
    return LaneCache(config.get_text_config().num_hidden_layers, num_lanes, capacity)


__all__ = ["LaneCache", "lane_cache"]
