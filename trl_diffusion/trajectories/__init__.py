"""The record of responses: canvas, denoising steps, recorded log-probabilities."""
