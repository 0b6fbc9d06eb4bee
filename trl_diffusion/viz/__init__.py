"""Pictures of a trajectory and of a run."""
