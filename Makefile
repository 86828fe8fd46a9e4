# `make demo` and `make test` each do all of their set-up: what the system lacks, then .venv, then the build.
# All paths are relative and quoted: the clone may lie anywhere. pip's own settings (PIP_*, pip.conf) hold as they are.
PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=
# Files of tests side by side: most wait more than they work.
WORKERS ?= 2

# What is installed, and what the build makes of it. Folders too: a file that went away must go from .venv as well.
SOURCES := meson.build meson.options README.md LICENSE \
  $(shell find migrate proto \( -name __pycache__ -prune \) -o -print) $(shell find tests -name '*.c')

.DEFAULT_GOAL := help
.PHONY: help system build demo test lint bench sanitize torture fuzz guest-image clean

help:
	@echo 'make demo      set up and watch a live guest move between two daemons (ARGS="--memory 128M")'
	@echo 'make test      set up, lint, and run the tests (ARGS="-k name" goes to pytest)'
	@echo 'make bench     the benchmark beside its floor (ARGS="--check")'
	@echo 'make torture   the long version of tests/torture, and its table (ARGS="--torture-seed 2")'
	@echo 'make fuzz      the C parsers under libFuzzer (clang), the state machines under random sequences (RUNS=1000000)'
	@echo 'make lint      ruff and mypy'
	@echo 'make sanitize  the C core alone under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer'
	@echo 'make guest-image  the Linux test guest: kernel of Debian, /init of our own, in build/guest/'
	@echo 'make build     .venv with the package in it, and nothing more'
	@echo 'make system    install what the system lacks (as root; without root: say what)'
	@echo 'make clean     remove .venv, build directories and caches'

system:
	@PYTHON='$(PYTHON)' sh deploy/system.sh

.venv/dependencies.stamp: pyproject.toml deploy/requirements.py | system
	@$(PY) -c '' 2>/dev/null || { rm -rf build; '$(PYTHON)' -m venv --clear .venv; }
	@$(PY) deploy/requirements.py pyproject.toml > .venv/requirements.txt
	$(PY) -m pip install --quiet -r .venv/requirements.txt
	@touch $@

# Not editable: what is tested is what a wheel holds. The build directory stays, so that the next build is a short one.
.venv/installed.stamp: .venv/dependencies.stamp $(SOURCES)
	@touch .venv/installing.stamp # what is edited from here on is newer than the build
	PATH="$$PWD/.venv/bin:$$PATH" $(PY) -m pip install --quiet --force-reinstall --no-deps --no-build-isolation --config-settings=build-dir=build .
	@mv .venv/installing.stamp $@

build: system .venv/installed.stamp

# Debian's kernel is downloaded once; /init is rebuilt when it, or what is linked into it, changes.
build/guest/vmlinuz: deploy/guest-image.sh | system
	@mkdir -p $(@D)
	@sh deploy/guest-image.sh kernel $(@D)

build/guest/initramfs.cpio: build/guest/vmlinuz $(wildcard migrate/guests/linux/*.[ch] migrate/guests/workload/*.[ch] migrate/dataplane/histogram.[ch])
	@sh deploy/guest-image.sh initramfs $(@D)

guest-image: build/guest/initramfs.cpio

demo: build
	@.venv/bin/postcopy demo $(ARGS)

lint: build
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Where no kernel for the image can be had the tests that need it are deselected, and the summary says so.
# POSTCOPY_REQUIRE: what this machine can do must be tested; the rest is deselected, each with its reason (tests/README.md).
test: lint
	@$(MAKE) --no-print-directory guest-image || { [ ! -e build/guest/vmlinuz ] && echo 'make test: goes on without the Linux test guest'; }
	@require=$$($(PY) -P -m migrate.host --available) && export POSTCOPY_REQUIRE="$${POSTCOPY_REQUIRE-$$require}" && \
	  echo "POSTCOPY_REQUIRE=$$POSTCOPY_REQUIRE" && $(PY) -P -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

torture: build guest-image
	@require=$$($(PY) -P -m migrate.host --available) && export POSTCOPY_REQUIRE="$${POSTCOPY_REQUIRE-$$require}" && \
	  $(PY) -P -m pytest tests/torture --torture $(ARGS)

# Each C parser by itself, guided by coverage; what it finds stays in build-fuzz/ (crash-…), and belongs into tests/fuzz/corpus/.
# Then other bytes for the message decoders, a tenth as many sequences of the state machines, a hundredth as many requests of each
# operation of the API.
RUNS ?= 1000000
FUZZED = $(notdir $(wildcard tests/fuzz/corpus/*))
fuzz: build
	@FUZZ=1 PYTHON='$(PYTHON)' sh deploy/system.sh
	@[ -e build-fuzz/build.ninja ] || CC=clang $(PY) -m mesonbuild.mesonmain setup build-fuzz -Dpython=disabled -Dfuzzer=true -Dwerror=false \
	  -Db_sanitize=address,undefined -Db_lundef=false
	@PATH="$$PWD/.venv/bin:$$PATH" ninja --quiet -C build-fuzz $(FUZZED:%=fuzz-%) # also where there is a target more than last time
	@set -e; for target in $(FUZZED); do mkdir -p build-fuzz/corpus/$$target; echo "fuzz-$$target: $(RUNS) runs"; \
	  build-fuzz/fuzz-$$target -runs=$(RUNS) -timeout=20 -rss_limit_mb=2048 -verbosity=0 -artifact_prefix=build-fuzz/ \
	  build-fuzz/corpus/$$target tests/fuzz/corpus/$$target; done
	$(PY) -P -m pytest tests/fuzz tests/control/test_api_conformance.py --fuzz-runs $(RUNS) $(ARGS)

bench: build guest-image
	@.venv/bin/postcopy bench $(ARGS)

sanitize: build
	@POSTCOPY_REQUIRE=asan,tsan $(PY) -P -m pytest tests/path/test_sanitizers.py $(ARGS)

clean:
	rm -rf .venv build build-* dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find migrate proto tests deploy -name __pycache__ -prune -exec rm -rf {} +
