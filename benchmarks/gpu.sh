#!/usr/bin/env bash
# Builds, tests, sanitizes and measures nabla_fast on a bare machine with one GPU, within ten minutes.
#
#     benchmarks/gpu.sh DIR [--only build|test|sanitize|ops|gradients|dto|rollouts|generate|vllm]
#
# It needs torch, triton, transformers, rich, typer, pytest, hypothesis, cmake, nvcc and a C++ compiler, and no network;
# nothing is installed; with pytest-xdist the tests share the cores, and with vllm rollouts are compared with its. DIR
# gets few files: status.tsv (part, result, seconds), report.log (all output) and one JSON per suite. Parts that DIR says
# are done are not run again, so that a run that was cut, or ran out of time, goes on; --only runs a part whatever DIR
# says. PYTHON names the interpreter, BUDGET the seconds of one run.
set -uo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
}

parts=(build test gradients rollouts generate vllm ops dto sanitize)
out="" only=""
while (($#)); do
    case "$1" in
        --only)
            only="${2:-}"
            [[ " ${parts[*]} " == *" $only "* && -n "$only" ]] || usage
            shift 2
            ;;
        -*) usage ;;
        *)
            [[ -z "$out" ]] || usage
            out="$1"
            shift
            ;;
    esac
done
[[ -n "$out" ]] || usage
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.." || exit 2

python="${PYTHON:-python3}"
budget="${BUDGET:-570}"
status="$out/status.tsv" log="$out/report.log"
missing=77  # exit status of a part for which something is not installed
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
touch "$status"

build() {
    # Kernels for this GPU alone: a third of the time of all architectures.
    CUDAARCHS="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
    export CUDAARCHS
    NABLA_FAST_REQUIRE_NATIVE=1 "$python" setup.py build_ext --inplace && "$python" -m nabla_fast doctor
}

gpu_tests() {
    local shared=() failed=0
    export NABLA_FAST_REQUIRE_NATIVE=1 NABLA_FAST_SHOW_FAILURES=1
    # Most of the time kernels are compiled; more processes than this only wait for the GPU.
    "$python" -c 'import xdist' 2>/dev/null && shared=(-n 10)
    "$python" -m pytest -q "${shared[@]}" -k gpu tests/ops tests/test_gpu.py || failed=1
    NABLA_FAST_TEST_DEVICE=cuda "$python" -m pytest -q "${shared[@]}" tests/test_cached_decode.py tests/test_drop_in.py ||
        failed=1
    return "$failed"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || {
        echo "compute-sanitizer is not on the PATH"
        return 1
    }
    local tool failed=0
    # Every tensor is an allocation of its own, so that a write behind one is seen.
    for tool in memcheck racecheck synccheck; do
        echo "== $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_cuda.py \
            tests/ops/test_token_diff.py -k "gpu and (test_logits or test_latents or token_diff and cuda)" || failed=1
    done
    return "$failed"
}

measure() {  # a suite, and names of its cases; goes on where it was cut
    "$python" benchmarks/run.py --device cuda --suite "$1" --only "$2" --output "$out/${3:-$1}.json"
}

suite_of() { echo "${1/#ops/operators}"; }

compare_with_vllm() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' || return "$missing"
    measure rollouts vllm- vllm
}

run_part() {
    case "$1" in
        build) build ;;
        test) gpu_tests ;;
        sanitize) sanitize ;;
        vllm) compare_with_vllm ;;
        rollouts) measure rollouts rollouts- ;;
        *) measure "$(suite_of "$1")" "" ;;
    esac
}

# A part runs in a process group of its own, which `timeout` can end as a whole.
if [[ -n "${NABLA_FAST_GPU_PART:-}" ]]; then
    run_part "$NABLA_FAST_GPU_PART"
    exit
fi

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "torch sees no GPU; benchmarks/gpu.sh needs one" >&2
    exit 2
}

note() {
    sed -i "/^$1\t/d" "$status"
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$status"
}

# No part may use up the time of those after it; alone it may have all.
declare -A longest=([build]=200 [test]=200 [sanitize]=150 [ops]=150 [gradients]=250 [dto]=150 [rollouts]=150 [generate]=300)
longest[vllm]=300

failed=0
for part in "${parts[@]}"; do
    if [[ -n "$only" && "$part" != "$only" ]]; then continue; fi
    if [[ -z "$only" ]] && grep -q "^$part	ok" "$status"; then continue; fi
    left=$((budget - SECONDS))
    if ((left < 20)); then
        note "$part" "not run: no time left, run gpu.sh again" 0
        continue
    fi
    if [[ -z "$only" ]] && ((left > longest[$part])); then left=${longest[$part]}; fi
    # Asked for although it is done: from the beginning.
    if grep -q "^$part	ok" "$status"; then rm -f "$out/$(suite_of "$part").json"; fi
    begun=$SECONDS
    echo "== $part" | tee -a "$log"
    NABLA_FAST_GPU_PART="$part" timeout "$left" "$PWD/benchmarks/gpu.sh" "$out" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case "$code" in
        0) note "$part" ok $((SECONDS - begun)) ;;
        "$missing") note "$part" "not run: $part is not installed" $((SECONDS - begun)) ;;
        124 | 137) note "$part" "cut after $left s" $((SECONDS - begun)) ;;
        *) note "$part" "failed, exit status $code" $((SECONDS - begun)) ;;
    esac
    ((code && code != missing)) && failed=1
done
"$python" benchmarks/tables.py "$out"
exit "$failed"
