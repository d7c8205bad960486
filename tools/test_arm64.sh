#!/usr/bin/env bash
# Cross-builds the native library for arm64, on a Debian for x86-64, and tests it in an emulated Debian for arm64. Needs
# root, for the compiler and the emulator that it installs and for mounts, which end with it, and some GB in FOLDER.
#   tools/test_arm64.sh FOLDER CMAKE [arguments for pytest, in place of those at the end]
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$1 cmake=$2
shift 2
compiler=aarch64-linux-gnu-g++
# The last one whose build for arm64 on PyPI comes without CUDA.
torch=2.10.0

tools=($compiler debootstrap qemu-aarch64-static update-binfmts)
if (($(command -v "${tools[@]}" | wc -l) < ${#tools[@]})); then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        g++-aarch64-linux-gnu debootstrap qemu-user-static binfmt-support
fi
# In a container nothing has done either.
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
[ -e $binfmt/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$folder/root
torch_folder=venv/lib/python3.11/site-packages/torch

# A command in the emulated system, in the copy of the sources there.
inside() {
    unshare --mount bash -euc 'root=$1
        shift
        mount -t proc proc "$root/proc"
        mount --rbind /sys "$root/sys"
        mount --rbind /dev "$root/dev"
        exec chroot "$root" /usr/bin/env --chdir=/source "$@"' _ "$root" "$@"
}

if [ ! -e "$folder/ready" ]; then
    rm -rf --one-file-system "$root"
    debootstrap --arch=arm64 --variant=minbase --include=python3-venv,ca-certificates,libubsan1 bookworm "$root"
    mkdir "$root/source"
    cp /etc/hosts /etc/resolv.conf "$root/etc/"
    inside python3 -m venv /venv
    inside /venv/bin/pip install --quiet "torch==$torch" numpy pytest pytest-timeout hypothesis
    touch "$folder/ready"
fi

cross_build() {
    "$cmake" -S . -B "$folder/$1" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
        -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$compiler \
        -DNABLA_FAST_TORCH_DIR="$root/$torch_folder" "${@:2}"
    "$cmake" --build "$folder/$1" --parallel "$(nproc)"
}
library=_native_torch_${torch//./_}
cross_build library -DNABLA_FAST_TORCH_VERSION=$torch -DNABLA_FAST_LIBRARY_NAME="$library"
# Undefined behaviour alone: the other sanitizers want memory where the emulator keeps its own.
cross_build tests -DNABLA_FAST_SANITIZE=undefined

rm -rf "$root/source"
mkdir "$root/source"
cp -r nabla_fast tests pyproject.toml "$folder"/tests/csrc/tests/*_test "$root/source/"
rm -f "$root"/source/nabla_fast/*.so
cp "$folder/library/$library.so" "$root/source/nabla_fast/"

for test in gradient_cache draw_token linear; do
    inside OMP_NUM_THREADS=1 LD_LIBRARY_PATH=/$torch_folder/lib ./${test}_test
done
# An import of torch takes a minute there: no tests that start processes, and none of real sizes.
if (($# == 0)); then
    set -- tests/ops/test_{linear,token_diff,stats,embedding,likelihood}.py \
        tests/ops/test_{gradient_norm,dto_step,dto_step_rows,draw_token}.py \
        -k "test_linear or (native and not real)"
fi
inside OMP_NUM_THREADS=1 NABLA_FAST_REQUIRE_NATIVE=1 PYTHONPATH=. /venv/bin/python -m pytest -q -p no:cacheprovider \
    --timeout 3600 "$@"
