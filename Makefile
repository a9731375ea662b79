# One spelling per command, for people and CI alike. Each target works as the first command on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
# More arguments for pip, such as an index of CPU-only builds of torch.
PIP_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# ultralytics is AGPL-3.0. Its backends are tested and compared with the package in a folder of its own, which nothing
# but these two commands reads and no installation of the project brings; YOLO=no leaves both out.
YOLO ?= yes
YOLO_DIR := .venv-yolo
YOLO_INSTALLED := $(if $(filter no,$(YOLO)),,$(YOLO_DIR)/.installed)
WITH_YOLO := $(if $(YOLO_INSTALLED),PYTHONPATH=$(CURDIR)/$(YOLO_DIR))
BENCH_VENV ?= .venv-bench
BENCH_INSTALLED := $(BENCH_VENV)/.installed

IMAGE_TARGET ?= cpu

.PHONY: help image ray-two-nodes install demo test lint format protos fidelity batch-rate fidelity-short train-fidelity train-segnet bench bench-short bench-gpu soak clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

install: $(INSTALLED) ## Create .venv and install the project with its development tools

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vision-service needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev,fidelity]'
	@touch $@

# Only the two packages themselves: what they need is here, and they are not to change torch or OpenCV.
$(YOLO_DIR)/.installed: constraints.txt $(INSTALLED)
	rm -rf $(YOLO_DIR)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps --target $(YOLO_DIR) ultralytics ultralytics-thop
	@touch $@

demo: install ## Start a server, send samples/ through every task, write annotated pictures to demo-output/
	$(BIN)/python scripts/demo.py --output demo-output

test: install $(YOLO_INSTALLED) ## Lint, type-check, run all tests, those of ultralytics (AGPL-3.0) apart; YOLO=no leaves these out
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not yolo'
ifneq ($(YOLO),no)
	$(WITH_YOLO) $(BIN)/pytest -m yolo tests/contract tests/unit
endif

lint: install ## Lint and type-check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: install ## Generate vision_service/api from protos/
	$(BIN)/python scripts/generate_protos.py

fidelity: train-fidelity $(YOLO_INSTALLED) ## Compare with the reference implementations on ../shared and write docs/fidelity.md
	$(WITH_YOLO) $(BIN)/python scripts/fidelity.py

fidelity-short: install $(YOLO_INSTALLED) ## The same for fewer networks, in some minutes; writes nothing
	$(WITH_YOLO) $(BIN)/python scripts/fidelity.py --short

train-fidelity: install ## Train torchvision's networks on ../shared/data for `make fidelity`, 43 minutes of processor time, once
	$(BIN)/python scripts/train_fidelity.py

batch-rate: install ## Measure predict and client on 1000 images beside the pipeline, and their memory
	$(BIN)/python scripts/batch_rate.py

train-segnet: install ## Train SegNet on ../shared/data/isbi2012 for ten minutes and compare it with trivial answers
	$(BIN)/python scripts/train_segnet.py

bench: install $(BENCH_INSTALLED) ## Measure everything and write docs/performance.md (keep the machine quiet)
	$(BIN)/python benchmarks/run.py

bench-short: install $(BENCH_INSTALLED) ## A look at one model and its peers; writes nothing
	$(BIN)/python benchmarks/run.py --short

bench-gpu: install ## ResNet-50 fp16 on a GPU: network alone, pipeline, served
	$(BIN)/python benchmarks/gpu.py

soak: install ## Send 20,000 mixed images and watch the server's memory
	$(BIN)/python benchmarks/soak.py

# The peers' servers, in a place of their own that also sees what is installed in .venv.
$(BENCH_INSTALLED): $(INSTALLED) benchmarks/peers/requirements.txt
	test -x $(BENCH_VENV)/bin/python || $(BIN)/python -m venv $(BENCH_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(BENCH_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	$(BENCH_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -r benchmarks/peers/requirements.txt
	@touch $@

image: install ## Build docker/Dockerfile with buildah on a debootstrap base and run it (needs root)
	TARGET=$(IMAGE_TARGET) docker/build_and_run.sh

ray-two-nodes: install ## Run a job on a Ray of two nodes, kill one, compare with the same job without Ray
	$(BIN)/python scripts/ray_two_nodes.py

clean: ## Remove .venv and everything generated
	rm -rf $(VENV) $(YOLO_DIR) $(BENCH_VENV) dist build demo-output results .pytest_cache .mypy_cache .ruff_cache
