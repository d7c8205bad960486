"""Writes the Triton kernels, with the operators over them, as a repository for Hugging Face's `kernels` library.

    python tools/make_hub_kernels.py DIR

DIR is then ready to load (`kernels.get_local_kernel`) and to upload. `build.toml` and `torch-ext/` are the sources as
kernel-builder has them; `build/torch-cpu` and `build/torch-cuda` are what it makes of them. Files of nabla_fast/ops are
copied with their imports made relative; what differs there stands in tools/hub_kernels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS = ROOT / "nabla_fast" / "ops"
TEMPLATE = ROOT / "tools" / "hub_kernels"
NAME = "nabla_kernels"
SOURCES = Path("torch-ext") / NAME
BACKENDS = ("cpu", "cuda")
COPIED = (
    "arguments", "checks", "dto_step", "embedding", "gradient_norm", "likelihood", "noise", "reference", "registry",
    "rotary", "stats", "table_matmul", "token_diff", "types", "warp",
)  # fmt: skip
_IMPORT = re.compile(r"^( *)from nabla_fast\.ops((?:\.\w+)*) import ", re.MULTILINE)

# kernel-builder writes the same two names into torch-ext for its own builds.
_OPS = '''"""The operators' namespace in `torch.ops`: no other version or backend of these kernels has it."""

import torch

_NAMESPACE = "{identifier}"
ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    return f"{{_NAMESPACE}}::{{name}}"
'''
# Versions of `kernels` before the folder of a variant was the package itself look for a folder of its name.
_IN_ITS_OWN_FOLDER = '''"""The package in the folder above, where older versions of `kernels` look for it."""

import importlib.util
import sys
from pathlib import Path

_above = importlib.util.spec_from_file_location(f"{__name__}_above", Path(__file__).parent.parent / "__init__.py")
_package = importlib.util.module_from_spec(_above)
sys.modules[_above.name] = _package
_above.loader.exec_module(_package)

__all__ = _package.__all__
globals().update({name: getattr(_package, name) for name in __all__})
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write; must be empty or not there")
    directory: Path = parser.parse_args().directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        parser.error(f"DIR must be an empty directory or a new name, got {directory}")
    for path, content in sorted(files().items()):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    print(f"wrote {directory}; to upload it:")
    print(f"  hf upload USER/nabla-kernels {directory} . --repo-type kernel --revision v{_version()}")
    print("to use it:")
    print(f"  kernels.get_local_kernel(pathlib.Path({str(directory.resolve())!r}))")


def files() -> dict[Path, bytes]:
    """The repository: path in it → content."""
    found = {
        file.relative_to(TEMPLATE): file.read_bytes()
        for file in TEMPLATE.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    found[Path("LICENSE")] = (ROOT / "LICENSE").read_bytes()
    for file in [*(OPS / f"{name}.py" for name in COPIED), *(OPS / "triton").glob("*.py")]:
        found[SOURCES / file.relative_to(OPS)] = rewritten(file).encode()
    package = {path.relative_to(SOURCES): found[path] for path in found if path.is_relative_to(SOURCES)}
    digest = hashlib.sha256(b"".join(b"%s\0%s\0" % (bytes(p), package[p]) for p in sorted(package))).hexdigest()
    for backend in BACKENDS:
        variant = _variant(package, backend, f"_{NAME}_{backend}_{digest[:10]}")
        found.update({Path("build") / f"torch-{backend}" / path: content for path, content in variant.items()})
    return found


def rewritten(file: Path) -> str:
    """A file of nabla_fast/ops with relative imports, and the names of the repository in its text."""
    depth = len(file.relative_to(OPS).parts) - 1

    def relative(found: re.Match[str]) -> str:
        target = found[2].lstrip(".").split(".") if found[2] else []
        shared = int(depth == 1 and target[:1] == ["triton"])
        return f"{found[1]}from {'.' * (depth + 1 - shared)}{'.'.join(target[shared:])} import "

    text = _IMPORT.sub(relative, file.read_text(encoding="utf-8"))
    text = text.replace("nabla_fast.ops", NAME).replace("nabla_fast", NAME)
    origin = file.relative_to(ROOT).as_posix()
    return f"# Made from {origin} of nabla_fast by tools/make_hub_kernels.py: changes belong there.\n{text}"


def _variant(package: dict[Path, bytes], backend: str, identifier: str) -> dict[Path, bytes]:
    """What is loaded on one backend: the package, its namespace, and metadata with the digest of every file."""
    variant = {
        **package,
        Path("_ops.py"): _OPS.format(identifier=identifier).encode(),
        Path(NAME, "__init__.py"): _IN_ITS_OWN_FOLDER.encode(),
    }
    digests = {p.as_posix(): base64.b64encode(hashlib.sha256(content).digest()) for p, content in variant.items()}
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": identifier,
        "version": _version(),
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {path: digests[path].decode() for path in sorted(digests)}},
    }
    return {**variant, Path("metadata.json"): json.dumps(metadata, indent=2).encode() + b"\n"}


def _version() -> int:
    found = re.search(r"^version = (\d+)$", (TEMPLATE / "build.toml").read_text(), re.MULTILINE)
    assert found is not None, "tools/hub_kernels/build.toml has no version"
    return int(found[1])


if __name__ == "__main__":
    main()
