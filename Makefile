# Everything runs from `.venv`, which `make venv` creates with the package, its compiled library and its extras.
# Another torch: make venv TORCH='torch==2.11.0'. Another Python: make venv PYTHON=python3.12.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help venv test trainers docs checks demo bench bench-full bench-trainers study study-quick gpu gpu-checks lint format asan wheels clean

help:           ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/ :/'

venv: .venv/ready  ## create .venv and build the library

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10; name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python venv failed: install your system's python3-venv package"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip<26.2'
	$(BIN)/python -m pip install --quiet --progress-bar off '$(TORCH)' setuptools wheel numpy ninja
	touch $@

.venv/installed: .venv/created pyproject.toml
	FUSED_CLIP_ADAM_BUILD=none $(BIN)/python -m pip install --quiet --progress-bar off \
		--no-build-isolation --editable '.[test,demo,dev,docs]'
	touch $@

.venv/ready: .venv/installed $(SOURCES)
	@echo "building the CPU library (about a minute)"
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python setup.py --quiet build_ext --inplace >build.log 2>&1 || \
		{ cat build.log; exit 1; }
	touch $@

# As many workers as cores, each with one thread: `make test WORKERS=0` runs the tests one after another.
WORKERS ?= auto
PYTEST = -m pytest -n $(WORKERS) --dist loadgroup

test: venv      ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# Trainers that `make test` skips, in environments of their own: they are large, and verl's tensordict is not torchrl's.
IN_TRAINERS := sb3 torchrl lightning rsl_rl
TRAINER_TEST = OMP_NUM_THREADS=1 FUSED_CLIP_ADAM_CUDA_LIBRARY=none
.venv-%/ready: .venv/ready pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade 'pip<26.2'
	.venv-$*/bin/python -m pip install --quiet --progress-bar off '$(TORCH)' setuptools wheel numpy
	FUSED_CLIP_ADAM_BUILD=none .venv-$*/bin/python -m pip install --quiet --progress-bar off \
		--no-build-isolation --editable '.[$*]' '$(TORCH)' 'pytest<9.2' pytest-benchmark pytest-xdist hypothesis 'triton>=3.5,<3.8'
	touch $@

trainers: .venv-trainers/ready .venv-verl/ready  ## the integrations with Stable-Baselines3, torchrl, Lightning, rsl-rl and verl
	$(TRAINER_TEST) .venv-trainers/bin/python -m pytest $(IN_TRAINERS:%=tests/test_integration_%.py)
	$(TRAINER_TEST) .venv-verl/bin/python -m pytest tests/test_integration_verl.py
	$(TRAINER_TEST) .venv-trainers/bin/python -m pytest tests/test_docs_blocks.py -k "stable_baselines3 or torchrl or rsl_rl or lightning"
	$(TRAINER_TEST) .venv-verl/bin/python -m pytest tests/test_docs_blocks.py -k verl

docs: venv      ## the documentation, in build/docs: built without a network, read without one
	@$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs
	@echo "open build/docs/index.html"

checks: venv    ## three properties of arXiv 2601.05002, measured; fails where one does not hold
	for check in coast_after_clip reward_scale prefix_bias; do $(BIN)/python examples/$$check.py || exit 1; done

demo: venv      ## a GRPO run through TRL; table and figure in demo_out/   (make demo ARGS=--help)
	$(BIN)/python examples/grpo_demo.py $(ARGS)

bench: venv     ## CPU benchmarks against torch in alternation, under 10 minutes   (ARGS="--base REF": against a commit)
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-full: venv  ## the same with DeepSpeedCPUAdam, which it builds first, optimi, torchao, flashoptim and bitsandbytes
	FUSED_CLIP_ADAM_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[bench]'
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m benchmarks.run $(ARGS)

study: venv     ## the overshoot study, from where it was left: page, figures and README's advice; an hour on two cores
	$(BIN)/python -m benchmarks.overshoot $(ARGS)

study-quick: venv  ## a trial of the study: four methods, short runs, nothing kept; under five minutes
	$(BIN)/python -m benchmarks.overshoot --quick --fresh

bench-trainers: .venv-trainers/ready .venv-verl/ready  ## a step in each of these trainers against its own way; writes results
	.venv-trainers/bin/python -m pytest benchmarks/test_integrations.py -q -k "sb3 or torchrl or rsl-rl or lightning"
	.venv-verl/bin/python -m pytest benchmarks/test_integrations.py -q -k verl

# No .venv here: the machine's own Python has the torch that fits its GPU, and there may be no network.
GPU_PYTHON ?= python3

gpu:            ## on a GPU: build in place, tests, sanitizer, benchmarks; ten minutes   (GPU_PYTHON=...)
	@$(GPU_PYTHON) -m benchmarks.gpu_session $(ARGS)

