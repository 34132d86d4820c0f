"""Rows that are read over an unreliable connection: which errors are waited out, which end the rows, which the run."""

import errno

import pytest
from datasets import IterableDataset

from hf_fae.data.reading import read_rows


class TestRows:
    def read(self, monkeypatch, *errors):
        """Six rows; before the fourth one these errors, one in each attempt. Also: the seconds waited, what broke."""
        errors, waited, broken, rows = list(errors), [], [], []
        monkeypatch.setattr("hf_fae.data.reading.time.sleep", waited.append)

        def generate():
            for number in range(6):
                if number == 3 and errors:
                    raise errors.pop(0)
                yield {"value": 10 * number}

        for row in read_rows(IterableDataset.from_generator(generate), broken.append):
            rows.append(row)
        return rows, waited, broken

    @pytest.mark.parametrize(
        "error", [ConnectionResetError("reset"), TimeoutError(), OSError(errno.EIO, "Input/output error")]
    )
    def test_what_passes_is_waited_out(self, monkeypatch, error):
        rows, waited, broken = self.read(monkeypatch, error, error)
        assert rows == [(number, {"value": 10 * number}) for number in range(6)]
        assert waited == [1, 5] and not broken

    def test_what_stays_ends_the_run(self, monkeypatch):
        with pytest.raises(ConnectionResetError):
            self.read(monkeypatch, *[ConnectionResetError("reset")] * 4)

    @pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("denied"), KeyError("a bug")])
    def test_other_errors_end_the_run_at_once(self, monkeypatch, error):
        with pytest.raises(type(error)):
            self.read(monkeypatch, error)

    @pytest.mark.parametrize("error", [EOFError(), ValueError("no parquet"), OSError("Unexpected end of stream")])
    def test_broken_content_ends_the_rows(self, monkeypatch, error):
        rows, waited, broken = self.read(monkeypatch, error)
        assert len(rows) == 3 and not waited and broken == [3]
