# husk: everything a developer or a user runs from a checkout. `make help` lists it.
#
# Nothing has to be there before but Debian 12 or 13 with make, and root or sudo: missing tools are installed as
# Debian packages, or live in roots of their own in the cache (HUSK_CACHE, by default ~/.cache/husk).

PREFIX ?= /usr/local
DESTDIR ?=

SHELL := /bin/bash
CARGO := guest-image/cargo
TARGET := target/x86_64-unknown-linux-gnu
# What `make install` copies, laid out as under PREFIX; its programs run from there as well.
OUT := target/husk
DIRECTORIES := bin libexec/husk lib/husk share/husk
# What the tests need beside husk itself.
E2E := target/e2e

say = @printf '\n==> %s\n' '$(1)'

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.DEFAULT_GOAL := build

.PHONY: build
build: programs guest-image ## husk's programs and guest image, in target/husk

.PHONY: programs
programs:
	$(call say,building the programs)
	$(CARGO) build --release --locked -p husk-shim -p husk-vmm -p husk-fsd -p husk-standin -p husk-agent
	@install -d $(addprefix $(OUT)/,$(DIRECTORIES))
	@install -m 755 -C $(addprefix $(TARGET)/release/,containerd-shim-husk-v2 husk) $(OUT)/bin
	@install -m 755 -C $(addprefix $(TARGET)/release/,husk-vmm husk-fsd husk-standin) $(OUT)/libexec/husk
	@install -m 644 -C configs/*.toml configs/*.json $(OUT)/share/husk

.PHONY: guest-image
guest-image: programs
	$(call say,guest image: kernel and initramfs)
	@guest-image/build-kernel -o $(OUT)/lib/husk >/dev/null
	@guest-image/build-initramfs $(TARGET)/release/husk-agent $(OUT)/lib/husk/initramfs.cpio >/dev/null

.PHONY: install
install: ## install what `make` built, under PREFIX (/usr/local)
	@test -e $(OUT)/lib/husk/initramfs.cpio || { echo 'make install: nothing is built yet; run `make` first' >&2; exit 1; }
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,$(DIRECTORIES))
	install -m 755 $(OUT)/bin/* $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(OUT)/libexec/husk/* $(DESTDIR)$(PREFIX)/libexec/husk
	install -m 644 $(OUT)/lib/husk/* $(DESTDIR)$(PREFIX)/lib/husk
	install -m 644 $(OUT)/share/husk/* $(DESTDIR)$(PREFIX)/share/husk

.PHONY: uninstall
uninstall: ## remove what `make install` installed
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,containerd-shim-husk-v2 husk)
	rm -rf $(addprefix $(DESTDIR)$(PREFIX)/,libexec/husk lib/husk share/husk)

.PHONY: run
run: build ## a container in a microVM; make run CMD='…' runs that in it
	@tests/run-demo $(if $(value CMD),sh -c '$(subst ','\'',$(value CMD))')

.PHONY: test
test: check unit e2e ## all tests
	$(call say,all tests passed)

.PHONY: check
check: ## formatting and lints
	$(call say,formatting and lints)
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings

.PHONY: unit
unit: ## the tests that need no virtual machine
	$(call say,unit and property tests)
	@guest-image/test
	@tests/run-unit

.PHONY: e2e-programs
e2e-programs:
	$(call say,building the end-to-end suites)
	@mkdir -p $(E2E)
	@$(CARGO) build --release --locked -p husk-tests -p husk-hostile-agent -p husk-hostile-guest --bin probe --bin hostile-agent --bin hostile-guest
	@install -m 755 -C $(addprefix $(TARGET)/release/,probe hostile-guest) $(E2E)
	@guest-image/build-initramfs $(TARGET)/release/hostile-agent $(E2E)/hostile-agent.cpio >/dev/null
	@$(CARGO) build --locked -p husk-vmm -p husk-fsd --features captured
	@install -m 755 -C $(TARGET)/debug/husk-vmm $(E2E)/husk-vmm-captured
	@install -m 755 -C $(TARGET)/debug/husk-fsd $(E2E)/husk-fsd-captured
	@$(CARGO) test --release --locked -p husk-tests --features e2e --test e2e --no-run --message-format=json-render-diagnostics \
		| grep -F "\"kind\":[\"test\"]" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | xargs -I{} install -m 755 -C {} $(E2E)/e2e

.PHONY: e2e
e2e: build e2e-programs ## the end-to-end suites, shared by a host with containerd 1.7 and Docker 26 and one with 2.1
	@tests/run-e2e $(TESTS)

.PHONY: test-long
test-long: build e2e-programs ## what takes longer: a gigabyte of output and of traffic each way, 200,000 files, 200 containers under each containerd; each test under the other containerd, Docker 28, two processors; the kernel built twice
	HUSK_TEST_PART=all HUSK_TEST_FLOOD_MB=1024 HUSK_TEST_FILES=200000 HUSK_TEST_SOAK=200 tests/run-e2e soak:: streams::a_flood volumes::more_files network::load
	HUSK_TEST_PART=away HUSK_SUITES="trixie forky:smp" tests/run-e2e
	guest-image/build-kernel --check-reproducible

.PHONY: fuzz
fuzz: ## look for hostile input that breaks something; make fuzz T=600 takes as many seconds, in all
	$(call say,fuzzing for $(or $(T),300) s in all)
	@tests/run-fuzz $(or $(T),300) $(TARGETS)

.PHONY: bench-program
bench-program:
	@mkdir -p $(E2E)
	$(CARGO) build --release --locked -p husk-tests --bin bench --bin probe
	@install -m 755 -C $(TARGET)/release/bench $(TARGET)/release/probe $(E2E)
	@# Of which the lock-down can be left out, in a directory of their own: users' builds cannot.
	$(CARGO) build --release --locked -p husk-vmm -p husk-fsd --features captured --target-dir target/captured
	@for program in husk-vmm husk-fsd; do install -m 755 -C target/captured/$(notdir $(TARGET))/release/$$program $(E2E)/$$program-bench; done

.PHONY: bench
bench: build bench-program ## husk and runc in turn, in a clock that counts instructions
	@tests/run-bench

.PHONY: host-shell
host-shell: build ## a shell in the test host, with husk installed
	@tests/host/install
	@tests/host/exec -t -- bash -l

.PHONY: clean
clean: ## remove what was built in the checkout; the cache stays
	-@tests/host/stop 2>/dev/null
	rm -rf target