.venv/gpu-checks: .venv/ready
	FUSED_CLIP_ADAM_BUILD=none $(BIN)/python -m pip install --quiet --progress-bar off \
		--no-build-isolation --editable '.[gpu-checks]'
	touch $@

gpu-checks: .venv/gpu-checks  ## cross-compile the GPU kernels, compare registers, spills, vector width (needs no GPU)
	$(BIN)/python -m pytest tests/test_cuda_compile.py tests/test_triton_compile.py  # they use all cores themselves

CPP := csrc/*.h csrc/cpu/* csrc/cuda/* tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp

lint: venv      ## ruff and clang-format, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: venv    ## let ruff and clang-format change files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The CPU library under AddressSanitizer and UBSan, and the tests that exercise it. Leaks are CPython's, not looked for.
ASAN := build/asan/_C.abi3.so
ASAN_OBJECTS := $(patsubst csrc/cpu/%.cpp,build/asan/%.o,$(wildcard csrc/cpu/*.cpp))
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all
build/asan/%.o: csrc/cpu/%.cpp $(wildcard csrc/*.h csrc/cpu/*.h) | venv
	@mkdir -p build/asan
	$(or $(CXX),g++) -c -fPIC -O1 -g -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off \
		$(ASAN_FLAGS) -fno-omit-frame-pointer -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc \
		-I$$($(BIN)/python -c 'import torch.utils.cpp_extension as c; print(c.include_paths()[0])') $< -o $@
$(ASAN): $(ASAN_OBJECTS)
	$(or $(CXX),g++) -shared $(ASAN_FLAGS) $^ -o $@ \
		-L$$($(BIN)/python -c 'import torch.utils.cpp_extension as c; print(c.library_paths()[0])') -ltorch -ltorch_cpu -lc10

# Each third test: neighbours differ in a number, not in the memory they touch. All of them: make asan EVERY=1.
EVERY ?= 3
asan: venv      ## kernel tests, the CUDA kernels' on the CPU among them, under AddressSanitizer and UBSan   (EVERY=1: all)
	@$(MAKE) --no-print-directory -j2 $(ASAN)
	FUSED_CLIP_ADAM_LIBRARY=$(CURDIR)/$(ASAN) $(SANITIZED) \
		$(PYTEST) -x -q --every $(EVERY) tests/test_step.py tests/test_objectives.py tests/test_logits.py tests/test_hostile.py tests/test_scores.py -k "not cuda and not reference and not thread_count"
	library=$$($(BIN)/python tests/cuda_on_cpu/build.py --sanitize) && FUSED_CLIP_ADAM_CUDA_LIBRARY=$$library \
		$(SANITIZED) $(PYTEST) -x -q --every $(EVERY) tests/test_cuda_on_cpu.py tests/test_gpu_backends.py && \
		FUSED_CLIP_ADAM_CUDA_LIBRARY=$$library $(SANITIZED) $(PYTEST) -x -q --every $(EVERY) tests/test_objectives.py tests/test_logits.py tests/test_scores.py -k "cuda and not thread_count"
SANITIZED = OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TRITON_INTERPRET=0 \
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libubsan.so)" \
	$(BIN)/python

# Built from the source release, so that nothing of this tree that is not in it can slip in. Both builds share what is
# compiled, but not build/lib, whose files all go into a wheel.
# Without nvcc: make wheels BUILDS=cpu. For one GPU: TORCH_CUDA_ARCH_LIST=9.0 make wheels. PYTHONS: to try them on too.
BUILDS ?= cpu cuda
wheels: $(if $(filter cuda,$(BUILDS)),.venv/gpu-checks,venv)  ## source release and cp310-abi3 wheels in dist/, for CPUs and for CUDA (needs no GPU), and their tests
	rm -rf dist build/wheels
	FUSED_CLIP_ADAM_BUILD=none $(BIN)/python setup.py --quiet sdist --dist-dir dist
	mkdir -p build/wheels && tar -xzf dist/*.tar.gz -C build/wheels --strip-components 1
	for build in $(BUILDS); do \
		rm -rf build/wheels/build/lib* && \
		FUSED_CLIP_ADAM_BUILD=$$build PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pip wheel --quiet \
			--no-build-isolation --no-deps --no-index --wheel-dir dist ./build/wheels || exit 1; \
	done
	FUSED_CLIP_ADAM_WHEELS=dist FUSED_CLIP_ADAM_WHEEL_BUILDS="$(BUILDS)" FUSED_CLIP_ADAM_WHEEL_PYTHONS="$(PYTHONS)" \
		FUSED_CLIP_ADAM_CUDA_LIBRARY=none $(BIN)/python -m pytest tests/test_wheels.py

clean:          ## remove everything `make` created
	rm -rf .venv .venv-trainers .venv-verl build build.log dist demo_out *.egg-info fused_clip_adam/*.so
