"""The TTT server over ZMQ: a front end without torch, workers that own a device each, and a client.

Start with `client` (TTTClient) and `launch` (TTTServer). docs/architecture.md follows one request through the modules.
"""
