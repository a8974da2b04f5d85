#!/usr/bin/env bash
# All that is measured on a GPU, in nine minutes: benchmarks/on_gpu.sh FOLDER [DATA SET]
#
# Every step has its own limit and writes its file when it ends, so that a machine that goes away
# leaves what was measured before. PyTorch runs where it is installed; a step that fails is said
# and the next one runs. STEPS names some of the steps only; DEVICE=cpu and SMOKE=1 try the script
# itself, in a few minutes and with numbers that mean nothing.
set -u
OUT=${1:?folder for the results}
DATA=${2:-cifar10}
DEVICE=${DEVICE:-gpu}
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-machine warm throughput large bfloat16 graph replicas profile commands seeds}
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

SMALL=tutorial:4,dropout:20,adam:128,deep:16
LARGE=dropout:512,dropout:2048
PEERS=eager,eager_channels_last,cudagraph,cudagraph_channels_last
TIMING=(--rounds 5 --seconds 0.3)
REPLICAS=1,16,64,256 DROPOUTS=64
EPOCHS=
if [ -n "${SMOKE:-}" ]; then
    SMALL=tutorial:4 LARGE=dropout:512 PEERS=eager,cudagraph REPLICAS=2 DROPOUTS=2
    TIMING=(--rounds 1 --seconds 0.02)
    EPOCHS=1 SEEDS=2
fi
COMMON=(--device "$DEVICE" --dataset "$DATA")

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

# limited NAME SECONDS COMMAND...: its output goes to NAME.txt.
limited() {
    local name=$1 seconds=$2 status=0
    shift 2
    echo "== $SECONDS s: $name"
    timeout "$seconds" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    [ $status = 0 ] || { echo "$name: status $status"; tail -n 3 "$OUT/$name.txt"; }
}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

if wanted machine; then
    { date; nvidia-smi; lscpu; "$PYTHON" -m pip list; git rev-parse HEAD; } >"$OUT/machine.txt" 2>&1
fi
if wanted warm; then # nothing is timed here: programs are compiled side by side, for all later steps
    echo "== $SECONDS s: warm"
    for case in ${SMALL//,/ } ${LARGE//,/ }; do
        timeout 100 "$PYTHON" -m benchmarks.throughput "${COMMON[@]}" --cases "$case" \
            --ours ours --peers eager --rounds 1 --seconds 0.02 >"$OUT/warm.txt" 2>&1 &
    done
    for case in ${LARGE//,/ }; do
        timeout 100 "$PYTHON" -m benchmarks.throughput "${COMMON[@]}" --cases "$case" \
            --precision bfloat16 --peers eager --rounds 1 --seconds 0.02 >"$OUT/warm.txt" 2>&1 &
    done
    wait
fi
wanted throughput && limited throughput 150 "$PYTHON" -m benchmarks.throughput "${COMMON[@]}" \
    --cases $SMALL --ours "${OURS:-ours}" --peers $PEERS "${TIMING[@]}" --out "$OUT/throughput.json"
wanted large && limited large 90 "$PYTHON" -m benchmarks.throughput "${COMMON[@]}" \
    --cases $LARGE --ours "${OURS_LARGE:-ours}" --peers $PEERS "${TIMING[@]}" --out "$OUT/large.json"
wanted bfloat16 && limited bfloat16 60 "$PYTHON" -m benchmarks.throughput "${COMMON[@]}" \
    --precision bfloat16 --cases $LARGE --peers eager,eager_channels_last,cudagraph_channels_last \
    "${TIMING[@]}" --out "$OUT/bfloat16.json"
wanted compile && limited compile 70 "$PYTHON" -m benchmarks.throughput "${COMMON[@]}" \
    --cases tutorial:4 --peers compile,compile_reduce_overhead,cudagraph "${TIMING[@]}" \
    --out "$OUT/compile.json"
wanted replicas && limited replicas 80 "$PYTHON" -m benchmarks.replicas "${COMMON[@]}" \
    --case tutorial:4 --replicas $REPLICAS --forms vmap "${TIMING[@]}" --out "$OUT/replicas.json"
wanted replicas && limited replicas_dropout 40 "$PYTHON" -m benchmarks.replicas "${COMMON[@]}" \
    --case dropout:20 --replicas "$DROPOUTS" --forms vmap "${TIMING[@]}" \
    --out "$OUT/replicas_dropout.json"
wanted profile && limited profile 40 "$PYTHON" -m benchmarks.profile_step "${COMMON[@]}" \
    --cases tutorial:4,dropout:20 --out "$OUT/profile.csv"
if wanted commands; then
    limited train_dropout 40 "$PYTHON" -m cifar_jax.train "${COMMON[@]}" --recipe dropout ${EPOCHS:+--epochs $EPOCHS} \
        --workdir "$WORK/dropout"
    limited commands 80 "$PYTHON" -m benchmarks.end_to_end "${COMMON[@]}" --runs "adam:${EPOCHS:-10}" \
        --sides ours,eager_channels_last,cudagraph_channels_last --out "$OUT/commands.json"
fi
if wanted seeds; then
    limited seeds_tutorial 60 "$PYTHON" -m cifar_jax.train "${COMMON[@]}" --recipe tutorial ${EPOCHS:+--epochs $EPOCHS} \
        --seeds 0:${SEEDS:-64} --workdir "$WORK/tutorial"
    limited seeds_dropout 60 "$PYTHON" -m cifar_jax.train "${COMMON[@]}" --recipe dropout ${EPOCHS:+--epochs $EPOCHS} \
        --seeds 0:${SEEDS:-16} --workdir "$WORK/dropouts"
fi
for run in "$WORK"/*/; do
    name=$(basename "$run")
    for file in summary.json results.csv; do
        [ -f "$run/$file" ] && cp "$run/$file" "$OUT/$name.$file"
    done
done
echo "== $SECONDS s: end"
