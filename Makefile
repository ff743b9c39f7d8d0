# Every target does its own set-up; `make help` lists them. Run as root on Debian or Ubuntu.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
TOOLS := .tools/bin
PEER := .tools/peer
FUZZ := .cache/fuzz/venv
GO_MINOR := $(shell go env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
HAVE_GO := $(shell test "$(GO_MINOR)" -ge 26 2>/dev/null && echo yes)

# Debian packages: what the agent needs, and what the tests need besides.
PACKAGES := libseccomp2
TEST_PACKAGES := curl e2fsprogs gcc libc6-dev iproute2 nftables procps strace tmux
# Those whose installation would start a service or replace another package are only unpacked.
DEBIAN := .cache/debian

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test-setup tools peer guest demo test fuzz conformance conformance-v2 kubelet charts upgrade-test \
  chaos power soak simulate history differential lint docs proto lock bench bench-peer clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- set-up ----

# Installs those of the packages $(1) that are missing.
define install
@missing=$$(for name in $(1); do dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q ' installed' || echo $$name; done); \
test -z "$$missing" || { apt-get -qq update && \
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq install -y --no-install-recommends $$missing; }
endef

setup: $(READY) | $(DEBIAN)/busybox-static ## Make .venv with the locked dependencies and the command nodeagent

$(READY): requirements.txt requirements-dev.txt pyproject.toml | $(PYTHON)
	$(call install,$(PACKAGES))
	$(PYTHON) -m pip install --quiet --require-hashes -r requirements-dev.txt
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The newest Python that really runs: a version manager's shim may be there without its Python, and the other way round.
# From 3.12 on, pods take less memory.
$(PYTHON):
	@python=$$(for name in $$(for minor in 13 12 11; do \
	    echo python3.$$minor; ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python3.$$minor 2>/dev/null; \
	  done) python3; do \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$name" && break; done); \
	test -n "$$python" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { apt-get -qq update && apt-get -qq install -y \
	  "$$("$$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"; }; \
	"$$python" -m venv $(VENV)

$(DEBIAN)/%:
	@mkdir -p $@.new
	@cd $@.new && get() { apt-get -qq -o APT::Sandbox::User=root download $*; } && { get || { apt-get -qq update && get; }; }
	@dpkg-deb -x $@.new/$*_*.deb $@.new && rm $@.new/$*_*.deb && mv $@.new $@

test-setup: setup | $(DEBIAN)/apparmor $(DEBIAN)/busybox $(DEBIAN)/docker-registry $(DEBIAN)/nginx
	$(call install,$(TEST_PACKAGES))

tools: $(TOOLS)/crictl $(TOOLS)/critest ## Build crictl and critest (Go >= 1.26)

$(TOOLS)/crictl $(TOOLS)/critest &: tests/tools/go.mod tests/tools/go.sum
	@test -n "$(HAVE_GO)" || { echo "Go 1.26 or newer is needed to build crictl and critest" >&2; exit 1; }
	cd tests/tools && go build -trimpath -ldflags '-s -w' -o ../../$(TOOLS)/crictl sigs.k8s.io/cri-tools/cmd/crictl
	cd tests/tools && go test -c -trimpath -ldflags '-s -w' -o ../../$(TOOLS)/critest sigs.k8s.io/cri-tools/cmd/critest

KUBELET_VERSION := $(shell sed -n 's,^.*k8s.io/kubernetes \(v[0-9.]*\).*,\1,p' tests/kubelet/go.mod)

$(TOOLS)/kubelet $(TOOLS)/grpc-health $(TOOLS)/kubelet-streams &: tests/kubelet/go.mod tests/kubelet/go.sum \
  tests/kubelet/health/main.go tests/kubelet/streams/main.go
	@test -n "$(HAVE_GO)" || { echo "Go 1.26 or newer is needed to build the kubelet" >&2; exit 1; }
	cd tests/kubelet && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ../../$(TOOLS)/grpc-health ./health
	cd tests/kubelet && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ../../$(TOOLS)/kubelet-streams ./streams
	cd tests/kubelet && go build -trimpath -ldflags '-s -w -X k8s.io/component-base/version.gitVersion=$(KUBELET_VERSION)' \
	  -o ../../$(TOOLS)/kubelet k8s.io/kubernetes/cmd/kubelet

guest: setup ## Unpack the kernel of the tests' cgroup v2 machine (x86-64)
	$(call install,e2fsprogs kmod)
	$(PYTHON) -m tests.guest --setup uml selinux

# An environment of its own, because atheris is not there for every machine.
$(FUZZ)/.ready: requirements.txt tests/fuzz/requirements.txt | $(PYTHON)
	$(PYTHON) -m venv --clear $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet --require-hashes -r requirements.txt -r tests/fuzz/requirements.txt
	@touch $@

peer: $(PEER)/.ready
$(PEER)/.ready: bench/peer/go.mod bench/peer/go.sum
	@test -n "$(HAVE_GO)" || { echo "Go 1.26 or newer is needed to build containerd and runc" >&2; exit 1; }
	$(call install,gcc libc6-dev libseccomp-dev pkg-config nftables iproute2)
	cd bench/peer && go build -trimpath -tags no_btrfs,no_devmapper,no_zfs -ldflags -s -o ../../$(PEER)/ \
	  github.com/containerd/containerd/v2/cmd/containerd github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2
	cd bench/peer && go build -trimpath -tags seccomp -ldflags -s -o ../../$(PEER)/ github.com/opencontainers/runc
	cd bench/peer && go build -trimpath -ldflags -s -o ../../$(PEER)/ \
	  $(addprefix github.com/containernetworking/plugins/plugins/,main/bridge main/loopback ipam/host-local meta/portmap)
	@touch $@

# ---- the project ----

demo: setup ## Run a pod with two containers on an agent of its own
	@$(PYTHON) deploy/demo.py

# Without the guest's kernel, or without Go, the tests that need them are skipped, except in CI.
test: test-setup lint ## Lint, types, layers and all tests
	@$(MAKE) --no-print-directory guest || test -z "$(CI)"
	$(PYTHON) -m pytest

ifneq ($(HAVE_GO)$(CI),)
test: tools
endif

# A kubelet takes four minutes to build: it is there in CI, and after `make kubelet`.
ifneq ($(CI),)
test: $(TOOLS)/kubelet
endif

# The longer form of tests/fuzz; what it has found interesting stays in .cache, and is where the next run begins.
SECONDS := 10
fuzz: setup $(FUZZ)/.ready ## Fuzz all that parses foreign bytes (SECONDS=10 for each)
	$(FUZZ)/bin/python -m tests.fuzz --seconds $(SECONDS)

conformance: test-setup tools ## Run critest, the public validation suite of the CRI
	$(PYTHON) -m tests.conformance

# nf_tables, and so host ports, are only in the last of these kernels, which is slow.
IN_GUEST := $(PYTHON) -m tests.guest --memory 8000 --timeout 2200
conformance-v2: test-setup tools ## Run it on cgroup v2, with both drivers, in guests
	$(call install,e2fsprogs kmod)
	$(PYTHON) -m tests.guest --setup uml qemu
	$(IN_GUEST) . -- $(abspath $(PYTHON)) -m tests.conformance --timeout 2000
	$(IN_GUEST) --init systemd . -- $(abspath $(PYTHON)) -m tests.conformance --timeout 2000
	$(IN_GUEST) --kernel qemu . -- $(abspath $(PYTHON)) -m tests.conformance --focus 'port mapping'

# Here, and where most users are: on cgroup v2, with the systemd driver beside a systemd.
WITH_SYSTEMD := $(IN_GUEST) --init systemd . -- $(abspath $(PYTHON)) -m pytest -p no:cacheprovider
kubelet: test-setup $(TOOLS)/kubelet ## Let a real kubelet run static pods on an agent
	$(PYTHON) -m pytest tests/kubelet
	@$(MAKE) --no-print-directory guest
	$(WITH_SYSTEMD) tests/kubelet

charts: test-setup ## Run the pods of public charts, here and on cgroup v2 with both drivers
	$(PYTHON) -m pytest tests/charts
	@$(MAKE) --no-print-directory guest
	$(IN_GUEST) . -- $(abspath $(PYTHON)) -m pytest -p no:cacheprovider tests/charts
	$(WITH_SYSTEMD) tests/charts

# The whole sweep takes hours. FRACTION=0.1 plays a tenth of it, SEED=… repeats a choice.
FRACTION := 1
SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
chaos: test-setup ## Let calls to the kernel fail, kill and stop, at every step (FRACTION=1 SEED=…)
	$(PYTHON) -m tests.chaos.inject --fraction $(FRACTION) --seed $(SEED)
	$(PYTHON) -m tests.chaos.gray
	$(PYTHON) -m tests.chaos.scarce

MINUTES := 60
soak: test-setup ## Age a node, and look for what grows (MINUTES=60, plot in soak.svg)
	$(PYTHON) -m tests.chaos.soak --minutes $(MINUTES) --plot soak.svg

power: test-setup ## Cut the power at any moment, and see what the next start finds
	@$(MAKE) --no-print-directory guest
	$(PYTHON) -m tests.chaos.power

upgrade-test: test-setup ## Replace earlier releases under load, and go back to them
	$(PYTHON) -m pytest tests/upgrade

# SEED=… begins where an earlier run began.
history: test-setup ## Judge histories of random programs under faults (SECONDS=60 SEED=…)
	$(PYTHON) -m tests.chaos.history --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

history: SECONDS := 60

simulate: test-setup ## Simulate the node under many seeds (SEEDS=10000)
	$(PYTHON) -m tests.chaos.simulation --seeds $(SEEDS)

simulate: SEEDS := 10000

differential: test-setup peer ## Compare the answers with containerd's (docs/differences.md)
	$(PYTHON) -m pytest tests/chaos/differential

lint: setup ## Check style, types, layers and generated code
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call protoc,"$$fresh") && \
	diff -r --exclude='__*' nodeagent/api "$$fresh/nodeagent/api" && echo "nodeagent/api is what protos/ generates"

# Generates into the tree $(1).
protoc = $(PYTHON) -m grpc_tools.protoc -Inodeagent/api=protos \
	  --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) protos/runtime.proto

proto: setup ## Generate nodeagent/api from protos/
	$(call protoc,.)

docs: setup ## Write the documents that are made from the code
	$(PYTHON) -m deploy.documents

COMPILE := CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --annotation-style=line

lock: setup ## Pin the newest dependencies that pyproject.toml allows
	$(COMPILE) --upgrade -o requirements.txt pyproject.toml
	$(COMPILE) --upgrade --extra dev -c requirements.txt -o requirements-dev.txt pyproject.toml
	$(COMPILE) --upgrade -c requirements.txt -o tests/fuzz/requirements.txt tests/fuzz/requirements.in

bench: setup ## Measure pods on an agent of its own
	$(PYTHON) -m bench.pods

bench-peer: test-setup peer ## Measure the same on containerd and runc, in turns
	$(PYTHON) -m bench.pods --peer

clean: ## Remove what was built, not the caches
	rm -rf $(VENV) .tools build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -prune -exec rm -rf {} +
