"""Generate once, train many times: collecting trajectories, and making them from preference data."""
