"""
The comparison of autoregressive and diffusion policies on equal terms.

- `arms`: which policies there are, how each of them answers and learns;
- `settings`: what a study does, and how much of it;
- `twins`: how the policies are pretrained, with the same backbone, data and number of tokens;
- `answers`: what a policy can do, at different numbers of forward passes;
- `reinforce`: how a policy is trained by reinforcement;
- `study`: which runs a study has, and the queue that does them;
- `statistics`, `report`: what came out.
"""
