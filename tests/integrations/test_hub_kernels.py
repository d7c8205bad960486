"""The Triton kernels as a repository for the `kernels` library, as tools/make_hub_kernels.py writes it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import make_hub_kernels
import pytest
import torch

from nabla_fast.ops import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {"cpu": "build/torch-cpu", "cuda": "build/torch-cuda"}


@pytest.fixture(scope="module")
def kernels():
    """The library, which the extra dev has, and a machine without a network may not."""
    return pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub") / "kernels"
    done = python(ROOT / "tools" / "make_hub_kernels.py", directory)
    assert done.returncode == 0, done.stderr
    assert f"hf upload USER/nabla-kernels {directory} . --repo-type kernel --revision v0" in done.stdout
    return directory


def python(*arguments, **environment):
    """Python in a process of its own, because Triton reads TRITON_INTERPRET once."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_librarys_own_checks(repository, kernels):
    # What kernel-builder checks a directory by; the library names it in no public module.
    from kernels._rust import Backend, Build, Digest, Metadata

    build = Build.open(repository)
    assert build.general.backends == [Backend.from_str(name) for name in VARIANTS]
    ids = set()
    for backend, place in VARIANTS.items():
        metadata = Metadata.read_from_file(repository / place / "metadata.json")
        assert (metadata.name.python_name, metadata.version, metadata.license) == ("nabla_kernels", 0, "apache-2.0")
        assert metadata.backend.backend_type == Backend.from_str(backend)
        assert metadata.id.isidentifier()
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, repository / place))
        ids.add(metadata.id)
    assert len(ids) == len(VARIANTS)
    info = python("-c", "from kernels.cli import main; main()", "info", repository)
    assert "Name: nabla-kernels" in info.stdout
    assert "Backends: cpu, cuda" in info.stdout


@pytest.mark.parametrize("place", VARIANTS.values())
def test_imports_are_relative_or_of_torch_triton_and_python(repository, place):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for file in (repository / place).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= allowed, file


def test_every_kernel_is_there_and_stands_in_the_project_once(repository):
    names = {file.name for file in (ROOT / "nabla_fast/ops/triton").glob("*.py")}
    for place in ("torch-ext/nabla_kernels", *VARIANTS.values()):
        assert {file.name for file in (repository / place / "triton").glob("*.py")} == names
    assert not [file for file in make_hub_kernels.TEMPLATE.rglob("*.py") if "triton.jit" in file.read_text()]


def test_another_content_has_another_namespace(monkeypatch):
    def identifier():
        content = make_hub_kernels.files()[Path("build/torch-cuda/_ops.py")].decode()
        return next(line for line in content.splitlines() if line.startswith("_NAMESPACE"))

    first = identifier()
    assert identifier() == first
    rewritten = make_hub_kernels.rewritten
    monkeypatch.setattr(make_hub_kernels, "rewritten", lambda file: rewritten(file) + "# changed\n")
    assert identifier() != first


@pytest.mark.timeout(600)
@pytest.mark.parametrize("interpret", ["1", *(["0"] if torch.cuda.is_available() else [])])
def test_its_own_tests_pass(repository, kernels, tmp_path, interpret):
    run = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "--rootdir", tmp_path,
        repository / "tests", TRITON_INTERPRET=interpret, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


