"""Generates responses: the denoising loop, and the strategies that select which positions to unmask."""
