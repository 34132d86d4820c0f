import json

import numpy as np
import pytest

from hf_fae.data.corrupt import CorruptionReport, CorruptRow, first_good


def candidates(count):
    return ((row, {"value": row}, np.random.default_rng(row)) for row in range(count))


def make_example(row, random):
    if row["value"] < 3:
        raise CorruptRow("empty" if row["value"] else "truncated", "bad")
    return {"value": row["value"], "drawn": random.random()}


def test_first_good():
    example = first_good(make_example, candidates(9))
    assert example["value"] == example["row_ids"] == 3
    assert example["drawn"] == np.random.default_rng(3).random()
    assert example["corrupt"] == [(0, "truncated"), (1, "empty"), (2, "empty")]


def test_giving_up():
    with pytest.raises(ValueError, match=r"3 rows, .* all corrupt: 2 empty \(rows 1, 2\); 1 truncated \(rows 0\)"):
        first_good(make_example, candidates(3))


class TestReport:
    def report(self):
        report = CorruptionReport()
        report.add([(7, "truncated"), (3, "truncated"), (5, "empty")])
        report.add([(7, "truncated")])
        return report

    def test_rows_count_once(self):
        assert CorruptionReport().counts() == {}
        assert self.report().counts() == {"empty": 1, "truncated": 2}

    def test_state(self):
        state = json.loads(json.dumps(self.report().state()))
        assert state == {"empty": [5], "truncated": [3, 7]}
        report = CorruptionReport()
        report.load(state)
        report.add([(3, "truncated"), (4, "empty")])
        assert report.counts() == {"empty": 2, "truncated": 2}

    def test_check(self):
        report = self.report()
        report.check(99, 0.0)  # too early to tell
        report.check(100, 0.03)
        with pytest.raises(
            ValueError, match=r"3 of the 100 rows .*max_corrupt_share=0.02: 1 empty \(rows 5\); 2 trunc"
        ):
            report.check(100, 0.02)

    def test_repetitions_do_not_count(self):
        report = CorruptionReport()
        report.add([(row, "truncated") for row in range(15)])
        report.check(400, 0.1)  # of 400 rows, for all that is known
        report.check(19, 0.1, 20)  # too early to tell
        for seen in (20, 400):
            with pytest.raises(ValueError, match="15 of the 20 rows read are corrupt"):
                report.check(seen, 0.1, 20)
        report.check(10_000, 0.1, 200)
        with pytest.raises(ValueError, match="15 of the 100 rows"):
            report.check(100, 0.1, 200)

    def test_long_lists_are_cut(self):
        report = CorruptionReport()
        report.add([(row, "empty") for row in range(6)])
        assert str(report) == "6 empty (rows 0, 1, 2, 3, 4, ...)"
