#!/usr/bin/env bash
# Run Airflow on this machine for one user: web page, scheduler and tasks. `make airflow` calls this.
# Variables that are already set are kept: AIRFLOW_HOME, AIRFLOW__API__PORT, AIRFLOW_VAR_MOL_DISTILL_…
# and every other setting of Airflow, except AIRFLOW__CORE__DAGS_FOLDER.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PATH=$root/.venv-airflow/bin:$PATH

export AIRFLOW_HOME=${AIRFLOW_HOME:-$root/runs/airflow}
secret=$AIRFLOW_HOME/jwt-secret # signs the tokens between Airflow's own processes
(
  umask 077
  mkdir -p "$AIRFLOW_HOME"
  [ -s "$secret" ] || head -c 64 /dev/urandom | base64 -w 0 >"$secret"
)

export AIRFLOW__API__HOST=${AIRFLOW__API__HOST:-127.0.0.1} # only this machine can connect
export AIRFLOW__API__PORT=${AIRFLOW__API__PORT:-8080}
url=http://127.0.0.1:$AIRFLOW__API__PORT
export AIRFLOW__API__BASE_URL=${AIRFLOW__API__BASE_URL:-$url}
export AIRFLOW__CORE__EXECUTION_API_SERVER_URL=${AIRFLOW__CORE__EXECUTION_API_SERVER_URL:-$url/execution/}
export AIRFLOW__API_AUTH__JWT_SECRET=${AIRFLOW__API_AUTH__JWT_SECRET:-$(cat "$secret")}
export AIRFLOW__CORE__DAGS_FOLDER=$root/pipeline/dags
export AIRFLOW__CORE__LOAD_EXAMPLES=${AIRFLOW__CORE__LOAD_EXAMPLES:-False}
export AIRFLOW__CORE__PARALLELISM=${AIRFLOW__CORE__PARALLELISM:-8}

export AIRFLOW_VAR_MOL_DISTILL_PYTHON=${AIRFLOW_VAR_MOL_DISTILL_PYTHON:-$root/.venv/bin/python}
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ' || true)
gpus=${AIRFLOW_VAR_MOL_DISTILL_GPUS:-$gpus}
[ -z "$gpus" ] || export AIRFLOW_VAR_MOL_DISTILL_GPUS=$gpus

airflow db migrate
if [ ! -e "$AIRFLOW_HOME/pool-made" ]; then # once, so that a change in the web page stays
  slots=$(wc -w <<<"$gpus")
  airflow pools set gpu "$((slots > 0 ? slots : 1))" "a slot for each GPU"
  touch "$AIRFLOW_HOME/pool-made"
fi

# Like `airflow standalone`, but without its log servers, which would listen on the network, and
# without the triggerer, which these DAGs do not use. When one process ends, all are stopped.
trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT TERM
airflow dag-processor &
airflow scheduler --skip-serve-logs &
airflow api-server &
echo "Airflow will be at $AIRFLOW__API__BASE_URL in a minute; Ctrl-C stops it. User and password are in"
echo "$AIRFLOW_HOME/simple_auth_manager_passwords.json.generated"
wait -n
