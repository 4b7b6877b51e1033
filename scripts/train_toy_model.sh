#!/usr/bin/env bash
# Makes the model that ships in data/toy/model: scenes, autoencoder, diffusion model, half-precision export.
# Every stage can be stopped and started again with the same command: finished ones are passed over quickly.
set -euo pipefail
cd "$(dirname "$0")/.."
export NO_ALBUMENTATIONS_UPDATE=1
PYTHON=${PYTHON:-python}
SHARDS=outputs/toy/shards

render() { # split, folder, scenes, seed; the mark is made last, so that a stopped rendering is made again
    [ -f "$SHARDS/$2.done" ] && return
    "$PYTHON" scripts/render_toy_world.py --out "$SHARDS/$2" --split "$1" --scenes "$3" --seed "$4"
    touch "$SHARDS/$2.done"
}

render train train 24000 0
render test validation 256 1
# one that is finished is passed over in seconds; a model folder is there after a stop too
"$PYTHON" train.py configs/toy_autoencoder.yaml
"$PYTHON" train.py configs/toy.yaml
"$PYTHON" scripts/convert_checkpoint.py outputs/toy/diffusion/model data/toy/model --to native --dtype fp16
