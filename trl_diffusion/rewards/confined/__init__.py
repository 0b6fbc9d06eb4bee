"""
What runs inside the sandbox of `rewards/sandbox.py`: programs, not a package to import from.

Each process is a bare interpreter (`python -I -S`) that imports these files as top-level modules, so they use the
standard library alone.
"""
