#!/bin/sh
# What the image has beside the code: system packages, the user ray, the packages of requirements.lock.
#
#   DEVICE=gpu|cpu [EXTRA="PACKAGE ..."] sh install.sh requirements.lock
#
# As root, in a Debian with Python and pip. cluster/Dockerfile runs it, and .ci/image in a fresh Debian.
set -eu
lock=$1

# wget: KubeRay's probes; rsync: `ray up` copies into the container with it; g++: torch.compile.
apt-get update
apt-get install -y --no-install-recommends ca-certificates g++ procps rsync wget
rm -rf /var/lib/apt/lists/*
id ray >/dev/null 2>&1 || useradd --create-home --uid 1000 ray

# Into the system's Python, not an environment: `ray up` and older KubeRay use login shells, which reset PATH.
# Debian's own Python asks for the permission; the one of Docker's python images has no such question.
export PIP_BREAK_SYSTEM_PACKAGES=1
case "${DEVICE}" in
    gpu) ;;
    cpu) # torch alone is looked up in that index; here it satisfies the lock without CUDA's libraries
        torch=$(grep "^torch==" "${lock}")
        pip install --no-cache-dir --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "${torch}" ;;
    *) echo "DEVICE is gpu or cpu, not ${DEVICE}" >&2; exit 1 ;;
esac
pip install --no-cache-dir --constraint "${lock}" --requirement "${lock}" ${EXTRA:-}
