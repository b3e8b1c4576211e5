#!/usr/bin/env bash
# Builds docker/Dockerfile without a container engine, starts a Ray head inside and submits a job to it.
#   docker/image_check.sh [IMAGE]    only checks IMAGE, where it is given and built already
# BASE_IMAGE, PIP_CERT, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL are passed on where they are set. Needs root and buildah.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "image-check: $*" >&2; exit 1; }
command -v buildah > /dev/null || fail "buildah is not installed (apt-get install buildah runc); nothing was built or checked"
[ "$(id -u)" = 0 ] || fail "chroot isolation needs root; nothing was built or checked"
export STORAGE_DRIVER="${STORAGE_DRIVER:-overlay}"

image="${1:-}"
if [ -z "$image" ]; then
  image=localhost/autolrs-ray:check
  options=(--file docker/Dockerfile --tag "$image" --layers --isolation chroot --format docker)
  for name in BASE_IMAGE PIP_CERT PIP_FIND_LINKS PIP_EXTRA_INDEX_URL; do
    [ -z "${!name:-}" ] || options+=(--build-arg "$name")
  done
  for path in "${PIP_CERT:+$(dirname "${PIP_CERT:-.}")}" "${PIP_FIND_LINKS:-}"; do
    [ ! -d "$path" ] || options+=(--volume "$path:$path:ro")
  done
  timeout "${BUILD_TIMEOUT:-1800}" buildah bud "${options[@]}" . || fail "the build failed"
fi

container=$(buildah from "$image")
trap 'buildah rm "$container" > /dev/null' EXIT
buildah copy --quiet "$container" docker/check_inside.sh /tmp/check_inside.sh > /dev/null
[ "$(buildah run --isolation chroot "$container" -- id -u)" = 1000 ] || fail "the image runs as root"
# The loopback network and process numbers of its own, so that no other Ray on this machine is seen or disturbed.
timeout "${CHECK_TIMEOUT:-300}" tools/sandboxed buildah run --isolation chroot "$container" -- bash /tmp/check_inside.sh \
  || fail "the job in the image failed"
echo "image-check: $image is fit"
