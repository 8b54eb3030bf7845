# The commands of the project. `make` alone lists them.
#
#   make test ARGS="tests/detrs -k dino"   run some of the tests
#   make test VENV=/tmp/environment        use another virtual environment
#   make parity GOLDEN=/path/to/goldens    compare with other golden values, in the format of tests/golden
#   make setup PYTHON=python3.12           use another interpreter
#   make gpu PYTHON=python3 OFFICIAL=DIR   use this Python as it is; DIR holds the source of the official kernel
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup     torch without CUDA, far smaller

VENV ?= .venv
PYTHON ?=
ARGS ?=
PORT ?= 5000
KILLS ?= 20
GOLDEN ?= tests/golden
OFFICIAL ?=

python := $(VENV)/bin/python
pip := $(python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# tests/conftest.py sets the number of processes; tests that share a Ray cluster run in the same one. In a debugger:
# ARGS="-n 0 ..."
pytest := $(python) -m pytest --numprocesses auto --dist loadgroup
operator := models/detrs/ops/_C.so
operator_files := $(wildcard $(addprefix csrc/,*.h *.inc *.cpp *.cuh *.cu */*.h */*.inc */*.cpp */*.cuh */*.cu))

# GOLDEN may hold only some of the values. The tests of the models find theirs; the others run if their file is there.
parity_tests := $(addprefix tests/detrs/test_,parity.py trajectories.py edge_goldens.py checkpoints.py) \
	$(if $(wildcard $(GOLDEN)/msda.json),tests/detrs/ops/test_reference.py) \
	$(if $(wildcard $(GOLDEN)/data.json),$(addprefix tests/raydetr/,data/transforms/test_transform.py shards/test_coco.py data/test_batch.py))

# The stamp is inside the environment, so that a new environment is set up from scratch. It names the clone: if two
# clones share an environment, the editable install is that of the clone that was set up last.
installed := $(VENV)/.raydetr-installed
ifneq ($(shell cat $(installed) 2>/dev/null),$(CURDIR))
if_of_another_clone := always
endif

# No usage statistics are sent.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help quickstart test test-slow parity setup fix check bench gpu chaos race ablation cluster-demo tune-demo docs-models docs-pictures ui clean always

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: setup ## generate data, train with two Ray workers, evaluate, log to MLflow
	$(python) jobs/quickstart.py $(ARGS)

test: setup ## run the tests
	$(pytest) $(ARGS)

test-slow: setup ## run the tests that take minutes each
	$(pytest) -m slow $(ARGS)

parity: setup ## compare with golden values of the official code, in tests/golden or GOLDEN=DIR
	@test -n '$(wildcard $(GOLDEN)/*.json)' || { echo "$(GOLDEN): holds no golden values: give their folder as GOLDEN=DIR" >&2; exit 1; }
	RAYDETR_GOLDEN='$(abspath $(GOLDEN))' $(python) -m pytest -m 'slow or not slow' $(parity_tests) $(ARGS)

setup: $(installed) $(operator) ## create the environment: pinned dependencies, and the built operator

fix: setup ## format the code, and fix what can be fixed automatically
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
	@$(clang_format) -i $(operator_files)

check: setup ## ruff, mypy --strict, clang-format
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy --strict -p raydetr -p detrs
	@$(clang_format) --dry-run -Werror $(operator_files)

bench: $(patsubst benchmarks/bench_%.py,bench-%,$(wildcard benchmarks/bench_*.py)) ## run benchmarks/bench_*.py; make bench-operator runs one

# Use the photographs of continuous integration, if this machine has them.
bench-%: export RAYDETR_COCO_TINY := $(or $(RAYDETR_COCO_TINY),$(abspath $(wildcard ../shared/coco_tiny)))
bench-%: setup
	$(python) benchmarks/bench_$*.py $(ARGS)

# Nothing is installed: it is for machines with a GPU and without network.
gpu: ## check and measure everything that needs a GPU, in nine minutes: build/gpu/report.md; PYTHON=python3
	$(or $(PYTHON),python3) benchmarks/gpu.py $(if $(OFFICIAL),--official '$(OFFICIAL)') $(ARGS)

chaos: setup ## kill and stop parts of a run at random, and compare it with an undisturbed one; KILLS=20
	$(python) benchmarks/chaos.py --kills $(KILLS) $(ARGS)

race: setup ## train the models of the five papers with one budget, and compare them
	$(python) benchmarks/race.py $(ARGS)

ablation: setup ## train them without one of their parts each: what is lost
	$(python) benchmarks/ablation.py $(ARGS)

cluster-demo: setup ## submit the quickstart to a local cluster that loses a node: the same AP
	$(python) benchmarks/cluster_demo.py

tune-demo: setup ## search the quickstart's hyperparameters, and count the epochs that ASHA saves; ARGS=--full
	$(python) benchmarks/tune_demo.py $(ARGS)

docs-models: setup ## count parameters and multiply-adds of all models, for the table in docs/models.md
	$(python) benchmarks/docs_models.py

docs-pictures: setup ## draw the pictures in docs/models.md, with the models of make race
	$(python) benchmarks/docs_pictures.py $(ARGS)

ui: setup ## show the runs in MLflow's web interface, on this machine only
	@test -f runs/mlflow.db || { echo "there is no run yet (no runs/mlflow.db): run make quickstart first" >&2; exit 1; }
	@echo "open http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(VENV)/bin/mlflow ui --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db

clean: ## remove everything that was built, and build/; keep the environment, runs/ and data/
	rm -rf build dist *.egg-info platform/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(operator) $(operator:.so=.sources)

# The environment's clang-format, or the system's; without one, csrc/ is skipped with a message.
clang_format = tool=$$(command -v $(VENV)/bin/clang-format || command -v clang-format) \
	|| { echo "clang-format is not installed: csrc/ was skipped"; exit 0; }; $$tool

$(installed): pyproject.toml constraints.txt $(if_of_another_clone)
	@command -v $${CXX:-c++} >/dev/null || { \
		echo "no C++ compiler found ($${CXX:-c++}); on Debian and Ubuntu: sudo apt install g++" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "creating $(VENV) with $$($$python --version)"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; test -x $(VENV)/bin/pip || { \
		echo "Python 3.11 or newer is needed, and $(or $(PYTHON),python3) is" \
			"$$($(or $(PYTHON),python3) --version 2>&1 | head -n 1): make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing torch, which the operator is compiled against"
	@$(pip) torch setuptools wheel
	@echo "installing the other dependencies and building the operator: the first time, this takes minutes"
	@$(pip) --no-build-isolation --editable '.[dev]'
	@echo '$(CURDIR)' > $@
	@echo 'done; `source $(VENV)/bin/activate` puts raydetr on the path'

# A change in csrc/ rebuilds only the operator.
$(operator): setup.py csrc/build.py $(operator_files) | $(installed)
	$(python) setup.py --quiet build_ext --inplace --force
	@touch $@
