#!/bin/sh
# Whether the server of this container is alive: the port is that of entrypoint.sh.
if [ -n "${MODEL_ID:-}" ]; then port="${PORT:-80}"; else port="${PORT:-8000}"; fi
exec python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health', timeout=4)"
