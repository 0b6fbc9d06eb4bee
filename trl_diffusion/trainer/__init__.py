"""DTRPOConfig and DTRPOTrainer. The only folder that knows TRL."""
