# The index of commands: `make` alone prints it.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
PIP_ARGS ?=
CHAOS_KILLS ?= 200
FUZZ_SECONDS ?= 600
FUZZ ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CONSTRAINTS := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --no-warn-script-location $(PIP_ARGS)
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
HAS_TORCH := import sys, torch; sys.exit(tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11))

.PHONY: help setup demo demo-occupancy test test-compat lint format bench bench-gpu chaos fuzz sanitize clean
.DELETE_ON_ERROR:
# Two pips at work in one environment break it.
.NOTPARALLEL:

help:
	@echo "make demo     distil a teacher of handwritten digits and write runs/demo/report.html"
	@echo "make demo-occupancy"
	@echo "              the same for forecasts of occupancy, on a toy world: runs/occfm-toy/report.html"
	@echo "make setup    only install the package into $(VENV), with what the demo needs"
	@echo "make test     run the tests, with coverage"
	@echo "make test-compat  the tests of SANA, SD3, Flux and LoRA files with the oldest and the newest diffusers that"
	@echo "              pyproject.toml declares, in environments of their own over $(VENV)"
	@echo "make lint     check style (ruff) and types (mypy on the installed package)"
	@echo "make format   rewrite the sources in the house style"
	@echo "make bench    check, then time this package and its peers; table, JSON and figures in benchmarks/results/"
	@echo "make bench-gpu  the same on a CUDA device, with SANA-1.6B-shaped and occupancy-shaped networks"
	@echo "make chaos    kill trainings at random moments, CHAOS_KILLS=200 of them, and compare what comes out"
	@echo "make fuzz     spoilt inputs for every parser, FUZZ_SECONDS=600 each; FUZZ='--engine atheris npz' to choose"
	@echo "make sanitize run the tests of the C++ core with address and undefined-behaviour sanitizers"
	@echo "make clean    remove what was built; keeps runs/ and $(VENV)"
	@echo
	@echo "Choices:  PYTHON=python3.12             the Python to make $(VENV) with"
	@echo "          VENV=.venv-312                another folder for the environment"
	@echo "          TORCH='torch==2.11.0'         a torch of your own choice; otherwise one that PYTHON has"
	@echo "                                        is reused, or the version in constraints.txt installed"
	@echo "          QUICK=1                       make bench in a few minutes: two draws in place of eight"
	@echo "          PIP_ARGS='--extra-index-url URL'"
	@echo "                                        passed to every pip install"

setup: $(STAMPS)/demo

demo: $(STAMPS)/demo
	@$(BIN)/mfd-fast demo

TOY := runs/occupancy-toy
TOY_LABELS := $(TOY)/released/data/nuscenes/gts

demo-occupancy: $(STAMPS)/demo $(TOY)/training/index.json $(TOY)/validation/index.json
	@$(BIN)/mfd-fast demo --preset occfm-toy --set data.root=$(TOY) --set evaluate.labels=$(TOY_LABELS)

$(TOY)/released: | $(STAMPS)/demo
	@$(BIN)/mfd-fast make-occupancy-toy $@

$(TOY)/%/index.json: | $(TOY)/released
	@$(BIN)/mfd-fast convert-occfm $(TOY)/released/nus_sem_occ_$*.pkl \
		--infos $(TOY)/released/nuscenes_infos_$*.pkl --out $(@D)

test: $(STAMPS)/test
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --cov --cov-report term

# What touches diffusers, transformers or peft. Each environment lies over $(VENV), whose torch it uses.
COMPAT_TESTS := tests/models/test_sana.py tests/models/test_sana_peft.py tests/models/test_sd3_flux.py \
	tests/models/test_diffusers_lora.py tests/test_pipelines.py tests/data/test_prompts.py tests/cli/test_sana.py \
	tests/cli/test_export.py

test-compat: compat-oldest compat-newest

