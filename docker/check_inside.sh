#!/usr/bin/env bash
# Run inside the image by image_check.sh: a head, its health check as the image defines it, and a submitted job that ends well.
set -euo pipefail
export RAY_AUTH_MODE=disabled RAY_TMPDIR=/tmp OMP_NUM_THREADS=1
unset PYTHONPATH
ray start --head --block --port=6399 --dashboard-host=127.0.0.1 --dashboard-port=8299 --num-cpus=2 \
  --object-store-memory=100000000 > /tmp/head.log 2>&1 &
head=$!
trap 'kill $head; wait $head 2> /dev/null || true' EXIT
healthy() {
  python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:52365/api/local_raylet_healthz', timeout=4)" 2> /dev/null
}
for _ in $(seq 60); do healthy && break; sleep 1; done
healthy || { tail -20 /tmp/head.log; echo "the health check never passed"; exit 1; }
echo "healthy after $SECONDS s"
ray job submit --address http://127.0.0.1:8299 -- autolrs run digits_job --steps 120 --storage /runs
autolrs show /runs/digits
echo "job done after $SECONDS s"
