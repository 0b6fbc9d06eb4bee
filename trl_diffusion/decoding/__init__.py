"""How a response is made: the denoising loop, and the strategies that pick what to unmask."""
