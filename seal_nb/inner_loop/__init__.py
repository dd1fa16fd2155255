"""The inner loop: a request in, a reply out. Start with ``loop``."""
