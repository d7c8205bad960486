"""Builds the native library with CMake; everything else about the package stands in pyproject.toml.

The library is one plain shared object without Python's C API, so one build serves every CPython version. It belongs to
one torch version, and carries that version in its name: ``nabla_fast/_native_torch_2_13_0.so``.

Without torch, CMake or a compiler the package installs without it, unless ``NABLA_FAST_REQUIRE_NATIVE=1``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRE_NATIVE = os.environ.get("NABLA_FAST_REQUIRE_NATIVE") == "1"
# A virtual environment's own tools come first, also when it was not activated.
TOOL_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def torch_location() -> tuple[Path, str] | None:
    """Directory and public version of the installed torch, found without the seconds an import takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent, importlib.metadata.version("torch").split("+")[0]


def go_without_native(reason: str) -> None:
    """Stops the installation if the native library is required, else says loudly that it will be missing."""
    if REQUIRE_NATIVE:
        raise SystemExit(f"nabla_fast: NABLA_FAST_REQUIRE_NATIVE=1, but {reason}")
    bar = "*" * 100
    print(
        f"{bar}\nnabla_fast: {reason}.\nnabla_fast installs WITHOUT its native library and will be slower; "
        f"set NABLA_FAST_REQUIRE_NATIVE=1 to make this an error.\n{bar}",
        file=sys.stderr,
    )


class CMakeBuild(build_ext):
    """Runs CMake in place of the compiler calls of setuptools."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.run_cmake(target)
        except (OSError, subprocess.CalledProcessError) as error:
            # An older library at this place would go on to be used as if it were this build.
            for path in (target, ROOT / self.get_ext_filename(ext.name)):
                path.unlink(missing_ok=True)
            go_without_native(f"building the native library failed ({error}); the output above says why")

    def run_cmake(self, target: Path) -> None:
        torch = torch_location()
        assert torch is not None
        torch_dir, torch_version = torch
        cmake = shutil.which("cmake", path=TOOL_PATH)
        if cmake is None:
            raise FileNotFoundError("cmake was not found; `pip install cmake ninja` provides it")
        # Not the build_temp of setuptools: an editable install makes a fresh one and would compile everything again.
        build_dir = ROOT / "build" / f"native_torch_{torch_version}"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DNABLA_FAST_TORCH_DIR={torch_dir}",
            f"-DNABLA_FAST_TORCH_VERSION={torch_version}",
            f"-DNABLA_FAST_LIBRARY_NAME={target.stem}",
        ]
        ninja = shutil.which("ninja", path=TOOL_PATH)
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:
            # The tree may have been configured for another path or generator, which CMake refuses to change.
            if not build_dir.exists():
                raise
            shutil.rmtree(build_dir)
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / target.name, target)


class PlatformWheel(bdist_wheel):
    """Tags the wheel for its platform, but for every CPython version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if platform == "any" else ("py3", "none", platform)


def extensions() -> list[Extension]:
    torch = torch_location()
    if torch is None:
        go_without_native(
            "torch is not importable here; install torch first and use `pip install --no-build-isolation`"
        )
        return []
    # CMake finds the sources by itself; they are listed here for source distributions.
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    others = sorted(
        str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in {".h", ".cu", ".cuh"}
    )
    name = f"nabla_fast._native_torch_{torch[1].replace('.', '_')}"
    return [Extension(name, sources=sources, depends=["CMakeLists.txt", *others], optional=not REQUIRE_NATIVE)]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel})
