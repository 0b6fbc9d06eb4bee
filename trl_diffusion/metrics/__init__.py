"""
`evaluate` metrics on the checkers of `trl_diffusion.rewards`.

They are made directly (`SudokuSolved()`, not `evaluate.load`), so nothing is fetched and no script is run. Rows are
gathered over processes by `evaluate` itself: give every process the same `experiment_id` and `cache_dir`, the number of
processes as `num_process` and its own `process_id`; `compute` returns the result on process 0 and `None` elsewhere. Each
process must have added at least one row.
"""

from .countdown import CountdownSolved
from .math import MathExactMatch
from .pass_at_k import PassAtK, pass_at_k
from .sudoku import SudokuSolved


__all__ = ["CountdownSolved", "MathExactMatch", "PassAtK", "SudokuSolved", "pass_at_k"]
