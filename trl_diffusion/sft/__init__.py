"""Supervised fine-tuning of diffusion policies."""
