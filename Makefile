# Each target makes its own virtual environment on first use. PYTHON chooses the interpreter that it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The extra "sanitize": it asks for a newer Python than it needs, and for nothing that is not here already.
TTSEM := $(shell grep -o 'ttsem==[0-9.]*' pyproject.toml)

# Hundreds of processes that the tests start import the package. Where the environment forbids bytecode, each would compile it.
export PYTHONDONTWRITEBYTECODE :=
# NumPy multiplies the tiles of interpreted kernels. With these kernels of OpenBLAS, which every x86 has, an element is
# rounded alike wherever it stands in the product, as in a GPU's matrix unit; with those for some newer CPUs it is not.
test test-fast test-cpu test-interpreter: export OPENBLAS_CORETYPE := Prescott

.PHONY: help docs train train-shapes test test-fast test-cpu test-interpreter bench gpu lint fmt clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[data,eval,train]'
	@touch $@

$(VENV)/test: $(VENV)/base
	$(BIN)/pip install --quiet --editable '.[data,eval,probe,train,bench,test,lint]'
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python $(TTSEM)
	@touch $@

# Threads that wait must not spin: the data worker needs the core.
train: $(VENV)/base  ## Train a CLIP on the bundled emoji, and see what it recognises (about 9 minutes on two cores)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/clipfast train --recipe emoji

train-shapes: $(VENV)/base  ## Train a CLIP on drawn shapes, and see which compositions it can tell apart (5 minutes on two cores)
	run=shapes-$$(date +%Y_%m_%d-%H_%M_%S) && OMP_WAIT_POLICY=PASSIVE $(BIN)/clipfast train --recipe shapes --name $$run && \
	$(BIN)/clipfast eval compositional --model local-dir:runs/$$run --data shapes --table --json runs/$$run/shapes.json \
		--html runs/$$run/shapes.html --plot runs/$$run/shapes.png

# Tests wait for processes and for the disk now and then: two cores are kept busy by three workers, and by interpreted
# kernels, which wait for nothing and take the time that the others leave.
WORKERS ?= 3
test: $(VENV)/test  ## Run every test that needs no GPU (about 15 minutes on two cores)
	@mkdir -p build; nice -n 5 $(MAKE) test-interpreter WORKERS=2 >build/test-interpreter.log 2>&1 & interpreter=$$!; code=0; \
	$(MAKE) test-cpu || code=$$?; wait $$interpreter || code=$$?; cat build/test-interpreter.log; exit $$code

test-fast: $(VENV)/test  ## Run what takes no minute of its own: 4 to 6 minutes, for every edit
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n $(WORKERS) --dist worksteal --fast tests
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --fast tests/kernels

test-cpu: $(VENV)/test  ## CPU paths, ttsem, offline compilation, model layer, training
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n $(WORKERS) --dist worksteal tests

test-interpreter: $(VENV)/test  ## The Triton kernels, interpreted
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal tests/kernels

bench: $(VENV)/test  ## Time everything on this machine, against whatever else is installed
	$(BIN)/python -m bench all

# On a bare GPU machine: nothing is installed, the packages are linked into build/site. GPU_PYTHON has PyTorch and Triton.
GPU_PYTHON ?= python3
GPU_OUT ?= runs/gpu
gpu:  ## Tests, timings, numerics, tuning and sanitizer on a GPU, in an hour; STUB=1 rehearses it without one
	$(GPU_PYTHON) -m bench.gpu --out $(GPU_OUT) $(if $(STUB),--stub)

gpu-%:  ## A part of it in ten minutes: gpu-first, gpu-speed, gpu-checks, gpu-tune, gpu-loss, gpu-attention, ...
	$(GPU_PYTHON) -m bench.gpu --part $* --out $(GPU_OUT) $(if $(STUB),--stub)

# mypy sees the packages as they are installed: kernels/ and bench/ inside clipfast/.
lint: $(VENV)/test  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lint && mkdir -p build/lint/clipfast
	@ln -sfn $(CURDIR)/clipfast/* $(CURDIR)/kernels $(CURDIR)/bench build/lint/clipfast/
	cd build/lint && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p clipfast

fmt: $(VENV)/test  ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/docs: $(VENV)/base
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

# In build/docs, the pages of the checkout and of docs/ lie beside each other. pdoc leaves out modules behind an "!".
docs: $(VENV)/docs  ## Write the pages and an API reference to build/site/index.html
	@rm -rf build/docs build/site && mkdir -p build/docs && cp -r docs/* build/docs
	@cp CHANGELOG.md CONTRIBUTING.md build/docs && cp README.md build/docs/index.md
	@echo '[API reference](api/clipfast.html)' >> build/docs/index.md
	@sed -i -E 's#\]\(docs/#](#g; s#\]\(\.\./(CHANGELOG|CONTRIBUTING)#](\1#g; s#\]\(\.\./README#](index#g' build/docs/*.md
	$(BIN)/mkdocs build --quiet
	$(BIN)/pdoc --docformat google --no-show-source --output-directory build/site/api clipfast '!clipfast\.' clipfast.kernels

clean:  ## Remove environments and build products
	rm -rf $(VENV) build *.egg-info
