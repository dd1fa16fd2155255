"""Text generation: prompts in, completions out. Start with ``base.Engine``.

``local`` generates in this process, ``api`` asks an OpenAI-compatible service, ``vllm`` runs or finds a vLLM server.
"""
