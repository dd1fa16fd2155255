"""The inner loop: a request in, a reply out (train an adapter, answer questions without and with it, grade).

Start with `loop.py`. `evaluation.py` has the requests in progress, their prompts and their scores, `settings.py` the
settings (without torch). The training itself is in `seal_nb.ttt`.
"""
