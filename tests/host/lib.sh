# shellcheck shell=bash
# Shared by the scripts of the test host; sourced, never run. Bash, `set -euo pipefail` is the caller's.

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd -- "$here/../.." && pwd)

# Heavy artifacts live outside the checkout, named by the hash of what they are made from.
HUSK_CACHE=${HUSK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/husk}
export HUSK_CACHE
host_cache=$HUSK_CACHE/test-host

say() { printf 'test host: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Runs the calling script again as root when it is not: making root file systems, mounting and chroot need it.
# Arguments: the script's own.
be_root() {
    [ "$(id -u)" = 0 ] && return
    command -v sudo >/dev/null || die "this must run as root, and sudo is not there: run it as root"
    exec sudo --preserve-env=HUSK_CACHE,HUSK_HOST,HUSK_HOST_IDLE,TERM -- "$0" "$@"
}

# Installs the Debian packages that bring the given commands, when a command is missing. Arguments: COMMAND=PACKAGE…
need() {
    local missing=() pair
    for pair in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} = 0 ] && return
    say "installing ${missing[*]}"
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "${missing[@]}"; } >&2 ||
        die "cannot install ${missing[*]}: install them by hand"
}

# The Debian archive this machine's apt uses, so that the images come from where the machine's own packages come from.
debian_mirror() {
    local codename uri
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    uri=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v c="$codename" '$2 == "main" && ($1 == c || $1 ~ /^(stable|testing|oldstable)$/) { print $3; exit }')
    # Cloud images name their mirrors in a file of their own.
    case $uri in mirror+file:*) uri=$(awk '/^[^#]/ { print $1; exit }' "${uri#mirror+file:}") ;; esac
    [ -n "$uri" ] || die "apt has no source for Debian $codename main: add one, then run this again"
    printf '%s\n' "${uri%/}"
}

# A Debian root file system: debian_root SUITE TARGET PACKAGE[,PACKAGE…] [mmdebstrap option…].
# TARGET is a directory or a .tar. Signatures are always checked.
debian_root() {
    local suite=$1 target=$2 packages=$3 proxy options=()
    shift 3
    need mmdebstrap=mmdebstrap
    for proto in http https; do
        proxy=$(apt-config dump --format '%v%n' "Acquire::$proto::Proxy" 2>/dev/null | head -n1)
        [ -z "$proxy" ] || options+=("--aptopt=Acquire::$proto::Proxy \"$proxy\"")
    done
    # The testing suite's index carries an end date that a mirror may let pass.
    case $suite in forky) options+=('--aptopt=Acquire::Check-Valid-Until "false"') ;; esac
    # INITRD=No: the kernel's package would spend a minute on an initramfs that nothing boots.
    INITRD=No SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --mode=root --variant=minbase \
        --aptopt='Apt::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "5"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        "${options[@]}" --include="$packages" "$@" \
        "$suite" "$target" "deb $(debian_mirror) $suite main" >&2
}

# The hash of the arguments and of stdin: hash_of WORD… <CONTENT
hash_of() { { printf "%s\0" "$@"; cat; } | sha256sum | cut -c1-16; }

# Makes a cache entry once: cached NAME FUNCTION [ARGUMENT…] prints the entry's directory. FUNCTION is called as
# `FUNCTION DIR ARGUMENT…` with an empty DIR, which becomes the entry only when FUNCTION succeeds.
cached() {
    local name=$1 entry=$host_cache/$1 tmp=$host_cache/.$1.tmp
    shift
    if [ ! -d "$entry" ]; then
        mkdir -p "$host_cache"
        # One maker at a time; the second one finds the entry there. A maker that was killed leaves its
        # temporary directory to the next.
        exec {lock}>"$host_cache/.$name.lock"
        flock --nonblock "$lock" || { say "waiting for another process to make $name"; flock "$lock"; }
        if [ ! -d "$entry" ]; then
            rm -rf --one-file-system "$tmp"
            mkdir "$tmp"
            local start=$SECONDS
            say "making $name (once; kept in $host_cache)"
            # Not as a condition, where errexit would be off.
            set +e
            ( set -e; "$1" "$tmp" "${@:2}" ) {lock}>&-
            local status=$?
            set -e
            [ $status = 0 ] || { rm -rf --one-file-system "$tmp"; die "making $name failed"; }
            mv -T "$tmp" "$entry"
            say "made $name in $((SECONDS - start)) s"
            # Its forerunners that nobody used for a week are not needed again.
            find "$host_cache" -mindepth 1 -maxdepth 1 -type d -name "${name%-*}-*" -mtime +7 -exec rm -rf --one-file-system {} +
        fi
        rm -f "$host_cache/.$name.lock"
        exec {lock}>&-
    fi
    touch "$entry" 2>/dev/null || true
    printf '%s\n' "$entry"
}
