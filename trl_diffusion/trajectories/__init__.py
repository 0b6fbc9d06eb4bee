"""What happened: canvas, unmasking steps, recorded log-probabilities."""
