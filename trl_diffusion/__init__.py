"""Reinforcement learning for diffusion language models, on TRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .policies.registration import register_families


__version__ = "0.2.0"

register_families()  # with transformers' auto classes

if TYPE_CHECKING:
    from .decoding.config import DecodingConfig
    from .decoding.decode import decode
    from .decoding.generate import Generation, generate
    from .offline.collect import collect
    from .offline.preferences import from_preferences
    from .policies.spec import DiffusionSpec, get_spec, set_spec
    from .policies.tiny import tiny_policy_path
    from .sft.config import DiffusionSFTConfig
    from .sft.trainer import DiffusionSFTTrainer
    from .trainer.config import DTRPOConfig
    from .trainer.trainer import DTRPOTrainer
    from .trajectories.dataset import load_trajectories
    from .trajectories.trajectory import TrajectoryBatch
    from .viz.terminal import TerminalStreamer

# Imported when first used, so that `import trl_diffusion` does not pull in what is not needed.
_LOCATIONS = {
    "DTRPOConfig": "trainer.config",
    "DTRPOTrainer": "trainer.trainer",
    "DecodingConfig": "decoding.config",
    "DiffusionSFTConfig": "sft.config",
    "DiffusionSFTTrainer": "sft.trainer",
    "DiffusionSpec": "policies.spec",
    "Generation": "decoding.generate",
    "TerminalStreamer": "viz.terminal",
    "TrajectoryBatch": "trajectories.trajectory",
    "collect": "offline.collect",
    "decode": "decoding.decode",
    "from_preferences": "offline.preferences",
    "generate": "decoding.generate",
    "get_spec": "policies.spec",
    "load_trajectories": "trajectories.dataset",
    "set_spec": "policies.spec",
    "tiny_policy_path": "policies.tiny",
}

__all__ = [
    "DTRPOConfig",
    "DTRPOTrainer",
    "DecodingConfig",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "DiffusionSpec",
    "Generation",
    "TerminalStreamer",
    "TrajectoryBatch",
    "collect",
    "decode",
    "from_preferences",
    "generate",
    "get_spec",
    "load_trajectories",
    "set_spec",
    "tiny_policy_path",
]


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LOCATIONS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
