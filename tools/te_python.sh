#!/usr/bin/env bash
# Unpacks the Python part of TransformerEngine into .te-python, for the tests with its layers (docs/testing.md).
#
# The wheel has no compiled part and is not installed: on a machine without a GPU it would break megatron-core's imports.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${TE_VERSION:-2.20.2}
[ -d ".te-python/transformer_engine-$version.dist-info" ] && exit

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python -m pip download --quiet --no-deps --only-binary :all: --dest "$scratch" "transformer-engine==$version"
python -m zipfile --extract "$scratch"/transformer_engine-*.whl "$scratch/te"
rm -rf .te-python
mv "$scratch/te" .te-python
