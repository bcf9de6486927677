#!/usr/bin/env bash
# The demo with installed programs, far from any checkout: tests/packaging/demo.sh BIN
# BIN is the folder of python and of the programs. The working directory has packages of its own
# with the names of ours, as the folders of users do. They fail when they are imported.
set -euo pipefail
unset PYTHONPATH PYTHONSAFEPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PATH=$(realpath "$1"):$PATH HOME=$folder WANDB_MODE=offline OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cd "$folder"
for package in configs sharding encoders training eval slurm; do
    mkdir "$package"
    echo "raise ImportError('$folder/$package was imported')" >"$package/__init__.py"
done

small=(--quiet --config demo data.limit=60 training.epochs=2)
movienet-shard demo --quiet --config demo
movienet-shard build "${small[@]}" sharding.workers=2  # spawned processes import our packages too
for program in shard encode train eval slurm; do
    "movienet-$program" --version
done
if command -v cc >/dev/null; then
    python -P -c 'from encoders.resize import CompiledResizer, installed_resizer
assert isinstance(installed_resizer(), CompiledResizer), "the wheel lacks its compiled part"'
fi
if ! python -c 'import torch' 2>/dev/null; then
    echo "Python $(python -V): stages without torch"
    movienet-shard verify "${small[@]}"
    exit
fi
movienet-encode run "${small[@]}"
two_ranks=(python -P -m accelerate.commands.launch --no_python
    --config_file "$(movienet-shard presets accelerate/cpu-2)")
"${two_ranks[@]}" movienet-train run "${small[@]}" training.device=cpu training.expected_world_size=2
movienet-train export demo-data/*/runs/demo --out model.safetensors
"${two_ranks[@]}" movienet-eval report "${small[@]}"
for file in demo-data/*/runs/demo/report/val/report.{html,json,md} model.safetensors; do
    test -s "$file"
done
