# make build   the release binary, at target/release/mote
# make test    everything that CI checks: structure, format, lints, documentation, unit and boot tests
# make demo    install what is missing, build, and run one box from a spec file
# make install   put it below PREFIX (/usr/local), with man pages and completions; make uninstall
# make deb     the Debian package, judged by lintian; make deb-test installs it in a fresh tree and runs a box
# make bench   start-up side by side with other VMMs, into the README (ARGS=--keep leaves it as it is)
#              PROFILE=1: instead, where the instructions of mote's start go, by thread and by function
# make bench-fs   files side by side with QEMU microvm and virtiofsd, into the README
# make bench-density   memory and wake-ups of many boxes side by side with QEMU microvm, into the README
# make bench-streams   published ports and commands side by side with QEMU microvm and vhost-vsock, into the README
# make bench-net   the network side by side with QEMU microvm on passt
# make used-functions   find out again which functions of the guest's kernel boxes run (resources/kernel/used-functions)
# make start-order   find out again which of mote's own functions starts use (resources/start-order)
# make soak    boxes with random faults (BOOTS=100 SEED=1 PARALLEL=2, further options in ARGS)
# make soak-flood   ten minutes of vsock flood, and 1,000 commands: does mote's memory stay flat?
#              (ARGS='SECONDS COMMANDS' instead)
# make lab     a shell where /dev/kvm is complete (ARGS='command …' runs that instead)
# make deny    advisories, licences and sources of the dependencies
# make manual  the man pages and completions that mote prints, by groff and the shells
# make reproducible   the guest's files, built twice, have the same bytes
# make fuzz    fuzz what guests and clients drive, FUZZ_S seconds each (ARGS='target …' for some)
# make sanitize   the unit tests under AddressSanitizer
# make miri    unit tests of what guests and clients drive, interpreted: no undefined behaviour, in dependencies either
# make tools   install what the tests need, saying what and why

TARGET := x86_64-unknown-linux-gnu
WITH_KVM := $(CURDIR)/tests/lab/with-kvm.sh

.PHONY: build test demo bench bench-fs bench-density bench-streams bench-net used-functions start-order soak soak-flood lab tools check unit manual boots fuzz sanitize miri deny \
	reproducible install uninstall deb deb-test clean

build:
	resources/tools.sh build
	resources/kernel-progress.sh >/dev/null
	cargo build --locked --release
	mkdir -p target/release
	cp -f target/$(TARGET)/release/mote target/release/mote.new
	mv -f target/release/mote.new target/release/mote

test: tools build check deny unit manual boots

# What somebody needs who works on mote; the other targets install what they need themselves.
tools:
	resources/tools.sh build box lab test bench deny

# Groups of resources/tools.sh. with-kvm.sh installs the lab where there has to be one.
tools-%:
	resources/tools.sh $(subst -, ,$*)

check:
	tests/structure.py
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

unit:
	cargo test --locked --workspace --lib --bins

manual: tools-test build
	tests/manual.sh

boots:
	tests/boots.sh $(ARGS)

export FUZZ_S ?= 10

fuzz: tools-build
	tests/fuzz.sh $(ARGS)

# RUSTFLAGS takes the place of .cargo/config.toml's: the sanitizer's runtime cannot be linked
# statically. The option is an unstable one, which the release compiler is told to take.
sanitize: tools-build-test
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address \
		cargo test --locked --workspace --lib --bins --target-dir target/sanitize $(ARGS)

# What Miri can run: no polls, processes or namespaces. What tries all cases is left out, since Miri takes a
# thousand times as long.
MIRI_TESTS := virtio::queue virtio::buffers virtio::vsock::conn virtio::vsock::packet spec:: boot::tests
MIRI_TOO_LONG := every_chain every_distance every_position no_order positions_wrap the_driver_is credit_is_what \
	streams_go_on that_grows fuzz

miri: export MIRIFLAGS = -Zmiri-disable-isolation
miri:
	@cargo +nightly miri --version >/dev/null 2>&1 || { echo "make miri: there is no Miri here; install it: \
	rustup toolchain install nightly --profile minimal --component miri,rust-src" >&2; exit 1; }
	cargo +nightly miri test --locked --target-dir target/miri -p mote-agent --lib
	cargo +nightly miri test --locked --target-dir target/miri -p mote --lib -- \
		$(MIRI_TESTS) $(MIRI_TOO_LONG:%=--skip %)

demo: build tools-box
	MOTE_TEST_DEBIAN="$$(tests/rootfs.sh)" $(WITH_KVM) tests/demo.sh

bench: build tools-bench
	MOTE_BENCH_KERNEL="$$(resources/kernel.sh)" MOTE_BENCH_VIRTIOFSD="$$(resources/tools.sh virtiofsd)" tests/bench/start.py \
		$(if $(PROFILE),--profile) $(ARGS)

BENCH_OF_bench-fs := files
BENCH_OF_bench-density := density
BENCH_OF_bench-streams := streams
BENCH_OF_used-functions := functions
BENCH_OF_start-order := order

bench-fs bench-density bench-streams used-functions start-order: build tools-bench
	MOTE_BENCH_KERNEL="$$(resources/kernel.sh)" MOTE_BENCH_VIRTIOFSD="$$(resources/tools.sh virtiofsd)" \
		tests/bench/$(BENCH_OF_$@).py $(ARGS)

# With two processors, since a box and what serves it run at once.
bench-net: export LAB_CPUS = 2

bench-net: build tools-box-bench
	MOTE_TEST_DEBIAN="$$(tests/rootfs.sh)" MOTE_BENCH_KERNEL="$$(resources/kernel.sh)" \
		MOTE_BENCH_VIRTIOFSD="$$(resources/tools.sh virtiofsd)" $(WITH_KVM) tests/bench/network.py

soak: build tools-box-lab-test
	tests/soak.py --boots $(or $(BOOTS),100) --seed $(or $(SEED),1) --parallel $(or $(PARALLEL),2) $(ARGS)

soak-flood: build tools-box-test
	LAB_LIMIT_S=3000 $(WITH_KVM) tests/flood.py $(ARGS)

lab: tools-box-lab
	tests/lab/lab.sh $(ARGS)

deny:
	tests/deny.sh

reproducible: tools-build
	tests/reproducible.sh

PREFIX ?= /usr/local

# Of what `make build` has made, so that only this needs root.
install uninstall:
	resources/install.sh $@ "$(DESTDIR)$(PREFIX)"

deb: build
	resources/debian/deb.sh

deb-test: build tools-box
	MOTE_DEB="$$(resources/debian/deb.sh)" MOTE_TEST_DEBIAN="$$(tests/rootfs.sh)" $(WITH_KVM) tests/deb.sh

clean:
	cargo clean
