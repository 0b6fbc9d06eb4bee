"""Every import from TRL that its documentation does not promise. When TRL moves something, this is where it breaks."""

from __future__ import annotations

from trl.models import unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model, use_adapter


__all__ = ["disable_dropout_in_model", "unwrap_model_for_generation", "use_adapter"]
