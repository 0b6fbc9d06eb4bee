"""An evaluation on two processes, whose last rows are filled up with others, gives the figures of one process."""

from __future__ import annotations

import pytest

from tests.closeness import ROUNDING
from tests.conftest import make_policy
from tests.offline.conftest import char_spec, tokenizer  # noqa: F401
from tests.processes import run_pair
from tests.trainer import evaluation_jobs


@pytest.fixture
def start(tmp_path, tokenizer, char_spec):  # noqa: F811
    """A random policy, some of whose answers end before the canvas does."""
    policy = make_policy(
        char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=1
    )
    policy.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.distributed
def test_rows_that_fill_up_do_not_count(start, tmp_path):
    """With 4 rows each, the second process has no row of its own in the last batch; with 3, one of three; with 1, a group is
    on both."""
    pair = run_pair(evaluation_jobs.pair_job, str(start), str(tmp_path / "two"))
    for case in evaluation_jobs.SETTINGS:
        alone = evaluation_jobs.evaluate(str(start), tmp_path / "one" / case, case, [10])
        expected = {"stream": alone["stream"]}
        assert expected["stream"]["stream_rewards/worth/mean"] == pytest.approx(1.0)
        expected |= {name: alone["dataset, 10"] for name in pair[0][case] if name.startswith("dataset")}
        assert alone["dataset, 10"]["eval_rewards/worth/mean"] == pytest.approx(2.0)
        assert 0 < alone["dataset, 10"]["eval_completions/clipped_ratio"] < 1
        for rank in range(2):
            table = pair[rank][case].pop("table", None)
            assert (table is not None) == (rank == 0 and "table" in alone)
            if table is not None:
                assert table == alone["table"] == {f"sudoku {row}": 2 for row in range(5)}
            assert pair[rank][case].keys() == expected.keys()
            for name, figures in pair[rank][case].items():
                assert figures == pytest.approx(expected[name], rel=1e-4, abs=ROUNDING), (case, name)
