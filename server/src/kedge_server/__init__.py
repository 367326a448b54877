"""The Kedge server: holds runs, takes contributions, applies compiled updates, hands out weights.

Nothing here is a Python API for users; the package is reached through `kedge-server` and the protocol.
"""
