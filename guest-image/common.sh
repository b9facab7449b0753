#!/bin/bash
# Functions the scripts of guest-image share; sourced, not run.
#
# Inputs:  HUSK_CACHE, XDG_CACHE_HOME, HOME (environment)
# Outputs: functions; the variable `cache`, the directory of heavy artifacts
#
# Every script speaks to its user on stderr and prints its result, a path, as the last line of stdout.

# shellcheck disable=SC2034  # used by the scripts that source this file
cache=${HUSK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/husk}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Runs a command as root: directly when we are root, else through sudo.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "this step needs root: run as root, or install sudo"
    fi
}

# lock NAME: waits until no other process holds the lock NAME in the cache, then holds it until this process and
# those it started have ended.
lock() {
    mkdir -p "$cache"
    exec {lock_fd}>"$cache/$1.lock"
    if ! flock -n "$lock_fd"; then
        say "another process is making $1; waiting for it"
        flock "$lock_fd"
    fi
}

# The Debian version of package $2 installed in root $1.
package_version() {
    dpkg-query --admindir="$1/var/lib/dpkg" -W -f='${Version}' "$2"
}
