"""What a checkpoint is: the family's facts, and how it is run."""
