#!/usr/bin/env bash
# Makes an environment with what the documentation is built with: install_docs.sh DIRECTORY PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
directory=$1 python=$2

[[ -x $directory/bin/python ]] || "$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet "tomli; python_version < '3.11'"
# The extra's packages without the package itself, which would bring torch.
mapfile -t packages < <("$directory/bin/python" - <<'PYTHON'
try:
    import tomllib
except ImportError:
    import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"], sep="\n")
PYTHON
)
"${pip[@]}" install --quiet "${packages[@]}"
