# Every target prepares what it needs: a virtual environment, PyTorch, the compiled extension.
#   make demo | test | budgets | ptx-tests | bench | gpu | sanitize | report | wheel | test-wheel | compile-tests | lint
# Variables:
#   TRANSFORMERS=5.17.0   another transformers release, or newest (in an environment of its own)
#   TESTS="tests/..."     what `make test` runs;  PYTEST_ARGS="-k ..."  passed on
#   CAPABILITY=9.0        what `make ptx-tests` and `make compile-tests` compile the kernels for
#   GPU_MINUTES=9  PARTS="test attention"   time and parts of `make gpu`

PYTHON ?= python3
TRANSFORMERS ?=
TESTS ?= tests
PYTEST_ARGS ?=
GPU_MINUTES ?= 9
PARTS ?=
CAPABILITY ?= 9.0
VENV ?= .venv$(if $(TRANSFORMERS),-transformers-$(TRANSFORMERS))
RUN = $(VENV)/bin/python

.PHONY: help prepare demo test budgets ptx-tests bench gpu sanitize report wheel test-wheel compile-tests lint clean

help:
	@sed -n '2,8s/^# *//p' Makefile

prepare:
	@$(PYTHON) tools/prepare.py --venv $(VENV) $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS))

demo: prepare
	@$(RUN) examples/demo.py
	@echo "== a masked diffusion model, every sampler: exact match and evaluations per answer"
	@$(RUN) examples/tiny-masked/evaluate.py --prompts 50

BUDGETS = tests/test_compile_budgets.py tests/test_triton_compiled.py tests/test_cuda_budgets.py

# Two workers with one thread each use two cores better than one process with two threads does.
test: prepare
	@echo "== tests: $(TESTS)$(if $(filter tests,$(TESTS)), but for those of make budgets)"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 $(TESTS) \
		$(if $(filter tests,$(TESTS)),$(addprefix --ignore=,$(BUDGETS))) $(PYTEST_ARGS)

# As long as all other tests together: every Triton kernel, compiled for six architectures, two at a time, and what is in `_C`.
budgets: prepare
	@echo "== compile budgets of the kernels"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(BUDGETS) $(PYTEST_ARGS)

# What the compilers make of the kernels, carried out on the host: Triton's, and nvcc's where there is one.
PTX_TESTS ?= tests/test_ptx_traffic.py tests/test_ptx_inductor.py $(filter-out %_compiled.py, $(wildcard tests/test_triton_*.py)) \
	$(wildcard tests/test_cuda_block_attention*.py) $(patsubst %, tests/test_cuda_%.py, experts soft_embedding generate) \
	$(patsubst %, tests/test_%.py, row_stats top_k_top_p commit progress block_attention head_stats soft_embedding experts experts_nvfp4 feed_forward quantize_rows)
PTX_KEYS ?= triton or cuda or traffic or inductor

ptx-tests: prepare
	@echo "== the compiled kernels for $(CAPABILITY), carried out on the host"
	@DGEMMA_ACCEL_TEST_PTX=$(CAPABILITY) DGEMMA_ACCEL_TEST_CUDA_PTX=$(CAPABILITY) OMP_NUM_THREADS=1 \
		$(RUN) -m pytest -q -n 2 --durations 10 $(PTX_TESTS) -k "$(PTX_KEYS)" $(PYTEST_ARGS)

bench: prepare
	@$(RUN) -m bench

gpu:
	@$(PYTHON) -m bench gpu --minutes $(GPU_MINUTES) $(if $(PARTS),--parts $(PARTS))

sanitize:
	@$(PYTHON) -m bench sanitize

report: prepare
	@$(RUN) -m bench report

# In an environment of its own, which needs no PyTorch.
wheel:
	@$(PYTHON) tools/prepare.py --venv $(VENV)-wheel --for-wheel
	@$(VENV)-wheel/bin/python tools/wheel.py

test-wheel: wheel
	@$(VENV)-wheel/bin/python tools/test_wheel.py

compile-tests: prepare
	@OMP_NUM_THREADS=1 $(RUN) -W ignore tools/compile_tests.py $(CAPABILITY)

lint: prepare
	@$(RUN) -m pip install --quiet --disable-pip-version-check ruff
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

clean:
	rm -rf build dist *.egg-info dgemma_accel/_C*.so .venv*/.ready
