"""`DTRPOConfig` and `DTRPOTrainer`. Only this folder depends on TRL's trainer."""

from ..quiet import hush


hush()  # before TRL is imported
