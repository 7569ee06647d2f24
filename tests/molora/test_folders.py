from __future__ import annotations

import pytest

from molora.errors import UserError
from molora.folders import short_names


def test_names_tell_folders_apart() -> None:
    assert list(short_names(["out/q/stage1/final", "out/q/stage2/final"])) == ["stage1", "stage2"]
    assert list(short_names(["a/stage1/final", "b/stage1/final"])) == ["a/stage1", "b/stage1"]
    assert list(short_names(["final"])) == ["final"]
    with pytest.raises(UserError, match="x: given twice"):
        short_names(["x", "y", "x"])
    with pytest.raises(UserError, match="x: given twice"):
        short_names(["x", "x/"])
