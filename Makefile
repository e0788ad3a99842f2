# A fresh machine needs Python 3.11 or newer (with venv) and make; everything else goes into .venv.
# The stamps .venv/* depend on the locks, so a second call installs nothing.

VENV   := .venv
PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11; do \
             "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; \
             done),python3)
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check --no-input
LOCKED := $(PIP) install --require-hashes --only-binary :all:

# cpu or gpu: the onnxruntime wheel. `make serve ACCELERATOR=cpu` overrules the driver.
ifndef ACCELERATOR
ACCELERATOR := $(or $(shell $(PYTHON) requirements/accelerator.py 2>/dev/null),cpu)
endif
ifeq ($(filter $(ACCELERATOR),cpu gpu),)
$(error ACCELERATOR is '$(ACCELERATOR)'; set it to cpu or gpu, or leave it out)
endif

# Pinned once, in pyproject.toml; not in the lock, because the right build of it depends on the machine.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)",*$$/\1/p' pyproject.toml)
UV    := uv==0.13.9
# Tools of the supply chain, and their venv.
AUDITORS := cyclonedx-bom==7.5.0 pip-audit==2.10.1
SUPPLY := .venv-supply
# In `make check`; `make test` runs each test once.
CHECKS := check-lint check-types check-contracts check-documents
DOCUMENT_TESTS := tests/project/test_documents.py tests/project/test_licences.py tests/project/test_readme.py
# A file of tests stays in one process: its fixtures are made once. In the order of collection: long files come first.
# One process more than there are CPUs: tests of servers wait much of their time.
PARALLEL := -n $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Libraries whose models are certified for comparison: never in .venv.
OTHERS := .venv-libraries
# Servers that are measured beside this one.
PEERS := .venv-peers
# Fuzzers: their libraries need other versions than the tests.
FUZZ := .venv-fuzz
# Helm, schemas and a linter for deploy/helm and deploy/kserve.
MANIFESTS := .venv-manifests
# Compiler of service/rpc/open_inference.proto; its libraries must be no newer than the locked protobuf.
PROTOC := grpcio-tools==1.85.1
# Builder of the documentation's site, and its venv.
SITE := .venv-site

# ONNX Runtime otherwise sends usage reports to its vendor.
export ORT_DISABLE_TELEMETRY := 1
# Tests start hundreds of Python processes: without stored bytecode each compiles the product again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve train check $(CHECKS) test thorough coverage format readme wheel libraries soundness random-graphs evidence fuzz schemathesis chaos memory rolling ray-chaos two-nodes manifests bench site lock protocol sbom advisories image clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/serve-$(ACCELERATOR) $(VENV)/project  ## install the serving libraries, then serve on port 8000
	@exec $(RUN) -m service

# The trainer is in the lock of the tests.
train: $(VENV)/test $(VENV)/project  ## install the trainer (torch, attacks) into .venv, for .venv/bin/lipcert train, calibrate, evaluate, convert
	@echo "$(VENV)/bin/lipcert train --help"

check: $(VENV)/test $(VENV)/project  ## install the test libraries, then lint, format, types, import contracts, documents
	@$(MAKE) --no-print-directory --jobs 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(CHECKS)

check-lint:
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

check-types:
	$(RUN) -m pyright --pythonpath $(RUN)

check-contracts:
	$(VENV)/bin/lint-imports

check-documents:
	$(RUN) -m pytest --quiet $(DOCUMENT_TESTS)

test: check  ## make check, then all other tests, in at most four processes
	$(RUN) -m pytest $(PARALLEL) $(DOCUMENT_TESTS:%=--ignore=%)

# Files that draw at random or take shipped models one by one; `make test` draws little of each kind.
thorough: $(VENV)/test $(VENV)/project  ## before a release: run the tests that draw at random or sweep over shipped models with full counts
	TESTS_THOROUGH=1 $(RUN) -m pytest $(PARALLEL) $$(grep --recursive --files-with-matches --include='test_*.py' --extended-regexp '^from (hypothesis|thorough) import' tests)

# The processes that tests start are measured as well.
coverage: $(VENV)/test $(VENV)/project  ## run all tests, measure the lines of the product that they run, write docs/coverage.md
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest $(PARALLEL)
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage json --quiet -o build/coverage.json
	$(RUN) docs/coverage.py build/coverage.json

format: $(VENV)/test  ## format the code and apply the fixes of ruff
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

wheel: $(VENV)/project  ## build dist/lipcert-VERSION-py3-none-any.whl, with the default model in it
	rm -rf build/lib build/bdist.*
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

readme: $(VENV)/test $(VENV)/project  ## write the generated blocks of README.md from the shipped artefacts
	$(RUN) docs/readme.py

libraries: $(OTHERS)/installed $(VENV)/test $(VENV)/project  ## export models of deel-torchlip and orthogonium, certify them, write the section of benchmarks/SOUNDNESS.md
	$(OTHERS)/bin/python benchmarks/libraries/export.py --out build/libraries
	$(RUN) -m benchmarks.libraries.certify build/libraries --write

