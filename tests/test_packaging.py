"""What an installation does on machines unlike the developers'."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import _distutils_hack
import pytest
import setuptools

from nabla_fast.ops import native

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, with one Python module for the package; its path has a space."""
    copy = tmp_path / "a clone"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "README.md").touch()
    (copy / "nabla_fast").mkdir()
    (copy / "nabla_fast" / "__init__.py").touch()
    (copy / "nabla_fast" / "py.typed").touch()
    return copy


def run_setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_broken_compiler_leaves_a_pure_python_package(source: Path) -> None:
    stale = source / "nabla_fast" / native._library_path(native._PACKAGE).name
    stale.touch()
    result = run_setup(source, "build_ext", "--inplace", CXX="false", NABLA_FAST_REQUIRE_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "installs WITHOUT its native library" in result.stderr
    assert not stale.exists()


def test_broken_compiler_is_an_error_where_native_is_required(source: Path) -> None:
    result = run_setup(source, "build_ext", "--inplace", CXX="false", NABLA_FAST_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "NABLA_FAST_REQUIRE_NATIVE=1, but building the native library failed" in result.stderr


def test_missing_torch_is_named(source: Path) -> None:
    # -S hides the installed packages, torch among them; the two of setuptools are put back.
    setuptools_only = source / "packages"
    setuptools_only.mkdir()
    for package in (setuptools, _distutils_hack):
        (setuptools_only / package.__name__).symlink_to(Path(package.__file__).parent)
    result = subprocess.run(
        [sys.executable, "-S", "setup.py", "--version"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(setuptools_only), "NABLA_FAST_REQUIRE_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "torch is not importable here" in result.stderr


@pytest.mark.skipif(not native.available(), reason="nothing to pack without a native library")
def test_wheel_serves_every_cpython(source: Path) -> None:
    """One wheel per platform, with the library, the type marker and the licence in it."""
    # What the library holds is of no interest here, and torch's headers, precompiled for every instruction set, would
    # take the test from two seconds to a minute.
    lists = source / "CMakeLists.txt"
    lists.write_text("set(CMAKE_DISABLE_PRECOMPILE_HEADERS ON)\n" + lists.read_text())
    shutil.rmtree(source / "csrc")
    (source / "csrc").mkdir()
    (source / "csrc" / "registration.cpp").write_text("int nothing;\n")
    (source / "csrc" / "cpu").mkdir()
    (source / "csrc" / "cpu" / "nothing.cpp").write_text("static int nothing;\n")
    result = run_setup(source, "bdist_wheel", NABLA_FAST_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.startswith("nabla_fast-0.1.0-py3-none-")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"nabla_fast/{native._library_path(native._PACKAGE).name}" in names
    assert "nabla_fast/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
