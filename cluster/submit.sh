#!/usr/bin/env bash
# Submit a pipeline run to the Ray cluster at $RAY_API_SERVER_ADDRESS, follow its log, pass its exit code on.
#
#   cluster/submit.sh -c recipes/pix2pix/facades.yaml --plan         what follows goes to python -m pipeline.run
#   cluster/submit.sh --no-wait -c run.yaml                          submit and return
#   cluster/submit.sh --here                                         the cluster sees this folder (cluster/local.py)
#   cluster/submit.sh --pip -c run.yaml                              install requirements.lock first
#
# This folder is uploaded, without what .gitignore and .rayignore name; objects and results are in a bucket.
# Without --pip the cluster's image is expected to hold requirements.lock (cluster/Dockerfile).
# Exit: 0 done; 1 a stage failed; 2 the config or the data must be fixed (one line says what); 130 stopped; as of the run itself.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,11s/^# \{0,1\}//p' cluster/submit.sh; }

here=no pip=no id="pixloom-$(date -u +%Y%m%d-%H%M%S)-$$" wait=()
while [ $# -gt 0 ]; do
  case "$1" in
    --here) here=yes ;;
    --pip) pip=yes ;;
    --no-wait) wait=(--no-wait) ;;
    --id) id="$2"; shift ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) break ;;
  esac
  shift
done

if [ -z "${RAY_API_SERVER_ADDRESS:-}" ]; then
  echo "RAY_API_SERVER_ADDRESS is not set: name the cluster's dashboard, e.g. http://127.0.0.1:8265" >&2
  exit 2
fi
# `ray job` sends no token unless this is set, even if ~/.ray/auth_token exists.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export RAY_USAGE_STATS_ENABLED=0

# The uploaded folder comes without .git: what was submitted, for the run's tag in MLflow.
commit="$(git rev-parse HEAD 2>/dev/null || true)"
runtime="\"env_vars\": {\"PIXLOOM_COMMIT\": \"$commit\"}"
if [ "$pip" = yes ]; then
  runtime+=', "pip": "requirements.lock"'
fi
bring=(--runtime-env-json "{$runtime}")
if [ "$here" = no ]; then
  bring+=(--working-dir .)
fi

# A job cut off by a lost connection goes on; `ray job logs --follow ID` takes up its log again.
code=0
ray job submit --submission-id "$id" ${wait[@]+"${wait[@]}"} ${bring[@]+"${bring[@]}"} \
  -- python -m pipeline.run "$@" || code=$?

# `ray job submit` says 1 for every failure and 0 for a stopped job; the run's own code is in the status.
if [ ${#wait[@]} -eq 0 ]; then
  status="$(ray job status "$id" 2>&1 || true)"
  case "$status" in
    *"failed with exit code "*)
      code="${status#*failed with exit code }"
      code="${code%%[!0-9]*}"
      ;;
    *"was stopped"*) code=130 ;;
  esac
fi
exit "$code"
