# Vireo. `make help` says what there is.

SHELL := /bin/bash
CARGO ?= cargo
# Guest kernels and initramfs for the tests and the benchmarks.
GUESTS ?= $(CURDIR)/target/guests
export VIREO_TEST_GUESTS ?= $(GUESTS)

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: quickstart
quickstart: ## from nothing to a Linux guest's shell (as root, on Debian)
	@scripts/quickstart

.PHONY: build
build: ## vireo, vireod and vireo-vmm, optimised
	$(CARGO) build --release --bins

.PHONY: lint
lint: ## formatting, clippy, shell scripts
	@scripts/need shellcheck
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --release -- -D warnings
	shellcheck scripts/guest-assets scripts/guest/init scripts/need scripts/quickstart scripts/test scripts/bench scripts/bench-guest tests/clients/virt-manager examples/debian/make-disk examples/debian/run .ci/run

.PHONY: docs
docs: ## docs/compatibility.md from the programs' own tables
	$(CARGO) build --release --bins
	VIREO_UPDATE_DOCS=1 $(CARGO) nextest run --release -p vireo-tests --test compatibility

.PHONY: test
test: ## everything that the tests need, and the tests
	@scripts/test

.PHONY: test-gui
test-gui: ## virt-manager in an X server of its own lists, starts and stops a domain
	$(CARGO) build --release --bins
	tests/clients/virt-manager

.PHONY: soak
soak: ## the long forms of the randomised and crash tests, guests under load (VIREO_SOAK_MINUTES)
	@VIREO_SOAK=1 scripts/test

.PHONY: bench
bench: ## figures, as ratios against QEMU and libvirt in the same run
	@scripts/bench

.PHONY: clean
clean: ## what was built, and the guests
	$(CARGO) clean
