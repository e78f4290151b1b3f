# make demo      teach the demo model a concept it has never seen (a few minutes on a laptop CPU)
# make test      ruff, pyright and pytest, as CI runs them; inside ComfyUI too where there is a checkout of it, and on a
#                pretend CUDA device where there is a C++ compiler
# make test-all        the same with every variant and every mode of that device, in four times the time; before a release
# make test-cuda       the part on the pretend device alone
# make test-cuda-all   the same and then all tests inside ComfyUI in all its modes, for hours: the tables of docs/reliability.md
# make browser   install chromium for the tests of the page (Debian and Ubuntu, as root)
# All but the browser make .venv on the first run. PYTHON=python3.12 chooses the interpreter, PIP_ARGS="..." is given to pip install,
# COMFYUI_PATH=... says where ComfyUI is (~/comfy/ComfyUI if not set).

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DEMO_ARGS ?=
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
export COMFYUI_PATH
unexport PYTHONDONTWRITEBYTECODE
RUN = $(VENV)/bin/python

# Of ComfyUI's requirements: torch is ours, its two companions are in requirements-comfyui.txt, and the server does without the rest
# (360 MB of templates, pictures and drivers).
LEFT_OUT = torch|torchvision|torchaudio|spandrel|comfyui-workflow-templates|comfyui-embedded-docs|comfy-angle|PyOpenGL

# Python compiles what it imports, once, and keeps it; all of transformers would take a third of the installation.
INSTALL = $(RUN) -m pip install --only-binary=:all: --no-compile $(PIP_ARGS)

.PHONY: help demo test test-all test-core test-comfyui lint comfyui browser clean test-comfyui-a-k test-comfyui-l-r test-comfyui-s-z
.PHONY: test-cuda test-cuda-parts test-cuda-all cuda-device
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | sed '/^Of ComfyUI/,$$d'

demo: $(VENV)/.standalone
	$(RUN) -m dopsd_core demo $(DEMO_ARGS)

# Side by side: each part keeps to one core.
SIDE_BY_SIDE = $(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

test: comfyui
	$(SIDE_BY_SIDE) lint test-core test-comfyui $(CUDA_OFTEN)

test-all: comfyui
	$(SIDE_BY_SIDE) WHICH='-m "long or not long"' lint test-core test-comfyui test-cuda-parts

test-core:
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(WHICH)

COMFYUI_PARTS = test-comfyui-a-k test-comfyui-l-r test-comfyui-s-z

test-comfyui: $(COMFYUI_PARTS)

$(COMFYUI_PARTS): test-comfyui-%:
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(WHICH) tests/comfyui/test_[$*]*.py

CUDA = PYTHONPATH=tests $(RUN) -m pretend_cuda
# Without ComfyUI the core alone has a device; `make comfyui` has said so.
CUDA_IN_COMFYUI = dynamic classic novram lowvram highvram dynamic-turing classic-turing
cuda_parts = $(addprefix test-cuda-,$(1) $(if $(wildcard $(COMFYUI_PATH)/main.py),$(2)))
CUDA_PARTS = $(call cuda_parts,core,$(CUDA_IN_COMFYUI))
CUDA_OFTEN = $(call cuda_parts,core-central,dynamic-central)

.PHONY: $(CUDA_PARTS) $(CUDA_OFTEN)

test-cuda: comfyui
	$(SIDE_BY_SIDE) test-cuda-parts

test-cuda-parts: $(CUDA_PARTS)

$(sort $(CUDA_PARTS) $(CUDA_OFTEN)): test-cuda-%: cuda-device
	$(CUDA) part $* -q

cuda-device: $(VENV)/.dev
	@$(CUDA).build

test-cuda-all: comfyui cuda-device
	$(RUN) -m benchmarks.pretend_cuda_table --parts
	$(RUN) -m benchmarks.pretend_cuda_table

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

ifneq ($(wildcard $(COMFYUI_PATH)/main.py),)
comfyui: $(VENV)/.comfyui
else
comfyui: $(VENV)/.dev
	@echo "NO COMFYUI at $(COMFYUI_PATH): the pack will not be tested inside it, on a pretend CUDA device neither (set COMFYUI_PATH to a checkout)"
endif

browser:
	@if which chromium chromium-browser google-chrome 2>/dev/null | grep -q .; then echo "chromium is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; \
	then echo "chromium was installed"; \
	else echo "NO CHROMIUM and no way to install it here: the page will not be tested"; fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit('Python 3.10 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.standalone: requirements-standalone.txt | $(VENV)/.python
	$(INSTALL) -r requirements-standalone.txt
	touch $@

# torch-fidelity brings a package named tests, which would hide ours.
$(VENV)/.dev: requirements-dev.txt requirements-metrics.txt $(VENV)/.standalone
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps -r requirements-metrics.txt
	rm -rf $(VENV)/lib/python*/site-packages/tests
	touch $@

# Another checkout may need other versions.
$(VENV)/comfyui.txt: FORCE | $(VENV)/.dev
	@grep -v -i -E '^($(LEFT_OUT))([^a-z-]|$$)' $(COMFYUI_PATH)/requirements.txt > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

FORCE:

$(VENV)/.comfyui: requirements-comfyui.txt $(VENV)/.dev $(VENV)/comfyui.txt
	$(INSTALL) -c requirements-standalone.txt -c requirements-dev.txt -r $(VENV)/comfyui.txt
	$(INSTALL) --no-deps -r requirements-comfyui.txt
	rm -f $(VENV)/lib/python*/site-packages/torchaudio/lib/*.so
	touch $@
