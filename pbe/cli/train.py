"""``pbe train``: train a model."""

from __future__ import annotations

from pbe.cli.arguments import Place, options
from pbe.errors import UserError


@options
class TrainSettings:
    """Options of ``pbe train``."""

    dry_run: bool = False
    """only report parameters, memory, speed and length"""
    find_batch_size: bool = False
    """only try batch sizes on this machine"""
    memory_limit: float = 0.0
    """with --find-batch-size: GB that may be used (0: 80 % of what is available)"""


def train(config: Place, /, *overrides: str, settings: TrainSettings = TrainSettings()) -> int:
    """Train Paint by Example.

    pbe train configs/toy.yaml trainer.max_steps=100 data.batch_size=8

    The same command continues a stopped run; Ctrl-C and SIGTERM save a checkpoint and the weights so far.
    The toy configuration needs scenes of pbe toy render; autoencoder_from=toy takes the autoencoder that
    ships. pbe toy train does all of that by itself.

    Args:
        config: YAML file, or the name of a configuration that ships, such as toy
        overrides: key=value, changes to the configuration; an unknown key is an error naming the nearest
    """
    if settings.memory_limit and not settings.find_batch_size:
        raise UserError("--memory-limit goes with --find-batch-size (--help lists the options)")
    from pbe.config import load_config

    loaded = load_config(config, list(overrides))
    if settings.dry_run:
        from pbe.training.plan import make_plan

        for line in make_plan(loaded):
            print(line, flush=True)  # counts stand there while the rest is measured
        return 0
    if settings.find_batch_size:
        from pbe.training.plan import find_batch_size

        find_batch_size(loaded, settings.memory_limit)
        return 0
    from pbe.training.run import train as run  # slow to import: bad input is told before

    result = run(loaded)
    if result.rank == 0:  # the first process speaks for all
        there = result.model_dir.is_file() or (result.model_dir / "config.json").is_file()
        weights = f"; weights so far in {result.model_dir}" if there else ""
        stopped = f"the same command continues from {result.output_dir}/checkpoints{weights}"
        done = f"{result.steps} steps, {result.seconds:.0f} s; weights in {result.model_dir}"
        print(f"stopped at step {result.steps}; {stopped}" if result.stopped_by else done)
    return 128 + result.stopped_by if result.stopped_by else 0
