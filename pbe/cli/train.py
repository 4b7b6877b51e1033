"""``pbe train``: train a model."""

from __future__ import annotations

from pbe.cli.arguments import Place, options
from pbe.errors import UserError


@options
class TrainSettings:
    """Options of ``pbe train``."""

    dry_run: bool = False
    """report parameters, memory, speed and hours; write nothing"""
    find_batch_size: bool = False
    """find the largest and the fastest batch size on this machine; write nothing"""
    memory_limit: float = 0.0
    """with --find-batch-size: GB that may be used (0: all of a GPU, 80 % of what is free on a CPU)"""


def train(config: Place, /, *overrides: str, settings: TrainSettings = TrainSettings()) -> int:
    """Train or fine-tune a model.

    pbe train toy autoencoder_from=toy data.train_shards=data/mine/train output_dir=outputs/mine
    pbe train finetune init_from=MODEL data.train_shards=data/mine/train output_dir=outputs/adapter

    The same command continues a stopped run; Ctrl-C and SIGTERM save a checkpoint and the weights so far.
    Shards of your own images come from pbe prepare; those that the configuration toy names, and its
    autoencoder, are made by pbe toy train. See docs/training.md.

    Args:
        config: YAML file, or the name of a configuration that ships, such as toy, finetune or paper
        overrides: key=value, changes to the configuration; docs/configuration.md lists all keys
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
