#!/usr/bin/env bash
# Installs torch for the Python interpreter given as the only argument, unless it is there already: the default build
# where there is an NVIDIA GPU, the CPU build, which is a tenth of the size, elsewhere.
set -euo pipefail

python=$1
cpu_version=2.13.0

install() { "$python" -m pip install --quiet "$@"; }

if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    exit 0
fi
if nvidia-smi >/dev/null 2>&1; then
    install torch
    exit
fi
# The configured sources first: a mirror may carry the CPU build. Where nothing does, the default build works as well.
install "torch==$cpu_version+cpu" 2>/dev/null ||
    install "torch==$cpu_version" --index-url https://download.pytorch.org/whl/cpu ||
    install "torch==$cpu_version"