soundness: DATA ?= data
soundness: $(VENV)/test $(VENV)/project  ## attack the shipped models as they are served (data sets in DATA=DIR; hours), write the sections of benchmarks/SOUNDNESS.md
	$(RUN) -m benchmarks.soundness --data $(DATA) --write

random-graphs: $(VENV)/test $(VENV)/project  ## certify 25,000 random graphs and look for a contradiction of a proof (half an hour), write its section of benchmarks/SOUNDNESS.md
	$(RUN) benchmarks/random_graphs.py --write

evidence: $(VENV)/test $(VENV)/project  ## write and check the evidence folder of every shipped model (two minutes), below build/evidence
	rm -rf build/evidence
	set -e; for model in models/zoo/*; do $(RUN) -m lipcert evidence $$model --out build/evidence/$${model##*/}; done

fuzz: SECONDS ?= 60
fuzz: $(FUZZ)/installed  ## search for inputs that the product neither answers nor refuses (SECONDS=60 for each target)
	$(FUZZ)/bin/python tests/fuzz/run.py --seconds $(SECONDS) $(TARGETS)

schemathesis: CASES ?= 1000
schemathesis: $(FUZZ)/installed  ## compare the running server with its OpenAPI document (CASES=1000 for each operation)
	$(FUZZ)/bin/python tests/fuzz/schema.py --cases $(CASES)

chaos: SECONDS ?= 600
chaos: $(VENV)/test $(VENV)/project  ## kill, stop, flood and damage a server under load, and check every answer (SECONDS=600)
	$(RUN) tests/chaos/chaos.py --seconds $(SECONDS)

memory: $(VENV)/test $(VENV)/project  ## send a million mixed requests, check every answer, and compare the memory of the server with that after 10,000
	$(RUN) tests/chaos/memory.py

rolling: SECONDS ?= 300
rolling: $(VENV)/test $(VENV)/project  ## restart two replicas in turn behind HAProxy under load, and count failed requests (SECONDS=300)
	$(RUN) tests/chaos/rolling.py --seconds $(SECONDS)

ray-chaos: SECONDS ?= 30
ray-chaos: $(VENV)/test $(VENV)/project  ## kill one of three nodes of a local Ray cluster under load, and check every answer (extra `ray`; SECONDS=30)
	$(RUN) tests/chaos/ray_node.py --seconds $(SECONDS)

two-nodes: $(VENV)/test $(VENV)/project  ## train on two nodes in two network namespaces (root, iproute2); kill, stop and cut off one, resume
	$(RUN) tests/chaos/two_nodes.py

manifests: $(MANIFESTS)/installed  ## render the chart of Kubernetes with several values, check schemas and findings of a linter
	$(MANIFESTS)/bin/python tests/manifests/check.py

bench: DATA ?= data
bench: $(PEERS)/installed $(PEERS)-mlserver/installed $(PEERS)-triton/installed $(VENV)/test $(VENV)/project  ## measure the service beside ONNX Runtime alone and other servers (wrk; MNIST in DATA=DIR; half an hour), write benchmarks/RESULTS.md and its plots
	$(RUN) -m benchmarks.serving --data $(DATA) --write

site: $(SITE)/installed  ## build the documentation as a site, build/site, which loads nothing from other hosts
	@# Not --quiet, which would not count warnings. The variable leaves out news of the theme.
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build
	@echo build/site/index.html

