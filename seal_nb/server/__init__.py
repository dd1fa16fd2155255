"""The TTT server over ZMQ. Start with ``client`` and ``launch``; docs/architecture.md follows one request."""
