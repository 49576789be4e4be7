"""The HTTP server: OpenAI/vLLM and TGI on one port, over one engine."""
