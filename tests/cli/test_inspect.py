"""`weightwire inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weightwire.cli.main import main
from weightwire.updates.delta import encode
from weightwire.updates.digest import scan


@pytest.fixture
def delta_file(tmp_path: Path) -> Path:
    base = torch.arange(4000.0).bfloat16()
    new = base.clone()
    new[10], new[20] = -new[10], new[20].nextafter(torch.tensor(99.0).bfloat16())
    path = tmp_path / "w.delta"
    path.write_bytes(encode("w", base, new).data.numpy().tobytes())
    return path


def test_it_says_what_a_delta_holds(delta_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(delta_file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["elements"], facts["changed"], facts["density"]) == ("bfloat16", 4000, 2, 0.0005)
    assert facts["of_them_by_one_unit"] == 1
    assert facts["largest_step"] > 1
    assert facts["bytes"] == delta_file.stat().st_size
    assert facts["digest_before"] == scan(torch.arange(4000.0).bfloat16()).digest.hex()
    assert main(["inspect", str(delta_file)]) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_it_says_that_a_delta_is_harmed(delta_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(delta_file.read_bytes())
    data[-20] ^= 1
    delta_file.write_bytes(data)
    assert main(["inspect", str(delta_file)]) == 1
    assert "its bytes are not those that were written" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
