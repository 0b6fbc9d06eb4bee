"""How likely it was: step draws and weights, packed layouts, log-probabilities at scored positions."""
