# modeltorch: `make demo` and `make test` set everything up in .venv and need nothing done by hand before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py

# The Ascend path without an NPU: real torch_npu on stand-ins for the driver and for the vendor's operations.
ASCEND_VENV := .venv-ascend
ASCEND_BIN := $(ASCEND_VENV)/bin
ASCEND_HOST := $(CURDIR)/build/ascend_host
ASCEND_ENV := ASCEND_HOST=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 ATB_HOME_PATH=$(ASCEND_HOST) \
    LD_LIBRARY_PATH=$(ASCEND_HOST)/lib
ASCEND_TEST := $(ASCEND_BIN)/pytest
ASCEND_TESTS := tests/ascend_host
# What every way to launch runs; the first one runs everything.
ASCEND_LAUNCH_TESTS := $(foreach name,model streams waits faults front_end,$(ASCEND_TESTS)/test_$(name).py)

.PHONY: demo test test-all test-cpp test-ascend sanitize kernels lint format clean

demo: $(VENV)/.built  ## answer prompts with the bundled checkpoint
	$(BIN)/modeltorch generate --prompt "345+678=" --prompt "12-345=" --prompt "sort 31 4 15 926 5=" \
	    --prompt "max 271 828 182=" --prompt "reverse 1 2 3="

test: $(VENV)/.built test-cpp  ## the tests: C++ without torch, then Python
	$(BIN)/python -m pytest

ASK_LEVEL := import modeltorch, torch; torch.ops.ModelTorch.cpu_level()
test-all: $(VENV)/.built sanitize  ## the long runs: ten times the random cases, every processor level
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest
	@for level in generic avx2 avx512; do \
	  if MODELTORCH_CPU_LEVEL=$$level $(BIN)/python -c "$(ASK_LEVEL)" 2>/dev/null; then \
	    echo "== level $$level"; MODELTORCH_CPU_LEVEL=$$level $(BIN)/python -m pytest || exit 1; \
	  else echo "*** SKIPPED, NOT TESTED: this processor lacks the level $$level ***"; fi; done

test-cpp: $(VENV)/.installed
	PYTHON=$(BIN)/python tests/cpp/run.sh plain

test-ascend: $(ASCEND_VENV)/.built  ## device npu without an NPU, in every way to launch and on an older chip
	env $(ASCEND_ENV) ATB_OPERATION_EXECUTE_ASYNC=1 $(ASCEND_TEST) $(ASCEND_TESTS)
	@for mode in ATB_OPERATION_EXECUTE_ASYNC=0 ATB_OPERATION_EXECUTE_ASYNC=2 TASK_QUEUE_ENABLE=0 \
	    ASCEND_LAUNCH_BLOCKING=1 "ATB_OPERATION_EXECUTE_ASYNC=2 PER_STREAM_QUEUE=1" \
	    "ASCEND_HOST_SOC=Ascend310P3 ATB_OPERATION_EXECUTE_ASYNC=0" \
	    "ASCEND_HOST_SOC=Ascend310P3 ATB_OPERATION_EXECUTE_ASYNC=2"; do \
	  case $$mode in *310P*) chip="$(ASCEND_TESTS)/test_operations_alone.py $(ASCEND_TESTS)/test_caches.py";; \
	    *) chip=;; esac; \
	  echo "== $$mode"; env $(ASCEND_ENV) ASCEND_HOST_FEW=1 $$mode $(ASCEND_TEST) $(ASCEND_LAUNCH_TESTS) $$chip \
	    || exit 1; done

sanitize: $(VENV)/.installed  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PYTHON=$(BIN)/python tests/cpp/run.sh sanitize

# One object for each target, so that a target that does not compile is named. That of sm_80 holds PTX too, which later
# cards compile for themselves.
KERNELS := $(shell find csrc -name '*.cu')
KERNEL_TARGETS := sm_80 sm_90a
KERNEL_OBJECTS := $(foreach target,$(KERNEL_TARGETS),$(KERNELS:%.cu=build/kernels/$(target)/%.o))
ARCH_sm_80 := arch=compute_80,code=[sm_80,compute_80]
ARCH_sm_90a := arch=compute_90a,code=sm_90a

kernels:  ## compile every CUDA kernel where nvcc is present; they run only on a machine with a GPU
	@if ! command -v nvcc >/dev/null; then echo "no nvcc here: CUDA kernels were not compiled"; \
	else $(MAKE) --no-print-directory -j2 $(KERNEL_OBJECTS) && \
	echo "compiled $(words $(KERNELS)) CUDA files for $(KERNEL_TARGETS) and as PTX;" \
	    "THEY WERE NOT RUN: tools/gpu_check.sh does that"; fi

# nvcc's own list of what a file includes decides what is compiled again.
define kernel_rule
build/kernels/$(1)/%.o: %.cu
	@mkdir -p $$(@D)
	nvcc -std=c++20 -O3 -Icsrc --expt-relaxed-constexpr -diag-suppress=177 -gencode "$$(ARCH_$(1))" -MMD -MP \
	    -c $$< -o $$@
endef
$(foreach target,$(KERNEL_TARGETS),$(eval $(call kernel_rule,$(target))))
-include $(wildcard $(KERNEL_OBJECTS:.o=.d))

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

$(VENV)/.installed: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "modeltorch needs Python 3.10 or newer: install python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "modeltorch needs Python 3.10 or newer: set PYTHON to one"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "modeltorch needs Python's venv module: install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES) pyproject.toml
	@command -v $${CXX:-g++} >/dev/null || { echo "modeltorch needs a C++20 compiler: install g++ 11 or newer"; exit 1; }
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

$(ASCEND_VENV)/.installed: tests/ascend_host/requirements.txt
	$(PYTHON) -m venv $(ASCEND_VENV)
	$(ASCEND_BIN)/pip install --quiet torch==2.13.0
	$(ASCEND_BIN)/pip install --quiet -r $<
	touch $@

# Installed by the line of docs/ascend.md, from a copy of the sources: the library of this tree is another.
$(ASCEND_VENV)/.built: $(ASCEND_VENV)/.installed $(SOURCES) pyproject.toml $(wildcard modeltorch/*.py) \
    $(shell find tests/ascend_host -name '*.cpp' -o -name '*.h' -o -name '*.map') tests/ascend_host/Makefile
	$(MAKE) -j2 --no-print-directory -f tests/ascend_host/Makefile PYTHON=$(ASCEND_BIN)/python
	rm -rf $(ASCEND_HOST)/source
	mkdir -p $(ASCEND_HOST)/source
	tar -cf - --exclude='*.so' --exclude=__pycache__ csrc modeltorch setup.py pyproject.toml README.md LICENSE | \
	    tar -xf - -C $(ASCEND_HOST)/source
	cd $(ASCEND_HOST)/source && env $(ASCEND_ENV) PATH="$(CURDIR)/$(ASCEND_BIN):$$PATH" MODELTORCH_CUDA=0 \
	    MODELTORCH_ASCEND=1 pip install --no-build-isolation -e .
	touch $@

clean:
	rm -rf build $(VENV) $(ASCEND_VENV) modeltorch/*.so compile_commands.json
