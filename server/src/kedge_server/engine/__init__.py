"""Runs alive: one writer a run, its round, its leases, its snapshots.

Everything here belongs to the asyncio loop and needs no lock; only `device` has a thread, the one that owns JAX.
"""
