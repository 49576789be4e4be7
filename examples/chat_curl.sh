#!/bin/sh
# Ask a running server with curl: sh examples/chat_curl.sh [http://localhost:8000]
set -e
curl --silent --show-error --fail "${1:-http://localhost:8000}/v1/chat/completions" \
    --header 'Content-Type: application/json' \
    --data '{
        "model": "tgi",
        "messages": [{"role": "user", "content": "Tell me a story about a brave little dog."}],
        "max_tokens": 128
    }'
echo
