#!/usr/bin/env bash
# Builds the image and runs it, without a Docker engine: buildah builds, debootstrap makes the base, chroot and
# namespaces run it, as another user, without capabilities and with nothing writable but /tmp. Prints what docs/docker.md
# shows. Needs root, and `apt-get install buildah debootstrap`.
#
#   TARGET           cpu (default) or cuda
#   TORCH_INDEX_URL  where torch comes from; empty: where everything else does. Unset: the Dockerfile's default
#   EXTRAS           of the package; unset: the Dockerfile's default
#   PIP_CONF         pip's settings for the build (mounted, in no layer); unset: what `pip config` says here
#   MIRROR           of Debian
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
readonly TARGET=${TARGET:-cpu} MIRROR=${MIRROR:-http://deb.debian.org/debian}
readonly BASE=localhost/vision-service-base:bookworm IMAGE=localhost/vision-service:$TARGET
readonly CLIENT=${CLIENT:-.venv/bin/vision-service}
work=$(mktemp -d)
container='' init=''

clean_up() {
  [ -z "$init" ] || kill -KILL "$init" 2>/dev/null || true
  [ -z "$container" ] || { buildah umount "$container" && buildah rm "$container"; } >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean_up EXIT

say() { printf '%s\n' "$*"; }
size_of() { du -sc --si --apparent-size "$@" 2>/dev/null | tail -1 | cut -f1; }
seconds_since() { awk -v a="$1" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }'; }

make_base() {
  buildah inspect --type image "$BASE" >/dev/null 2>&1 && return
  debootstrap --variant=minbase bookworm "$work/base" "$MIRROR" >"$work/debootstrap.log"
  rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/*
  local empty
  empty=$(buildah from scratch)
  buildah add --quiet "$empty" "$work/base" / >/dev/null
  buildah commit --quiet --rm "$empty" "$BASE" >/dev/null
  rm -rf "$work/base"
}

# What pip is set up with on this machine, less what lies on its disk, for the time of the build.
pip_secrets() {
  local config cert
  config=$(python3 -m pip config list)
  if [ -n "${PIP_CONF:-}" ]; then
    cp "$PIP_CONF" "$work/pip.conf"
  else
    printf '[global]\n' >"$work/pip.conf"
    sed -nE "/file:/d; s/^global\.((extra-)?index-url|proxy|trusted-host)='([^']*)'$/\1 = \3/p" <<<"$config" >>"$work/pip.conf"
    ! grep -q '\.cert=' <<<"$config" || printf 'cert = /run/secrets/ca_bundle\n' >>"$work/pip.conf"
  fi
  cert=$(sed -nE "s/^[^=]*\.cert='([^']*)'$/\1/p" <<<"$config" | head -1)
  cp "${cert:-/dev/null}" "$work/ca.pem"
}

build() {
  local arguments=(--format docker --layers --file docker/Dockerfile --target "$TARGET" --build-arg "BASE_IMAGE=$BASE")
  [ -z "${TORCH_INDEX_URL+set}" ] || arguments+=(--build-arg "TORCH_INDEX_URL=$TORCH_INDEX_URL")
  [ -z "${EXTRAS+set}" ] || arguments+=(--build-arg "EXTRAS=$EXTRAS")
  arguments+=(--secret "id=pip_conf,src=$work/pip.conf" --secret "id=ca_bundle,src=$work/ca.pem")
  buildah build "${arguments[@]}" --tag "$IMAGE" . >"$work/build.log" 2>&1 || { tail -40 "$work/build.log"; return 1; }
}

image_env() { buildah inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$IMAGE" | grep .; }

# As the image's user: no capabilities, none to be gained.
as_user() { printf '%s\0' setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all; }

serve() {
  local root=$1 port=$2
  mapfile -t environment < <(image_env)
  mapfile -d '' -t user < <(as_user)
  ROOT=$root unshare --mount --pid --fork -- sh -euc '
    mount --make-rprivate /
    mount --bind "$ROOT" "$ROOT"
    mount -t proc proc "$ROOT/proc"
    mount --rbind /dev "$ROOT/dev"
    mount -t tmpfs -o size=64m,mode=1777 tmpfs "$ROOT/tmp"
    mount -o remount,ro,bind "$ROOT"
    exec chroot "$ROOT" env -i "$@"
  ' sh "${environment[@]}" VISION_SERVICE_HOST=127.0.0.1 "VISION_SERVICE_PORT=$port" \
    "${user[@]}" tini -- vision-service serve >"$work/serve.log" 2>&1 &
  launcher=$!
  until init=$(pgrep -P "$launcher"); do sleep 0.05; done
}

# The image's own health check, where the server runs.
health() {
  mapfile -d '' -t user < <(as_user)
  mapfile -t environment < <(image_env)
  nsenter --target "$init" --mount --pid --root --wd=/ env -i "${environment[@]}" "VISION_SERVICE_PORT=$1" \
    "${user[@]}" vision-service health
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start_up() {
  local root=$1 port=$2 started
  started=$(date +%s.%N)
  serve "$root" "$port"
  until grep -q '^ready on' "$work/serve.log"; do
    kill -0 "$launcher" 2>/dev/null || { cat "$work/serve.log"; return 1; }
    sleep 0.05
  done
  say "ready after $(seconds_since "$started") s"
}

stop() {
  local code=0
  kill -TERM "$init"
  wait "$launcher" || code=$?
  init=''
  say "exit code after SIGTERM: $code"
  return "$code"
}

say "--- build of target $TARGET"
started=$(date +%s.%N)
make_base
pip_secrets
build
say "built in $(seconds_since "$started") s (layers that had not changed were taken from the last build)"
say "size: $(buildah images --format '{{.Size}}' "$IMAGE"), of which the Debian base $(buildah images --format '{{.Size}}' "$BASE")"
say "user: $(buildah inspect --type image --format '{{.OCIv1.Config.User}}' "$IMAGE")"
say "health check: $(buildah inspect --type image --format '{{.Docker.Config.Healthcheck.Test}}' "$IMAGE")"
container=$(buildah from "$IMAGE")
root=$(buildah mount "$container")
packages=$(echo "$root"/opt/venv/lib/python3*/site-packages)
say "in it: CUDA's libraries and compiler $(size_of "$packages"/nvidia "$packages"/triton), torch $(size_of "$packages"/torch), other packages" \
  "$(size_of "$root/opt/venv" --exclude nvidia --exclude triton --exclude torch), vision-service with four models $(size_of "$root/opt/app")"

say "--- serve, as $(buildah inspect --type image --format '{{.OCIv1.Config.User}}' "$IMAGE"), without capabilities, with a read-only root and no cache"
port=$(free_port)
start_up "$root" "$port"
say "in the container: $(nsenter --target "$init" --mount --root --wd=/ touch /var/cache/vision-service/x 2>&1 || true)"
say "processes: $(ps -o user:6,args --no-headers --ppid "$init")"
say "health: $(health "$port")"
started=$(date +%s.%N); health "$port" >/dev/null; say "a health check takes $(seconds_since "$started") s"
"$CLIENT" client detect samples/astronaut.jpg --address "127.0.0.1:$port"
"$CLIENT" models list --address "127.0.0.1:$port"
say "--- SIGTERM while a call is under way"
"$CLIENT" client translate samples/coffee.jpg --address "127.0.0.1:$port" >"$work/late.log" 2>&1 &
caller=$!
until grep -q . <(ss -Htn state established "( dport = :$port )"); do sleep 0.02; done
sleep 0.3
stop
wait "$caller" && say "the call under way was answered: $(cat "$work/late.log")"
port=$(free_port)
say "--- again, with the files in the machine's page cache"
start_up "$root" "$port"
stop

say "--- batch: predict over a mounted folder, by buildah run"
install --directory --owner=10001 "$work/results"
buildah run --user 10001:10001 --volume "$PWD/samples:/images:ro" --volume "$work/results:/results" "$container" -- \
  vision-service predict /images --task detect --output /results
say "results.jsonl: $(wc -l <"$work/results/results.jsonl") lines; owner: $(stat -c %u "$work/results/results.jsonl")"
