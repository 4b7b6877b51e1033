"""The demo: its settings here, its stages, and its page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pbe.resources import packaged


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Options of ``pbe demo``."""

    out: Path = field(default=Path("outputs/demo"), metadata={"group": "What is used"})
    """folder for the page and everything else"""
    model: Path = field(default_factory=lambda: packaged("data/toy/model"))
    """model that edits"""
    student: str = ""
    """the same model distilled into few steps, or none (default: toy-fast for the model that ships)"""
    config: Path = field(default_factory=lambda: packaged("configs/toy.yaml"))
    """configuration of the training run"""
    set: list[str] = field(default_factory=list)
    """KEY=VALUE, changes to that configuration"""
    scenes: int = field(default=1500, metadata={"group": "How much is done"})
    """training scenes to render"""
    seconds: float = 90.0
    """approximate time to train"""
    steps: int = 0
    """optimizer steps; 0 means as many as --seconds allow"""
    objects: int = 60
    """test objects to edit"""
    guidance: list[float] = field(default_factory=lambda: [1.0, 3.0, 5.0])
    """guidance scales"""
    sampling_steps: int = 50
    """steps of the solver"""
    shown: int = 16
    """number of edits on the page"""
    seed: int = 0
    """seed of scenes, noise and training"""
