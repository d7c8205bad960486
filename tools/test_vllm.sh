#!/usr/bin/env bash
# Serves SmolLM2 with the vLLM in the folder given first, runs the tests marked vllm with the Python given second, and
# stops the server whatever comes of them. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=$PWD/$1
python=$2
shift 2
seconds_to_start=600

model=$("$python" -c 'from nabla_fast.demo import smollm2_path
from nabla_fast.models.gguf import converted_gguf
print(converted_gguf(smollm2_path()))')
port=$("$python" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')
url=http://127.0.0.1:$port
work=$(mktemp -d)
log=$work/server.log

export NABLA_FAST_VLLM_MODEL=$model NABLA_FAST_VLLM_PYTHON=$environment/bin/python NABLA_FAST_VLLM_URL=$url
# The cache for keys and values, in GiB: vLLM would take most of the machine's memory, and a test starts a second one.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1

# A process group of its own, since the server has children that would outlive it.
setsid "$environment/bin/vllm" serve "$model" --host 127.0.0.1 --port "$port" --dtype float32 --max-model-len 512 \
    --enforce-eager --max-num-seqs 16 --served-model-name smollm2 >"$log" 2>&1 &
server=$!
export NABLA_FAST_VLLM_PID=$server  # of the process group, for the test that kills it
stop() {
    kill -TERM -- "-$server" 2>/dev/null || true
    for _ in $(seq 50); do
        kill -0 -- "-$server" 2>/dev/null || break
        sleep 0.2
    done
    kill -KILL -- "-$server" 2>/dev/null || true
    rm -rf "$work"
}
trap stop EXIT

began=$SECONDS
until "$python" -c 'import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)' "$url" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null || ((SECONDS - began > seconds_to_start)); then
        tail -n 60 "$log"
        echo "the vLLM server did not start within $((SECONDS - began)) s" >&2
        exit 1
    fi
    sleep 1
done
echo "the vLLM server started in $((SECONDS - began)) s"

if ! "$python" -m pytest -m vllm "$@"; then
    tail -n 60 "$log"
    exit 1
fi
