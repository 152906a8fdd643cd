# make demo | make test | make lint | make build | make bench: each does all its own set-up.
# make gpu: build, test, sanitize and measure with the torch that $(PYTHON) has, on its GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell git ls-files --cached --others --exclude-standard csrc pyflowkern) CMakeLists.txt pyproject.toml
TOOLS := pytest pytest-xdist hypothesis ruff mypy clang-format types-PyYAML

.PHONY: demo test test-fast lint format build bench gpu clean
demo: $(VENV)/installed
	$(BIN)/pyflowkern demo

# pytest (not python -m pytest): the tests run against the installed wheel, never the source tree
test: $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not gpu" --durations=10

test-fast: $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not gpu and not slow" -q

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/tools
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# the libraries into the source tree, for development: pyflowkern/lib is found before an installed wheel
build: $(VENV)/tools
	$(BIN)/cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/dev
	$(BIN)/cmake --install build/dev --prefix .

GPU_OUT ?= out/gpu
gpu:
	$(PYTHON) -m bench.gpu --out $(GPU_OUT)

bench: $(VENV)/installed
	$(BIN)/python -m bench all

# torch first and alone: the constraint names a CPU build, which a later resolution must not replace
$(VENV)/tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt scikit-build-core pybind11 ninja cmake
	$(BIN)/python -m pip install -q -c constraints.txt $(TOOLS) typer pillow pyyaml lightning \
	  tensorboard matplotlib scikit-learn scikit-image
	touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	rm -rf dist
	$(BIN)/python -m pip wheel -q . --no-build-isolation --no-deps -w dist
	$(BIN)/python -m pip install -q --no-deps --force-reinstall dist/pyflowkern-*.whl
	touch $@

clean:
	rm -rf $(VENV) build dist out pyflowkern/lib pyflowkern/_C*.so
