"""
The comparison of autoregressive and diffusion policies on equal terms.

- `arms`: which policies there are, how each of them answers and learns;
- `settings`: how much of everything there is;
- `twins`: how the policies are pretrained, with the same backbone, data and number of tokens;
- `answers`: what a policy can do, at different numbers of forward passes;
- `reinforce`: how a policy is trained by reinforcement;
- `comparison`: which runs there are;
- `queue`: the queue that does them;
- `report`, `pictures`: what came out.
"""
