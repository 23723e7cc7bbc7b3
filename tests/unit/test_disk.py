"""Files are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_real.disk import whole_file, write_whole


def test_a_file_keeps_its_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder/file"
    write_whole(path, "old")
    with whole_file(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    # A lone surrogate is valid in Python's text and cannot be encoded as UTF-8.
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
    with whole_file(tmp_path / "file", errors="surrogatepass") as file:
        file.write("half a pair \ud800")
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "file.new"}
