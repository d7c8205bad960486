#!/usr/bin/env bash
# Builds the package against one version of torch, in an environment of its own, and runs the tests of what was built.
#   tools/test_torch.sh FOLDER VERSION [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$1 version=$2 python=${3:-python3}
bin=$folder/bin

[ -x "$bin/python" ] || "$python" -m venv "$folder"
"$bin/python" -m pip install --quiet "torch==$version" "setuptools>=77" cmake ninja
"$bin/python" -m pip install --quiet --no-build-isolation ".[gguf]" pytest pytest-timeout hypothesis triton
"$bin/nabla-fast" doctor
# From a folder of its own, so that what is imported is what was installed.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r tests pyproject.toml "$scratch"
bin=$(cd "$bin" && pwd)
cd "$scratch"
NABLA_FAST_REQUIRE_NATIVE=1 "$bin/python" -m pytest -q -p no:cacheprovider tests/ops/test_{native,stats,embedding,likelihood,gradient_norm,dto_step,token_diff}.py \
    tests/test_gradient_cache.py tests/test_generate.py -k "native or gradient_cache or generate"