lock:  ## resolve the dependencies of pyproject.toml again and write requirements/*.txt
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -e; \
	$(PYTHON) -m venv "$$folder/uv" && "$$folder/uv/bin/python" -m pip install --quiet $(UV); \
	resolve() { "$$folder/uv/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-header \
	  --no-annotate "$$@"; }; \
	: 'One resolution for everything, torch and its CUDA libraries too, so that all locks fit in one venv.'; \
	resolve pyproject.toml --extra gpu --extra train --extra evaluate --extra client --extra bulk --extra grpc --extra heic --extra test --group build --group site >"$$folder/all.txt"; \
	echo torch >"$$folder/unlocked.txt"; \
	lock() { target=$$1; shift; resolve --generate-hashes --constraints "$$folder/all.txt" "$$@" >"$$folder/$$target"; \
	  { echo '# Written by `make lock`.'; cat "$$folder/$$target"; } >"requirements/$$target"; }; \
	lock serve-cpu.txt pyproject.toml --extra cpu; \
	lock serve-gpu.txt pyproject.toml --extra gpu; \
	lock build.txt --group build; \
	lock site.txt --group site; \
	lock test.txt pyproject.toml --extra train --extra evaluate --extra client --extra bulk --extra grpc --extra heic --extra test --excludes "$$folder/unlocked.txt"

protocol:  ## write the Python of service/rpc/open_inference.proto
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -e; \
	$(PYTHON) -m venv "$$folder/protoc" && "$$folder/protoc/bin/python" -m pip install --quiet $(PROTOC); \
	"$$folder/protoc/bin/python" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. service/rpc/open_inference.proto

sbom: $(SUPPLY)/installed  ## write the bill of materials of both images, build/sbom-cpu.json and build/sbom-gpu.json (CycloneDX), from the locks
	@mkdir -p build
	set -e; for kind in cpu gpu; do PYTHONWARNINGS=ignore $(SUPPLY)/bin/cyclonedx-py requirements requirements/serve-$$kind.txt \
	  --pyproject pyproject.toml --output-reproducible -o build/sbom-$$kind.json; done

# --strict: a library that is not found, for example because the network is not, is a failure.
advisories: $(SUPPLY)/installed  ## look up the locked libraries among the known vulnerabilities (needs the network)
	set -e; for lock in requirements/*.txt; do echo "$$lock"; $(SUPPLY)/bin/pip-audit --strict --vulnerability-service osv \
	  --disable-pip --require-hashes --progress-spinner off -r $$lock; done

image:  ## build the container image lipcert:cpu (or lipcert:gpu with ACCELERATOR=gpu)
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --target $(ACCELERATOR) --tag lipcert:$(ACCELERATOR) .

clean:  ## remove .venv, .venv-libraries, .venv-fuzz, .venv-manifests, .venv-peers*, .venv-site, .venv-supply and caches
	rm -rf $(VENV) $(OTHERS) $(FUZZ) $(MANIFESTS) $(PEERS) $(PEERS)-* $(SITE) $(SUPPLY) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find benchmarks lipcert models service tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo >&2 "lipcert needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)."; \
	  echo >&2 'Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one: make PYTHON=python3.12 ...'; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo >&2 "'$(PYTHON)' has no venv. Install it (Debian, Ubuntu: apt-get install python3-venv) and call make again."; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Both wheels install the package `onnxruntime`: removing one takes files of the other along, so both go first.
$(VENV)/serve-cpu: OTHER := $(VENV)/serve-gpu
$(VENV)/serve-gpu: OTHER := $(VENV)/serve-cpu
$(VENV)/serve-%: requirements/serve-%.txt $(VENV)/created
	@if [ -e $(OTHER) ]; then $(PIP) uninstall --yes onnxruntime onnxruntime-gpu && rm $(OTHER); fi
	$(LOCKED) -r $<
	@touch $@

# Editable: the service then finds models/zoo of this checkout from any directory.
$(VENV)/project: pyproject.toml requirements/build.txt $(VENV)/serve-$(ACCELERATOR)
	$(LOCKED) --quiet -r requirements/build.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(OTHERS)/installed: benchmarks/libraries/requirements.txt
	$(PYTHON) -m venv --clear $(OTHERS)
	$(OTHERS)/bin/python -m pip --disable-pip-version-check --no-input install -r $<
	@touch $@

$(SUPPLY)/installed: Makefile
	$(PYTHON) -m venv --clear $(SUPPLY)
	$(SUPPLY)/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(AUDITORS)
	@touch $@

$(SITE)/installed: requirements/site.txt
	$(PYTHON) -m venv --clear $(SITE)
	$(SITE)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --require-hashes --only-binary :all: -r $<
	@touch $@

$(FUZZ)/installed: tests/fuzz/requirements.txt requirements/serve-cpu.txt
	$(PYTHON) -m venv --clear $(FUZZ)
	$(FUZZ)/bin/python -m pip --disable-pip-version-check --no-input install --require-hashes --only-binary :all: -r requirements/serve-cpu.txt
	$(FUZZ)/bin/python -m pip --disable-pip-version-check --no-input install -r $<
	@touch $@

$(MANIFESTS)/installed: tests/manifests/requirements.txt tests/manifests/requirements-alone.txt
	$(PYTHON) -m venv --clear $(MANIFESTS)
	$(MANIFESTS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet -r $<
	$(MANIFESTS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps -r $(word 2,$^)
	@touch $@

# A server that cannot be installed here is left out of the tables, which say so; the next call tries again.
define install-peer
	$(PYTHON) -m venv --clear $(@D)
	@if $(@D)/bin/python -m pip --disable-pip-version-check --no-input install -r $< 2>$(@D)/errors.txt; then touch $@; \
	else cat >&2 $(@D)/errors.txt; echo >&2 '$< cannot be installed; its servers will be left out'; fi
endef

$(PEERS)/installed: benchmarks/serving/requirements.txt
	$(install-peer)

$(PEERS)-%/installed: benchmarks/serving/requirements-%.txt
	$(install-peer)

# --no-deps: the lock is complete but for torch, which packages in it need and pip would miss.
$(VENV)/test: requirements/test.txt $(VENV)/serve-$(ACCELERATOR)
	$(LOCKED) --no-deps -r $<
	$(PIP) install $(TORCH)
	@touch $@
