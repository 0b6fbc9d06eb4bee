"""Verifiable rewards: checkers, and reward functions with TRL's signature built on them."""
