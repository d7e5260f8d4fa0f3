# Every target makes the environment it needs. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO ?= build/demo
INSTALLED := $(VENV)/installed
MODEL := reference/model
NATIVE := $(wildcard src/fewbits/native/*.cpp src/fewbits/native/*.h)

.PHONY: demo test fuzz check fix bench interop torture sanitize reference-model clean

demo: $(INSTALLED)
	@$(BIN)/python reference/corpus.py heldout $(DEMO)/heldout.jsonl
	@$(BIN)/python reference/corpus.py train $(DEMO)/train.jsonl
	@$(BIN)/fewbits quantize $(MODEL) $(DEMO)/int8 --method int8
	@$(BIN)/fewbits quantize $(MODEL) $(DEMO)/int4 --method rtn --bits 4 --group-size 128
	@$(BIN)/fewbits quantize $(MODEL) $(DEMO)/gptq --method gptq --calibration $(DEMO)/train.jsonl --seq-len 256
	@$(BIN)/fewbits quantize $(MODEL) $(DEMO)/awq+gptq --method awq+gptq --calibration $(DEMO)/train.jsonl \
	  --seq-len 256
	@$(BIN)/fewbits evaluate $(MODEL) $(DEMO)/int8 $(DEMO)/int4 $(DEMO)/gptq $(DEMO)/awq+gptq \
	  --reference $(MODEL) --text $(DEMO)/heldout.jsonl --limit 80 --speed
	@echo; echo "The 4-bit model goes on from 'def read_file(path):'"; echo
	@$(BIN)/fewbits generate $(DEMO)/gptq "def read_file(path):" --max-new-tokens 96 --temperature 0.7

# A process per core, each on one thread: most models of the tests are too small for two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

# A thousand inputs for every reader of files; a number in FEWBITS_SEED gives others.
fuzz: $(INSTALLED)
	FEWBITS_FUZZ=1000 $(BIN)/python -m pytest -q tests/hostile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Nothing else may run on the machine.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/linears.py

# What other people's clients make of our checkpoints, each in an environment of its own; it is built by
# the first run, which takes half an hour on two cores.
interop: $(INSTALLED)
	PYTHON=$(PYTHON) $(BIN)/python tests/interop/run.py

# Runs that are killed, and disks that fail, at hundreds of moments; a link that is cut, where `ip` can
# make one. Under 25 minutes on two cores.
torture: $(INSTALLED)
	$(BIN)/python tests/torture/run.py
	$(BIN)/python tests/torture/link.py

# The native kernels: bytes and numbers that are out of bounds; then what threads share. Needs cmake.
sanitize:
	cmake -S . -B build/sanitize -DFEWBITS_SANITIZE=address,undefined >/dev/null
	cmake --build build/sanitize -j >/dev/null
	build/sanitize/sanitize 500
	cmake -S . -B build/sanitize-threads -DFEWBITS_SANITIZE=thread >/dev/null
	cmake --build build/sanitize-threads -j >/dev/null
	build/sanitize-threads/sanitize 100

# About an hour on two cores. The settings keep malloc from returning pages to the system all the time.
reference-model: $(INSTALLED)
	MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \
	MALLOC_TOP_PAD_=500000000 $(BIN)/python reference/train.py build/reference-model

clean:
	rm -rf build $(VENV)

# torch first: an open range would fetch gigabytes of CUDA packages on a machine without a GPU.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy
	$(PIP) install -q -c constraints.txt -e '.[test,check]'
	@touch $@
