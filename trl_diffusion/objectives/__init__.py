"""What to minimise: pure functions of log-ratios. Group losses are TRL's own."""
