#!/usr/bin/env bash
# What needs a GPU, in under ten minutes, a section at a time:
#
#   bash benchmarks/gpu_suite.sh                      tests tune bench train
#   bash benchmarks/gpu_suite.sh tune bench           only these
#   bash benchmarks/gpu_suite.sh pipeline parity      the rest, not run without arguments
#
#   tests     the tests marked gpu
#   tune      every configuration of every kernel; into $GLIOFORGE_CACHE
#   bench     the kernels' benchmarks
#   train     the demo, and a training step of UNETR at the published size beside a plain MONAI loop: its parts, its
#             time and memory by precision, compiled and as a CUDA graph, the batch with the largest throughput
#   pipeline  data, sliding window and prediction from files to files, beside MONAI
#   parity    trainings in float32 and bf16 with every kernel beside a plain MONAI loop, and the noise between two seeds
#
# A section that fails or runs out of time keeps its results and stops no other; the exit status says so at the end. A
# short table comes last. The time, $LIMIT seconds in all, is divided among the sections; what one does not need goes to
# the next ones. The table goes to $OUT (benchmarks/results) as JSON, with the tuned configurations, the benchmarks and
# one archive of logs. $GLIOFORGE_COMMIT names the commit where there is no git.
set -uo pipefail
export OUT=${OUT:-$(dirname "$0")/results}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
if ! gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"); then
  echo "error: $python can't import torch; PYTHON=... names one that can" >&2
  exit 2
fi
work=$(mktemp -d)
logs=$work/logs
mkdir "$logs"
touch "$work/started"
export GLIOFORGE_CACHE=${GLIOFORGE_CACHE:-$work/cache} PYTHONUNBUFFERED=1
deadline=$((SECONDS + ${LIMIT:-560}))
status=0
finish() {
  tar -C "$work" -czf "$OUT/logs.tar.gz" logs
  rm -rf "$work"
}
trap finish EXIT

run() { # share of what is left of the section (4: a quarter), name of the log, command; prints how it ended
  local left=$(((section_end - SECONDS) / $1)) name=$2 code=0 started=$SECONDS
  shift 2
  if ((left < 5)); then
    echo "$name: skipped, no time left"
    status=1
    return 1
  fi
  # A shell may ignore the interrupt for what it runs, and so would Python by default.
  timeout -s INT -k 10 "$left" env --default-signal=INT "$@" >"$logs/$name.log" 2>&1 || code=$?
  echo "$name: $((SECONDS - started)) s, $([[ $code == 0 ]] && echo done || echo "failed with status $code")"
  if ((code != 0)); then
    status=1
    tail -n 5 "$logs/$name.log"
  fi
  return "$code"
}

tests() {
  local parallel
  parallel=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)
  # shellcheck disable=SC2086 # two words or none
  run 1 tests "$python" -m pytest -m gpu -q $parallel --continue-on-collection-errors --junitxml "$logs/tests.xml"
  tail -n 12 "$logs/tests.log"
}

tune() {
  run 1 tune "$python" -m benchmarks.tune && tail -n 1 "$logs/tune.log"
  cp -f "$GLIOFORGE_CACHE"/measured/*.json "$OUT/" 2>/dev/null
}

bench() {
  run 1 bench "$python" -m pytest --benchmark -q -m kernel
}

train() {
  run 2 demo "$python" launch/train.py --config launch/configs/demo.yaml --train.device cuda --run_dir "$work/runs/demo"
  run 1 bench_train "$python" -m benchmarks.bench_train --sections breakdown steps batches
  tail -n 40 "$logs/bench_train.log"
}

pipeline() {
  run 3 pipeline "$python" -m benchmarks.bench_pipeline --rounds 1
  tail -n 25 "$logs/pipeline.log"
  run 4 inference "$python" -m benchmarks.bench_inference
  tail -n 12 "$logs/inference.log"
  run 1 predict "$python" -m benchmarks.bench_predict --rounds 1 --cases 8
  tail -n 10 "$logs/predict.log"
}

parity() {
  run 1 parity "$python" -m benchmarks.parity --data.phantom.cases 8 --steps 150
  tail -n 24 "$logs/parity.log"
}

declare -A weight=([tests]=20 [tune]=34 [bench]=30 [train]=30 [pipeline]=60 [parity]=30) # of the time
sections=("$@")
((${#sections[@]})) || sections=(tests tune bench train)
for section in "${sections[@]}"; do
  if [[ -z ${weight[$section]:-} ]]; then
    echo "error: section $section must be one of ${!weight[*]}" >&2
    exit 2
  fi
done
for i in "${!sections[@]}"; do
  section=${sections[i]}
  if [[ -z $gpu && $section != pipeline ]]; then
    echo "$section: skipped, it needs a GPU and PyTorch sees none"
    status=1
    continue
  fi
  all=0
  for later in "${sections[@]:i}"; do all=$((all + weight[$later])); done
  section_end=$((SECONDS + (deadline - SECONDS) * weight[$section] / all))
  "$section"
done

echo
"$python" - "$work/runs" "$OUT/gpu_suite.json" "$gpu" <<'PY' || status=1
import csv, json, pathlib, sys
import torch
folder, out, gpu = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] or "no GPU"
runs = {}
for log in sorted(folder.glob("*/log.csv")):
    row = list(csv.DictReader(log.open()))[-1]
    runs[log.parent.name] = {key: float(row[key]) for key in ("loss", "samples_per_s", "val_WT") if row.get(key)}
print(f"{gpu}, torch {torch.__version__}")
if runs:
    out.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "runs": runs}, indent=2) + "\n")
for name, values in runs.items():
    print(f"{name:22}", *(f"{key} {value:.3g}" for key, value in values.items()), sep="  ")
PY
if [[ " ${sections[*]} " == *" bench "* && -n $gpu ]]; then
  newest=$(find "$OUT" -maxdepth 1 -name "kernels_*.json" -newer "$work/started")
  [[ -n $newest ]] && { "$python" -m benchmarks.report "$newest" || status=1; }
fi
[[ -n $gpu ]] || echo "PyTorch sees no GPU here: run this on a machine that has one"
((status == 0)) && echo "all sections done" || echo "some sections failed: see above and $OUT/logs.tar.gz"
exit "$status"
