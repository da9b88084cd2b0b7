#!/bin/sh
# Evaluate a running server with lm-eval: once with entropix, once as vLLM samples without it, at the same temperature.
#
#   pip install "lm-eval[api]"
#   MODEL=$(vllm-entropix demo --print-model-path)
#   vllm serve $MODEL --host 127.0.0.1 --sampler entropix --sampler-config $MODEL/entropix.toml \
#       --max-model-len 1024 --kv-cache-memory-bytes 268435456
#   examples/lm_eval.sh [-u URL] [-m MODEL] [-t TASKS] [-l LIMIT] [-o FOLDER]
#
# The default task is 40 additions for the shipped model, in examples/lm_eval_tasks. lm-eval's own default is temperature 0, which
# stays greedy under entropix too: without --gen_kwargs you would compare greedy with greedy.
set -eu
url=http://127.0.0.1:8000 model='' tasks=entropix_additions limit='' output=lm-eval-results
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
if [ "${1:-}" = --help ]; then usage; exit; fi
while getopts hu:m:t:l:o: option; do
    case $option in
        h) usage; exit ;;
        u) url=${OPTARG%/} ;;
        m) model=$OPTARG ;;
        t) tasks=$OPTARG ;;
        l) limit=$OPTARG ;;
        o) output=$OPTARG ;;
        *) usage >&2; exit 2 ;;
    esac
done
command -v lm_eval >/dev/null || { echo "lm_eval isn't installed: pip install \"lm-eval[api]\"" >&2; exit 1; }
listed=$(curl -fsS --max-time 10 "$url/v1/models") || { echo "no server answers at $url; $0 -h shows how to start one" >&2; exit 1; }
[ -n "$model" ] || model=$(printf %s "$listed" | sed -n 's/.*"data":\[{"id":"\([^"]*\)".*/\1/p')
case $output in /*) ;; *) output=$PWD/$output ;; esac
cd "$(dirname "$0")/lm_eval_tasks" # where the task's file of problems is looked for

for sampler in on off; do
    echo "== entropix $sampler"
    lm_eval --model local-chat-completions --apply_chat_template --tasks "$tasks" --include_path . \
        --model_args "base_url=$url/v1/chat/completions,model=$model,num_concurrent=8,max_retries=1,tokenized_requests=False" \
        --gen_kwargs "{\"temperature\": 0.666, \"top_p\": 0.9, \"vllm_xargs\": {\"entropix\": \"$sampler\"}}" \
        ${limit:+--limit "$limit"} --output_path "$output/entropix-$sampler"
done
