# Each target sets up everything it needs in .venv; second runs only do what has changed.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Two workers on two cores: each computes on one thread, or the two would wait for each other's threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo docs test test-full test-timm test-gpu test-range wheels core test-isa test-sanitize lint clean

demo: $(VENV)/.installed
	$(BIN)/dfformer demo --output demo

# The documentation as a site, in site/.
docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict

# Of one folder: make test TESTS=tests/models
test: $(VENV)/.installed
	$(PYTEST) $(TESTS)

# With the long lists of shapes, chips and compilations, which take far longer.
test-full: $(VENV)/.installed
	DFFORMER_TEST_FULL=1 $(PYTEST) $(TESTS)

# What timm asks of its models, of all of these whole.
test-timm: $(VENV)/.installed
	DFFORMER_TEST_FULL=1 $(PYTEST) tests/models/test_timm.py

# On a machine with a GPU, with the Python at hand and without a network: the compiled core in place, then what needs a
# GPU in several processes, then small problems under NVIDIA's compute-sanitizer.
test-gpu: core
	PYTHON=$(PYTHON) tests/gpu.sh

# With the oldest and the newest torch, timm and Pillow that are allowed.
test-range:
	PYTHON=$(PYTHON) tests/project/range.sh

# The source distribution and the wheels of this machine, in dist/, checked and run without a compiler. PYTHONS: for which.
wheels:
	PYTHONS="$${PYTHONS:-$(PYTHON)}" tests/project/wheels.sh

# The compiled core in place, by PYTHON and the headers of its torch alone: no pip, no setuptools, no network. As in
# setup.py.
INCLUDES = $$($(PYTHON) -c "import sysconfig as s, torch.utils.cpp_extension as c; \
	print(*(f'-isystem {path}' for path in [s.get_path('include'), *c.include_paths()]))")
SUFFIX = $$($(PYTHON) -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
core:
	mkdir -p build/core
	printf '%s\n' csrc/*.cpp csrc/*/*.cpp | xargs -P "$$(nproc)" -I {} sh -c '$(CXX) -c -std=c++20 -O3 -fPIC \
		-fvisibility=hidden -fno-math-errno -Wno-psabi -fopenmp '"$(INCLUDES)"' "$$1" \
		-o "build/core/$$(echo "$$1" | tr / _).o"' sh {}
	$(CXX) -shared -fopenmp build/core/*.o -ldl -o "dfformer_kernels/_C$(SUFFIX)"

# The compiled core alone, without Python: on emulated processors that lack this one's instruction sets, and under
# sanitizers.
test-isa:
	tests/native/run.sh isa

test-sanitize:
	tests/native/run.sh sanitize

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build demo dist site *.egg-info dfformer_kernels/*.so
