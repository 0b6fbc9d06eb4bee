"""What a training run needs in memory, from the model's config alone."""
