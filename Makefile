# make demo     install, then the main job on the built-in data
# make test     install, then the tests      (make test ARGS="-k nullspace")
# make test-originals  the classification path on OpenMMLab's own mmengine,
#               mmcv and mmpretrain, in .venv-originals; runs of one stack are
#               resumed on the other
# make audit    look for known vulnerabilities in .venv (needs the network)
# make install  only the virtual environment .venv
# make evidence-quick  methods on a clean and a planted teacher (docs/evidence.md)
# make benchmark  what a step costs, ViT-L -> ViT-T, as docs/cost.md has it
# make teacher  train the demo's teacher anew
# make clean    remove what builds and tests leave
#
# For a GPU, name the torch that fits it once; it is kept from then on:
#   make install TORCH="torch torchvision --index-url URL"

PYTHON ?= python3
TORCH ?= torch==2.13.0 torchvision==0.28.0
EXTRAS := onedl,test,demo,reproduce,onnx

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Holds the process that makes the environment, from before it is made until
# all is installed: where the process is gone, it was interrupted, and all
# starts anew. An environment that was not made here is only added to.
UNFINISHED := $(VENV)/.unfinished

# OneDL's and OpenMMLab's packages write the same folders: never in one place
ORIGINALS := .venv-originals
ORIGINALS_TESTS := tests/test_kept_runs.py tests/test_properties.py \
    tests/test_checkpoint.py $(addprefix tests/test_models/test_, \
    losses.py refine.py singer_adapter.py target_filter.py target_norm.py \
    targets.py tokens.py weights.py)
AUDIT := .venv-audit

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.PHONY: help install test test-originals audit demo evidence-quick \
    benchmark teacher clean FORCE

help:
	@sed -n '/^# make/,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

ifneq ($(origin TORCH),file)
$(STAMP): FORCE
endif

$(STAMP): setup.py pyproject.toml
	@if kill -0 "$$(cat $(UNFINISHED) 2> /dev/null)" 2> /dev/null; then \
	    echo "Process $$(cat $(UNFINISHED)) is installing into $(VENV): let" \
	         "it finish first. If it is no make, remove $(VENV)." >&2; \
	    exit 1; \
	fi
	@if [ -e $(UNFINISHED) ] || \
	    { [ -e $(VENV) ] && ! $(BIN)/python -c '' 2> /dev/null; }; then \
	    echo "== $(VENV) is incomplete (interrupted?): making it anew"; \
	    echo $$PPID > $(UNFINISHED); \
	    find $(VENV) -mindepth 1 ! -path $(UNFINISHED) -delete; \
	fi
	@[ -e $(BIN)/python ] || \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is missing or older than 3.10, which the OneDL" \
	         "packages need. Name another: make install PYTHON=python3.11" \
	         >&2; exit 1; }
	@if [ ! -e $(BIN)/python ]; then \
	    echo "== Making the virtual environment $(VENV)"; \
	    mkdir -p $(VENV) && echo $$PPID > $(UNFINISHED) && \
	    $(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || \
	    $(BIN)/python -m ensurepip
	@if [ '$(origin TORCH)' = file ] && \
	    $(BIN)/python -m pip show -qq torchvision; then \
	    echo "== 1 of 2: torch and torchvision are there, and are kept"; \
	else \
	    echo "== 1 of 2: $(TORCH)"; \
	    $(BIN)/python -m pip install $(foreach word,$(TORCH),'$(word)'); \
	fi
	@echo "== 2 of 2: mmsinger[$(EXTRAS)]" \
	    "(building onedl-mmcv is quiet for a minute or two)"
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]'
	$(BIN)/python tools/check_env.py
	@rm -f $(UNFINISHED)
	@touch $@

test: install
	$(BIN)/python -m pytest $(ARGS)

# A folder without its stamp was interrupted: it is made anew.
$(ORIGINALS)/.installed: setup.py pyproject.toml
	@echo "== Making the virtual environment $(ORIGINALS)"
	rm -rf $(ORIGINALS)
	$(PYTHON) -m venv $(ORIGINALS)
	$(ORIGINALS)/bin/python -m pip install -q \
	    $(foreach word,$(TORCH),'$(word)')
	$(ORIGINALS)/bin/python -m pip install -q -e '.[openmmlab-cls,test]'
	$(ORIGINALS)/bin/python tools/check_env.py
	@touch $@

test-originals: install $(ORIGINALS)/.installed
	$(ORIGINALS)/bin/python -m pytest -k 'not mmseg' $(ORIGINALS_TESTS)
	rm -rf $(ORIGINALS)/originals
	$(ORIGINALS)/bin/python tests/keep_run.py $(ORIGINALS)/originals
	$(BIN)/python -m pytest tests/test_kept_runs.py -k originals \
	    --kept-run $(ORIGINALS)/originals

audit: install
	@[ -e $(AUDIT)/bin/pip-audit ] || { rm -rf $(AUDIT) && \
	    $(PYTHON) -m venv $(AUDIT) && \
	    $(AUDIT)/bin/python -m pip install -q pip-audit; }
	$(BIN)/python .ci/audit $(AUDIT) --of $(VENV)

demo: install
	$(BIN)/python tools/demo.py $(ARGS)

evidence-quick: install
	$(BIN)/python tools/reproduce.py evidence_quick --profile digits --seeds 3 $(ARGS)

benchmark: install
	$(BIN)/python tools/benchmark_step.py --precision fast \
	    --teacher vit_l16 --student vit_t16 --batch-size 4 --size 224 \
	    --out docs/benchmarks/step_vitl_vitt.json $(ARGS)

# Writes the teacher that ships in mmsinger/assets.
teacher: install
	$(BIN)/python tools/make_digit_scenes.py
	$(BIN)/python tools/train.py configs/demo/digits_teacher.py $(ARGS)
	$(BIN)/python tools/publish_teacher.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .coverage
	find configs mmsinger tests tools -name __pycache__ -prune \
	    -exec rm -rf {} +
