# shellcheck shell=bash disable=SC2034
# Shared by the scripts of ci/: paths, messages, and the guest's machine.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$repo/target}
venv=${VHOST_VENV:-$repo/target/venv}
# Programs that are compiled because no package has them.
tools=$target/tools
# What is costly to make and may be thrown away: guest images, decisions about this machine.
cache=$repo/target/ci
export PATH=$PATH:/usr/sbin:/sbin:$tools/bin

say() { echo "${0##*/}: $*" >&2; }

die() {
    say "$*"
    exit 1
}

# The profile of the programs that scripts start. ci/run sets VHOST_PROFILE, and its part ci/programs builds them.
profile=${VHOST_PROFILE:-release}
programs=$target/$profile

# Builds programs that a script starts, with cargo's options.
build() {
    [ -n "${VHOST_PROFILE:-}" ] || cargo build --locked --profile "$profile" "$@"
}

# Whether this process may use core 1; core 0 is for everything that is not a reactor.
reactor_mask() {
    if taskset -c 1 true 2>/dev/null; then echo 0x2; else echo 0x1; fi
}

# Reports that a script which needs $1 is skipped, with the reason $2; fails if VHOST_REQUIRE lists $1. The crate
# test-report does the same for tests.
skip() {
    case ,${VHOST_REQUIRE:-}, in
    *,"$1",*) die "VHOST_REQUIRE names $1: $2" ;;
    esac
    say "skipped: no $1: $2"
    [ -z "${VHOST_SKIPS:-}" ] || printf 'skipped\tci/%s\tno %s: %s\n' "${0##*/}" "$1" "$2" >>"$VHOST_SKIPS"
}

# Prints the programs of a Ceph cluster that this machine lacks.
ceph_lacks() {
    local program missing=()
    for program in ceph-mon ceph-osd ceph-authtool monmaptool ceph rbd; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    echo "${missing[*]}"
}

# Sets the environment of tests with a guest: VHOST_KERNEL and VHOST_INITRD (the guest), VHOST_ACCEL (kvm or tcg),
# VHOST_VENV (its bin/spdk-rpc is the RPC client).
guest_environment() {
    VHOST_KERNEL=$("$repo/ci/guest-image")
    VHOST_ACCEL=$("$repo/ci/qemu-accel")
    export VHOST_KERNEL VHOST_ACCEL VHOST_INITRD=$cache/initrd VHOST_VENV=$venv
}

# Sets the array `machine` to the command line of a guest without its disk.
# $1: kvm or tcg; $2: kernel; $3: initramfs; $4: job.
guest_machine() {
    machine=(
        qemu-system-x86_64 -nodefaults -display none -serial stdio -monitor none -no-reboot
        -accel "$1" -machine q35 -m 256M
        -object "memory-backend-memfd,id=m,size=256M,share=on" -numa "node,memdev=m"
        -kernel "$2" -initrd "$3"
        -append "console=ttyS0 panic=-1 quiet no_timer_check rdinit=/init job=$4"
    )
}

# What ci/programs builds. Always together, because packages alone have other features of their dependencies, which would
# be compiled again.
e2e_packages=(-p vhost-app -p bench -p vhost-top -p vhost-lvs -p rbd)

# Runs the end-to-end tests of the modules that the regular expression $2 matches, or of all others if $1 is "not ".
# One test at a time, because a test needs a core for the reactor and one for the guest.
run_e2e() {
    local modules="^($2)::" names selection=(--locked "${e2e_packages[@]}" --test e2e)
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --cargo-profile e2e "${selection[@]}" --test-threads 1 --no-fail-fast -E "$1test(/$modules/)"
    else
        mapfile -t names < <(cargo test --profile e2e "${selection[@]}" -- --list --format terse |
            sed -n 's/: test$//p' | grep ${1:+-v} -E "$modules")
        [ ${#names[@]} -gt 0 ] || die "no end-to-end test matches $1$modules"
        cargo test --profile e2e "${selection[@]}" -- --test-threads 1 --exact "${names[@]}"
    fi
}