compat-%: $(STAMPS)/test
	@echo "making $(VENV)-compat-$*"
	@$(BIN)/python -m venv --clear $(VENV)-compat-$* \
		$$(grep -qi 'include-system-site-packages = true' $(VENV)/pyvenv.cfg && echo --system-site-packages)
	@below=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		own=$$($(VENV)-compat-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		echo "import site; site.addsitedir('$$below')" > "$$own/below.pth"
	@$(BIN)/python tests/compat/requirements.py $* > $(VENV)-compat-$*/requirements.txt
	@$(VENV)-compat-$*/bin/python -m pip --disable-pip-version-check --no-input install --quiet --upgrade \
		--no-warn-script-location $(PIP_ARGS) --constraint $(CONSTRAINTS) \
		--requirement $(VENV)-compat-$*/requirements.txt
	@$(VENV)-compat-$*/bin/python -c 'from importlib.metadata import version; \
		print("testing with", ", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers", "peft", "torch")))'
	@OMP_NUM_THREADS=1 $(VENV)-compat-$*/bin/python $(BIN)/pytest -p no:cacheprovider $(COMPAT_TESTS)

lint: $(STAMPS)/lint
	@echo "ruff"
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --quiet --check . || { echo "not formatted; run: make format"; exit 1; }
	@echo "mypy, on the installed package"
	@rm -rf build $(VENV)/installed
	@$(INSTALL) --no-deps --no-build-isolation --target $(VENV)/installed .
	@rm -rf build
	@cd $(VENV)/installed && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" --package mfd_fast

format: $(STAMPS)/lint
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@if command -v clang-format >/dev/null; then clang-format -i csrc/*.cpp csrc/*.hpp; fi

bench: $(STAMPS)/bench
	@OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks --benchmark-enable --benchmark-only --benchmark-timer time.process_time \
		--benchmark-json benchmarks/results/cpu.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compare.py $(if $(QUICK),--quick)

bench-gpu: $(STAMPS)/bench
	@$(BIN)/python benchmarks/gpu_compare.py

chaos: $(STAMPS)/test
	@OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/chaos.py --kills $(CHAOS_KILLS)

fuzz: $(STAMPS)/test
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ)

sanitize: $(STAMPS)/test
	@$(BIN)/python tests/sanitize/run.py

clean:
	@rm -rf build dist *.egg-info mfd_fast/_core.*.so .coverage .coverage.* .hypothesis .benchmarks
	@rm -rf .mypy_cache .pytest_cache .ruff_cache $(VENV)/installed $(VENV)-compat-oldest $(VENV)-compat-newest
	@rm -f $(STAMPS)/demo $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/bench
	@find mfd_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last: a set-up that failed or was interrupted starts again.
# Another TORCH than the one asked for before is installed over it; another PYTHON needs another environment.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(STAMPS)/torch 2>/dev/null))
.PHONY: $(STAMPS)/torch
endif
endif
ifneq ($(origin PYTHON),file)
ifeq ($(filter $(PYTHON),$(or $(shell cat $(STAMPS)/python 2>/dev/null),$(PYTHON))),)
$(error $(VENV) was made with $(shell cat $(STAMPS)/python); add VENV=.venv-other for another Python, or remove $(VENV))
endif
endif

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is not Python 3.10 or later; choose another: make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
			echo "$(PYTHON) cannot make environments: its modules venv and ensurepip are missing"; \
			echo "(Debian, Ubuntu: apt install python3-venv), or choose another: make PYTHON=python3.12"; \
			exit 1; }; \
		if [ -z '$(TORCH)' ] && $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
			echo "making $(VENV), which sees the torch of $(PYTHON)"; \
			$(PYTHON) -m venv --clear --system-site-packages $(VENV); \
		else \
			echo "making $(VENV)"; \
			$(PYTHON) -m venv --clear $(VENV); \
		fi; }
	@mkdir -p $(STAMPS)
	@echo '$(PYTHON)' > $@

$(STAMPS)/torch: constraints.txt $(STAMPS)/python
	@rm -f $@
	@if [ -n '$(TORCH)' ]; then \
		echo "installing $(TORCH)"; \
		$(INSTALL) '$(TORCH)'; \
	elif ! $(BIN)/python -W ignore -c '$(HAS_TORCH)' 2>/dev/null; then \
		echo "installing torch, as constraints.txt says (a large download)"; \
		$(INSTALL) --constraint constraints.txt torch; \
	fi
	@$(BIN)/python -W ignore -c '$(HAS_TORCH)' || { echo "$(VENV) has no torch 2.11 or later"; exit 1; }
	@# Whichever torch it is, nothing installed later may replace it.
	@grep -v '^torch==' constraints.txt > $(CONSTRAINTS)
	@$(BIN)/python -W ignore -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >> $(CONSTRAINTS)
	@echo "using $$(tail -n 1 $(CONSTRAINTS))"
	@echo '$(TORCH)' > $@

$(STAMPS)/demo $(STAMPS)/test: $(STAMPS)/torch $(BUILD_FILES)
	@echo "installing mfd_fast[$(@F)]"
	@$(INSTALL) --constraint $(CONSTRAINTS) --editable '.[$(@F)]'
	@$(BIN)/python -W ignore -c 'from mfd_fast.native import why_no_core as why; \
		print("compiled core:", "not built; to see why: pip install --verbose ." if why() else "built")'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/test
	@echo "installing the libraries to compare with"
	@$(INSTALL) --constraint $(CONSTRAINTS) --editable '.[peers]'
	@touch $@

$(STAMPS)/lint: $(STAMPS)/test
	@echo "installing ruff and mypy"
	@$(INSTALL) --constraint $(CONSTRAINTS) ruff mypy
	@touch $@
