#!/usr/bin/env bash
# Installs the torch that everything is tested with, for the Python interpreter given as the only argument, unless torch
# is there already: the default build where there is an NVIDIA GPU, the CPU build, a tenth of the size, elsewhere.
set -euo pipefail

python=$1
version=2.13.0

install() { "$python" -m pip install --quiet "$@"; }

if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    exit 0
fi
if nvidia-smi >/dev/null 2>&1; then
    install "torch==$version"
    exit
fi
# The configured sources first: a mirror may carry the CPU build. Where nothing does, the default build works as well.
install "torch==$version+cpu" 2>/dev/null ||
    install "torch==$version" --index-url https://download.pytorch.org/whl/cpu ||
    install "torch==$version"
