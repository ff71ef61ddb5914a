#!/bin/sh
# Makes benchmarks/peers/.venv, in which both frameworks run; does nothing twice. Called by `make peers`.
# The pins are requirements/cpu.txt's, those of requirements.txt beside this file in place of the same packages there.
set -eu
cd "$(dirname "$0")"
own=$(sed -e 's/ *#.*//' -e '/^$/d' requirements.txt)
replaced=$(echo "$own" | sed 's/==.*//' | paste -sd'|' -)
pins="$own
$(grep -E '^[A-Za-z0-9]' ../../requirements/cpu.txt | grep -v -E "^($replaced)==")"
stamp=.venv/.installed-$(echo "$pins" | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0

python=${PYTHON:-python3}
[ -x ../../.venv/bin/python ] && python=../../.venv/bin/python # the interpreter that `make install` chose
"$python" -m venv --clear .venv
echo "$pins" >.venv/pins.txt
.venv/bin/pip install -q --no-deps -r .venv/pins.txt
.venv/bin/pip install -q --no-deps --no-build-isolation -e ../..
touch "$stamp"
