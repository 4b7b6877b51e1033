"""What ``pbe doctor`` reports of an installation."""

from __future__ import annotations

import sys

import pytest

from pbe.cli import doctor
from pbe.cli.main import main


def test_it_reports_versions_devices_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "matplotlib" else version(name))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "  torch " in said
    assert "CPU: " in said
    assert "memory: " in said
    assert f"extra 'demo': {sys.executable} -m pip install \"matplotlib>=" in said
    assert "extra 'ray': complete" in said
    assert "toy_world.zip: /" in said


def test_a_package_that_everything_needs_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "einops" else version(name))
    assert main(["doctor"]) == 1
    assert "needed by everything: " in capsys.readouterr().out
