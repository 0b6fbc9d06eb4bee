"""
What runs in processes of its own: programs, not a package to import from.

Those of the sandbox of `rewards/sandbox.py` are bare interpreters (`python -I -S`) that import these files as top-level
modules, so they use the standard library alone. `math_answers.py` is apart: it imports math-verify, runs nothing that a model
wrote, and is held by limits only.
"""
