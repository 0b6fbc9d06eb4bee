"""Log-probabilities of responses: draws of steps and their weights, packed layouts, scored tokens."""
