#!/bin/sh
# What a container runs. With MODEL_ID set: TGI's launcher, on port 80 unless PORT says otherwise. Else vLLM's command
# line: `--model MODEL ...`, on port 8000. Any other first word, such as `squawq`, is a program.
set -e
case "${1:-}" in
    "" | -*)
        if [ -n "${MODEL_ID:-}" ]; then
            export PORT="${PORT:-80}"
            exec text-generation-launcher "$@"
        fi
        exec squawq serve --host 0.0.0.0 "$@"
        ;;
    *) exec "$@" ;;
esac