COMPARED = """
import sys
from pathlib import Path

import kernels
import torch
from test_operators import calls

hub = kernels.get_local_kernel(Path(sys.argv[1]))
operators = getattr(torch.ops, kernels.get_loaded_kernels()[0].metadata.id)
compared = set()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name in calls(1, dtype, "triton"):
        if name.startswith("draw_token"):
            continue
        results = []
        for namespace, backend in ((operators, "triton"), (torch.ops.nabla_fast, "triton"), (operators, "reference")):
            packet, arguments = calls(5, dtype, backend)[name]
            if name.startswith("dto_step"):  # parameters and moments are float32
                arguments = (*(a.float() for a in arguments[:3]), *arguments[3:])
            found = getattr(namespace, packet._qualified_op_name.partition("::")[2])(*arguments)
            written = arguments[:4] if name.startswith("dto_step") else ()
            results.append([*((found,) if isinstance(found, torch.Tensor) else found), *written])
        for ours, packages, meaning in zip(*results, strict=True):
            torch.testing.assert_close(ours, packages, rtol=0, atol=0)
            if dtype == torch.float32:
                torch.testing.assert_close(ours, meaning, rtol=1e-4, atol=1e-4)
        compared.add(name.split(" ")[0])
print("compared", *sorted(compared))
"""


@pytest.mark.timeout(600)
def test_kernels_give_what_the_packages_give(repository, kernels):
    run = python(
        "-c", COMPARED, repository,
        TRITON_INTERPRET="1", HF_HUB_OFFLINE="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'ops'}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    of_triton = set(re.findall(r'^    "(\w+)",$', (make_hub_kernels.OPS / "triton" / "__init__.py").read_text(), re.M))
    public = of_triton & set(OPERATORS)
    assert public <= set(kernels.get_local_kernel(repository).__all__)
    assert run.stdout.split() == ["compared", *sorted(public)]


def test_operators_are_ones_that_pytorch_can_differentiate_and_trace(repository, kernels):
    hub = kernels.get_local_kernel(repository)
    operators = getattr(torch.ops, hub.namespace.NAMESPACE)
    h, weight = torch.randn(3, 8, requires_grad=True), torch.randn(19, 8)
    torch.library.opcheck(
        operators.log_likelihood_gradient.default, (h, weight, 1.0, 0.0, torch.arange(3), True, "reference")
    )
    log_pi = hub.linear_log_likelihood(h, hub.Head(weight), torch.arange(3))
    (gradient,) = torch.autograd.grad(log_pi.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="nabla_kernels has no second derivative of linear_log_likelihood"):
        gradient.sum().backward()


def test_the_example_of_the_card_runs(repository, kernels, capsys):
    text = (repository / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    asked = 'get_kernel("THIS_REPOSITORY", version=0, trust_remote_code=True)'
    assert asked in code
    exec(code.replace(asked, "local"), {"local": kernels.get_local_kernel(repository)})
    assert "torch.Size([4, 576])" in capsys.readouterr().out
    listed = set(re.findall(r"`(\w+)`", "\n".join(line for line in text.splitlines() if line.startswith("| `"))))
    functions = {name for name in kernels.get_local_kernel(repository).__all__ if name.islower()}
    assert listed == functions - {"linear_logits", "log_likelihood_gradient", "token_gradient"}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "backend must be one of auto, reference, triton, got 'cuda'"),
        ("triton", "backend 'triton' of token_diff runs on CUDA, or on the CPU with TRITON_INTERPRET=1"),
    ],
)
def test_a_back_end_that_cannot_run_is_an_error(repository, kernels, backend, message):
    hub = kernels.get_local_kernel(repository)
    tokens = torch.arange(4).view(1, 4)
    with pytest.raises(ValueError, match=message):
        hub.token_diff(tokens, tokens, backend=backend)


def test_older_versions_of_the_library_find_a_folder_of_its_name(repository, kernels):
    code = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("nabla_kernels", sys.argv[1])
package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
old, new = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
print(package.token_diff(old, new).changes.item(), len(package.__all__))
"""
    run = python("-c", code, repository / VARIANTS["cpu"] / "nabla_kernels" / "__init__.py")
    assert run.stdout.split() == ["2", str(len(kernels.get_local_kernel(repository).__all__))], run.stderr


def test_only_an_empty_directory_is_written_to(repository):
    done = python(ROOT / "tools" / "make_hub_kernels.py", repository)
    assert done.returncode == 2
    assert f"DIR must be an empty directory or a new name, got {repository}" in done.stderr
