"""Every option of the scripts that became subcommands is one of its subcommand."""

from __future__ import annotations

import pytest

from pbe.cli.main import COMMANDS, find_app, make_app
from tests.commands import options_of

# Script that was, and the subcommand that it is: its options.
OPTIONS = {
    ("train.py", "train"): "--dry-run --find-batch-size --memory-limit",
    ("sample.py", "edit"): (
        "--model --config --raw-weights --revision --cache-dir --offline --safety-checker --image --mask "
        "--exemplar --name --pairs --out --output --watermark --solver --spacing --karras --steps "
        "--guidance-scale --eta --seed --num-images --conventions --region --margin --feather --height "
        "--width --no-preserve-background --preserve-background --device --dtype --batch-size "
        "--cpu-offload --attention-slicing --quiet"
    ),
    (
        "scripts/convert_checkpoint.py",
        "convert",
    ): "--to --dtype --verify --raw-weights --config --from-sd --tower --seed",
    ("scripts/prepare_data.py", "prepare"): (
        "--out --split --masks --zero-based --relative --min-area --max-area --min-side --max-aspect "
        "--drop-flag --label --drop-label --exif-frame --shard-images --shard-mb --max-side --quality "
        "--validation-share --shuffle --no-perceptual --check-against --workers --engine --part "
        "--overwrite"
    ),
    ("scripts/inspect_data.py", "inspect"): "--out --stream --count --epoch --start",
    ("scripts/cache_latents.py", "cache"): "--shard --size --list",
    ("scripts/evaluate.py", "evaluate"): (
        "--model --raw-weights --benchmark --edits --out --guidance --solver --steps --seed --batch-size "
        "--dtype --device --threads --objects --sheet --world --cases --no-preserve-background "
        "--preserve-background --conventions --devices --strategy --num-nodes --metrics --reference "
        "--tower-weights --towers --mixture --rank-by --show"
    ),
    ("scripts/run_ablation.py", "ablate"): "--jobs --threads --dry-run",
    ("scripts/human_study.py", "study make"): "--systems --benchmark --out --groups --seed --title --copy",
    ("scripts/human_study.py", "study tabulate"): "--key --partial --seed",
    ("scripts/demo.py", "demo"): (
        "--out --model --config --set --scenes --seconds --steps --objects --guidance --sampling-steps "
        "--shown --seed"
    ),
    ("scripts/plot_run.py", "plot"): "--out",
    ("scripts/build_benchmark.py", "benchmark build"): (
        "--check --toy --sources --exemplars --validation-share --sources-split --exemplars-split --out "
        "--cases --seed --size --world"
    ),
    (
        "scripts/fit_mixture.py",
        "fit",
    ): "--images --out --tower-weights --tower --components --seed --batch-size --device",
    (
        "scripts/naming_test.py",
        "toy naming make",
    ): "--model --true --out --objects --guidance --solver --steps --seed --grey --threads",
    ("scripts/naming_test.py", "toy naming score"): "--key",
    (
        "scripts/score_checkpoints.py",
        "toy score",
    ): "--objects --guidance --steps --solver --dtype --device --threads --csv",
    ("scripts/render_toy_world.py", "toy render"): (
        "--out --scenes --split --seed --size --max-long-side --max-objects --recolour "
        "--scenes-per-shard --workers --world"
    ),
    ("scripts/train_toy_model.py", "toy train"): "--out --score-every",
    ("scripts/crop_pictures.py", "benchmark crop"): "--images --out --size --filter --workers",
}


@pytest.mark.parametrize(("script", "command"), list(OPTIONS))
def test_a_subcommand_takes_the_options_of_its_script(script: str, command: str) -> None:
    lost = set(OPTIONS[script, command].split()) - options_of(command)
    assert not lost, f"{script} took {', '.join(sorted(lost))}"


def test_every_option_says_what_it_does() -> None:
    app = make_app()
    for command in COMMANDS:
        arguments = find_app(app, command).assemble_argument_collection(parse_docstring=True)
        silent = [each.name for each in arguments if not each.children and not each.parameter.help]
        assert not silent, f"pbe {command}: {silent} lack a docstring"
        broken = [each.name for each in arguments if "\n " in (each.parameter.help or "")]
        assert not broken, f"pbe {command}: the help of {broken} would be indented from its second line on"


def test_many_options_stand_in_groups() -> None:
    app = make_app()
    groups = {}
    for command in COMMANDS:
        shown = find_app(app, command).assemble_argument_collection().filter_by(show=True)
        groups[command] = list(dict.fromkeys(each.parameter.group[0].name for each in shown))
        if len(shown) > 12:
            assert not {"Parameters", "Arguments"} & set(groups[command]) - {"Arguments"}, command
    assert groups["edit"] == ["Sampling", "Region and size", "Model", "Input", "Output", "Running"]
    assert groups["cache"] == ["Arguments", "Parameters"]
