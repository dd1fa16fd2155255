"""The TTT server over ZMQ. Start with ``client``; docs/architecture.md follows one request."""
