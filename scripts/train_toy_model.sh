#!/usr/bin/env bash
# Makes the model that ships in data/toy/model: scenes, autoencoder, diffusion model, half-precision export.
# Every stage can be stopped and started again with the same command: finished ones are passed over quickly.
set -euo pipefail
cd "$(dirname "$0")/.."
export NO_ALBUMENTATIONS_UPDATE=1
PYTHON=${PYTHON:-python}
SHARDS=outputs/toy/shards

[ -d "$SHARDS/train" ] || "$PYTHON" scripts/render_toy_world.py --out "$SHARDS/train" --scenes 24000 --split train --seed 0
[ -d "$SHARDS/validation" ] || "$PYTHON" scripts/render_toy_world.py --out "$SHARDS/validation" --scenes 256 --split test --seed 1
[ -d outputs/toy/autoencoder/model ] || "$PYTHON" train.py configs/toy_autoencoder.yaml
[ -d outputs/toy/diffusion/model ] || "$PYTHON" train.py configs/toy.yaml
"$PYTHON" scripts/convert_checkpoint.py outputs/toy/diffusion/model data/toy/model --to native --dtype fp16
