"""`DTRPOConfig` and `DTRPOTrainer`. Only this folder depends on TRL's trainer."""
