"""Install a wheel in a fresh environment, far from the clone, and demo, edit and train with it.

python scripts/check_wheel.py dist/pbe-*.whl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from pbe.cli.main import run_command
from pbe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FILES = "--image {0}/image.png --mask {0}/mask.png --exemplar {0}/exemplar.png".format("outputs/demo/example")
FEW = (
    "trainer.max_steps=2 data.batch_size=4 data.num_workers=0 trainer.precision=32-true logging.loggers=[csv]"
)
REDUCED = "--scenes 64 --steps 30 --objects 4 --sampling-steps 2 --shown 2 --guidance 1 3"
COMMANDS = (
    "pbe --version",
    "pbe doctor",
    f"pbe demo {REDUCED} --set data.batch_size=16",
    f"pbe edit --model toy {FILES} --out edits --steps 4",
    "pbe toy render --out outputs/toy/shards/single --scenes 16 --max-objects 1 --workers 0",
    "pbe toy render --out outputs/toy/shards/validation_single --scenes 8 --split test --workers 0",
    f"pbe train toy autoencoder_from=toy {FEW}",
    "python -c from\tpbe\timport\tPaintByExample;PaintByExample.from_pretrained('toy')",
)
MADE = ("outputs/demo/index.html", "edits/image_0.png", "outputs/toy/diffusion/model/unet.safetensors")


def check(wheel: Path, borrow: bool) -> None:
    """Install and use the wheel; a command that fails is a UserError."""
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name) / "empty", Path(name) / "env"
        folder.mkdir()
        venv.create(environment, with_pip=True)
        scripts = environment / "bin"
        install = [f"{wheel.resolve()}[demo]", "-c", str(ROOT / "constraints.txt")]
        if borrow:  # everything but the wheel from the environment that runs this
            site = next((environment / "lib").glob("python*/site-packages"))
            (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
            install = ["--no-deps", str(wheel.resolve())]
        _run([str(scripts / "python"), "-m", "pip", "install", "--quiet", *install], folder)
        for command in COMMANDS:
            program, *words = command.split(" ")
            _run([str(scripts / program), *(word.replace("\t", " ") for word in words)], folder)
        missing = [each for each in MADE if not (folder / each).is_file()]
        if missing:
            raise UserError(f"the commands did not make {', '.join(missing)}")


def _run(words: list[str], folder: Path) -> None:
    print(f"$ {' '.join(words)}", flush=True)
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    status = subprocess.run(words, cwd=folder, env=environment, check=False).returncode
    if status:
        raise UserError(f"'{' '.join(words[:2])}' ended with status {status}; its message stands above")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 where something does not work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="file to install")
    parser.add_argument("--borrow", action="store_true", help="take all other packages from this Python")
    options = parser.parse_args(arguments)
    return run_command(lambda: check(options.wheel, options.borrow))


if __name__ == "__main__":
    sys.exit(main())
